"""Tables and a picture of what `benchmarks.step_cost` measured."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich.console import Console
from rich.table import Table

from benchmarks.operations import unit_of

COLUMNS = ("step", "operations, units", "XLA's count / ours", "× Adam's time")
PEER_COLUMNS = (
    *("peer", "its step / adam's", "/ locoprop_m's", "/ locoprop_momentum's"),
    *("locoprop_momentum's / adam's", "loss", "locoprop_m's", "locoprop_momentum's"),
)
GROWTH_COLUMNS = (
    *("", "adam, s", "locoprop_m, s", "locoprop_s, s", "locoprop_momentum, s"),
    *("records", "state", "temporary"),
)


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


def peer_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Peer and settings, its step over each of ours, ours over Adam's, last losses."""
    table = []
    for result in results["peers"]:
        name, taken, losses = result["peer"], result["seconds"], result["losses"]
        settings = ", ".join(f"{k} {v}" for k, v in result["settings"].items())
        table.append(
            (
                f"{name}, {settings}",
                *(f"{taken[name] / taken[v]:.2f}" for v in taken if v != name),
                f"{taken['locoprop_momentum'] / taken['adam']:.2f}",
                *(
                    f"{losses[v][-1]:.1f}"
                    for v in (name, "locoprop_m", "locoprop_momentum")
                ),
            )
        )
    return table


def adams_rate(results: dict[str, Any]) -> float:
    """Operations a second of Adam's step."""
    adam = results["found"]["adam"]
    return sum(adam["operations"].values()) / adam["seconds"]


def growth_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Of each setting the seconds over what the count predicts at Adam's first rate."""
    rate = adams_rate(results)
    table = []
    for result in results["growth"]:
        at = [f"{result['axis']} {result[result['axis']]:g}"]
        counted = {n: f for n, f in result["found"].items() if "operations" in f}
        for found in counted.values():
            predicted = sum(found["operations"].values()) / rate
            at.append(f"{found['seconds']:.3f} ({found['seconds'] / predicted:.2f})")
        largest = counted["locoprop_momentum"]
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
    for columns, rows_of in ((PEER_COLUMNS, peer_rows), (GROWTH_COLUMNS, growth_rows)):
        table = Table(*columns)
        for row in rows_of({"growth": [], **results}):
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
        counted = [v for v, f in chosen[0]["found"].items() if "operations" in f]
        for i, variant in enumerate(counted):
            parts = [r["found"][variant] for r in chosen]
            axes.plot(at, [p["seconds"] for p in parts], f"C{i}o-", label=variant)
            predicted = [sum(p["operations"].values()) / rate for p in parts]
            axes.plot(at, predicted, f"C{i}:")
        axes.set(xscale="log", yscale="log", xlabel=name, ylabel="seconds a step")
        axes.set_xticks(at, [f"{x:g}" for x in at])
        axes.xaxis.set_minor_locator(NullLocator())
    figure.axes[0].legend(frameon=False, fontsize=7, title="dotted: at Adam's rate")
    figure.savefig(path, dpi=150)
