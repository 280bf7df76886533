"""Tables and a picture of what `benchmarks.step_cost` measured."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich.console import Console
from rich.table import Table

from benchmarks.operations import unit_of

COLUMNS = ("step", "operations, units", "XLA's count / ours", "× Adam's time")


def rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Name, operations in units, XLA's count over ours, time over Adam's."""
    found, by_xla = results["found"], results["by_xla"]
    unit = unit_of(results["widths"], results["batch"])
    table = []
    for name, result in found.items():
        count = sum(result.get("operations", {}).values())
        table.append(
            (
                name,
                f"{count / unit:.2f}" if count else "–",
                f"{by_xla[name] / count:.3f}" if name in by_xla else "–",
                f"{result['seconds'] / found['adam']['seconds']:.2f}",
            )
        )
    return table


def _ours(peer: dict[str, Any]) -> tuple[str, ...]:
    """The paper's and ours, which ran beside a peer."""
    return tuple(v for v in peer["seconds"] if v not in ("adam", peer["peer"]))


def peer_columns(results: dict[str, Any]) -> tuple[str, ...]:
    """What stands above `peer_rows`."""
    ours = _ours(results["peers"][0])
    return (
        *("peer", "its step / adam's", *(f"/ {name}'s" for name in ours)),
        *(f"{ours[-1]}'s / adam's", "loss", *(f"{name}'s" for name in ours)),
    )


def peer_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Peer and settings, its step over each of ours, ours over Adam's, last losses."""
    table = []
    for result in results["peers"]:
        name, taken, losses = result["peer"], result["seconds"], result["losses"]
        settings = ", ".join(f"{k} {v}" for k, v in result["settings"].items())
        ours = _ours(result)
        table.append(
            (
                f"{name}, {settings}",
                *(f"{taken[name] / taken[v]:.2f}" for v in ("adam", *ours)),
                f"{taken[ours[-1]] / taken['adam']:.2f}",
                *(f"{losses[v][-1]:.1f}" for v in (name, *ours)),
            )
        )
    return table


def adams_rate(results: dict[str, Any]) -> float:
    """Operations a second of Adam's step."""
    adam = results["found"]["adam"]
    return sum(adam["operations"].values()) / adam["seconds"]


def _counted(found: dict[str, Any]) -> list[str]:
    """The variants whose operations were counted."""
    return [variant for variant, part in found.items() if "operations" in part]


def growth_columns(results: dict[str, Any]) -> tuple[str, ...]:
    """What stands above `growth_rows`."""
    counted = _counted(results["growth"][0]["found"])
    return (
        "",
        *(f"{variant}, s" for variant in counted),
        "records",
        "state",
        "temporary",
    )


def growth_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Of each setting the seconds over what the count predicts at Adam's first rate."""
    rate = adams_rate(results)
    table = []
    for result in results["growth"]:
        at = [f"{result['axis']} {result[result['axis']]:g}"]
        counted = [result["found"][v] for v in _counted(result["found"])]
        for found in counted:
            predicted = sum(found["operations"].values()) / rate
            at.append(f"{found['seconds']:.3f} ({found['seconds'] / predicted:.2f})")
        largest = counted[-1]
        params = largest["parameter_bytes"]
        at += [
            f"{largest[f'{part}_bytes'] / params:.1f}"
            for part in ("record", "state", "temporary")
        ]
        table.append(tuple(at))
    return table


def show(results: dict[str, Any], path: Path) -> None:
    """The tables, and a picture of the growth."""
    table = Table(*COLUMNS)
    for row in rows(results):
        table.add_row(*row)
    Console().print(table)
    for part, columns_of, rows_of in (
        ("peers", peer_columns, peer_rows),
        ("growth", growth_columns, growth_rows),
    ):
        if not results.get(part):
            continue
        table = Table(*columns_of(results))
        for row in rows_of(results):
            table.add_row(*row)
        Console().print(table)
    axes_names = list(dict.fromkeys(r["axis"] for r in results.get("growth", ())))
    if not axes_names:
        return
    figure = Figure(figsize=(4 * len(axes_names), 3.4), layout="constrained")
    rate = adams_rate(results)
    (all_axes,) = figure.subplots(1, len(axes_names), squeeze=False)
    for axes, name in zip(all_axes, axes_names, strict=True):
        chosen = [r for r in results["growth"] if r["axis"] == name]
        at = [r[name] for r in chosen]
        for i, variant in enumerate(_counted(chosen[0]["found"])):
            parts = [r["found"][variant] for r in chosen]
            axes.plot(at, [p["seconds"] for p in parts], f"C{i}o-", label=variant)
            predicted = [sum(p["operations"].values()) / rate for p in parts]
            axes.plot(at, predicted, f"C{i}:")
        axes.set(xscale="log", yscale="log", xlabel=name, ylabel="seconds a step")
        axes.set_xticks(at, [f"{x:g}" for x in at])
        axes.xaxis.set_minor_locator(NullLocator())
    figure.axes[0].legend(frameon=False, fontsize=7, title="dotted: at Adam's rate")
    figure.savefig(path, dpi=150)
