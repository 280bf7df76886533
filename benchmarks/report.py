"""Tables and pictures, made from results alone.

`python -m benchmarks.report FILE.jsonl` shows the table, also in Markdown, and redraws
the picture of an autoencoder benchmark.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from rich.console import Console
from rich.table import Table

from benchmarks.contestants import CONTESTANTS
from benchmarks.networks import HIDDEN

Results = Sequence[dict[str, Any]]


def read_results(path: Path) -> list[dict[str, Any]]:
    """The results in a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_results(results: Results, path: Path) -> None:
    """Writes results that `read_results` reads."""
    path.write_text("".join(json.dumps(result) + "\n" for result in results))


COLUMNS = ("train loss", "test loss", "steps", "seconds", "s / step", "× Adam")


def title(results: Results) -> str:
    """What was trained on what."""
    settings = results[0]["settings"]
    unit = unit_of(results)
    return (
        f"{_model(settings)} on {settings['data']}, {settings['train_images']} "
        f"{settings.get('examples', 'images')}, "
        f"batch {settings['batch_size']}, {settings[f'{unit}s']} {unit}s"
        f"{_seeds(results)}"
    )


def _model(settings: dict[str, Any]) -> str:
    """The model, with what differs from the paper's autoencoder."""
    parts = [settings.get("model", "deep autoencoder")]
    hidden, transfer = settings.get("hidden"), settings.get("transfer")
    if hidden not in (None, [*HIDDEN]):
        parts.append("-".join(map(str, hidden)))
    if transfer not in (None, "tanh"):
        parts.append(transfer)
    return ", ".join(parts)


def _seeds(results: Results) -> str:
    """How many each optimizer ran with, if any ran with more than one."""
    counts = Counter(result["optimizer"] for result in results).values()
    if max(counts) == 1:
        return ""
    ends = sorted({min(counts), max(counts)})
    return f", {' to '.join(map(str, ends))} seeds"


def unit_of(results: Results) -> str:
    """What training is measured in: epochs, or steps where it has less than one."""
    return "epoch" if "epochs" in results[0]["settings"] else "step"


KEYS = {"epoch": "epoch", "step": "steps"}  # of points


def by_optimizer(results: Results) -> dict[str, Results]:
    """The results of all seeds, by optimizer, in the order of their training losses."""
    names = dict.fromkeys(result["optimizer"] for result in results)
    groups = {n: [r for r in results if r["optimizer"] == n] for n in names}

    def last_loss(name):
        runs = groups[name]
        if any("error" in run for run in runs):
            return np.inf
        return np.mean([last(run)["train_loss"] for run in runs])

    return {name: groups[name] for name in sorted(groups, key=last_loss)}


def last(run: dict[str, Any]) -> dict[str, float]:
    """The last point of a run's curve."""
    return run["curve"][-1]


def only(results: Results, names: Sequence[str] | None) -> Results:
    """The results of some contestants; None for all."""
    return [r for r in results if names is None or r["optimizer"] in names]


EARLIER = {"locoprop_momentum_and_adamw": "locoprop_momentum, AdamW for the rest"}


def label(name: str) -> str:
    """What an optimizer is called, also one that only earlier results have."""
    return CONTESTANTS[name].label if name in CONTESTANTS else EARLIER.get(name, name)


def timed(runs: Results) -> Results:
    """Those whose times mean something: the machine did nothing else."""
    return [run for run in runs if not run["settings"].get("loaded")]


def rows(results: Results) -> list[tuple[str, ...]]:
    """Each optimizer's label and `COLUMNS`, or why it failed.

    Over several seeds losses are means, ranges behind them, and times are medians, also
    relative to Adam's, or AdamW's where it did not run.
    """
    groups = by_optimizer(results)

    def step_seconds(name):
        seconds = [r["median_step_seconds"] for r in timed(groups.get(name, ()))]
        return np.median(seconds) if seconds and None not in seconds else np.nan

    digits = 2 if _are_large(results) else 3
    adam = step_seconds("adam" if "adam" in groups else "adamw")
    table = []
    for name, runs in groups.items():
        errors = [run["error"] for run in runs if "error" in run]
        if errors:
            failed = f"{len(errors)} of {len(runs)} failed: {errors[0]}"
            table.append((label(name), failed, *[""] * (len(COLUMNS) - 1)))
            continue
        ends, step = [last(run) for run in runs], step_seconds(name)
        table.append(
            (
                label(name),
                _mean_and_range([point["train_loss"] for point in ends], digits),
                _mean_and_range([point["test_loss"] for point in ends], digits),
                str(ends[0]["steps"]),
                _shown(_median([last(run)["seconds"] for run in timed(runs)]), 1),
                _shown(step, 3 if step >= 0.01 else 4),
                _shown(step / adam, 2),
            )
        )
    return table


def _median(values: Sequence[float]) -> float:
    return float(np.median(values)) if values else np.nan


def _shown(number: float, digits: int) -> str:
    return f"{number:.{digits}f}" if np.isfinite(number) else "–"


def _are_large(results: Results) -> bool:
    """Whether losses are tens, so that hundredths say little."""
    return any(p["train_loss"] > 10 for r in results for p in r["curve"][1:])


def _mean_and_range(values: Sequence[float], digits: int) -> str:
    shown = [f"{x:.{digits}f}" for x in (np.mean(values), min(values), max(values))]
    return shown[0] if len(values) == 1 else "{} ({} to {})".format(*shown)


def print_table(results: Results) -> None:
    """Shows the results in the terminal."""
    table = Table("optimizer", title=title(results))
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for row in rows(results):
        table.add_row(*row)
    Console().print(table)


def markdown(results: Results) -> str:
    """The same table as the README shows it."""
    return markdown_table((title(results), *COLUMNS), rows(results))


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, its first column to the left and the others to the right."""
    lines = [header, ("---", *["---:"] * (len(header) - 1)), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def milestones(results: Results) -> str:
    """Mean training losses at equal epochs or steps and at equal seconds, in Markdown.

    The seconds are shares of what the median optimizer took for all of it.
    """
    groups = {
        n: g for n, g in by_optimizer(results).items() if all(r["curve"] for r in g)
    }
    unit = unit_of(results)
    total = max(point[KEYS[unit]] for r in results for point in r["curve"])
    counts = sorted({max(1, round(total * share)) for share in (0.1, 0.25, 0.5, 1.0)})
    ends = [last(run)["seconds"] for g in groups.values() for run in timed(g)]
    shares = (0.25, 0.5, 1.0) if ends else ()
    seconds = [float(f"{np.median(ends) * share:.1g}") for share in shares]
    digits = 1 if _are_large(results) else 3

    def reached(run, key, limit):
        if "error" in run and last(run)[key] < limit:
            return np.nan
        points = [p for p in run["curve"] if p[key] <= limit]
        return points[-1]["train_loss"]

    header = [f"{unit} {count}" for count in counts] + [f"{s:g} s" for s in seconds]
    about = {
        "state_size": "state / parameters",
        "peak_size": "memory / parameters",
        "compile_seconds": "compile, s",
    }
    columns = [*header, *about.values()]
    body = []
    for name, runs in groups.items():
        marks = [(runs, KEYS[unit], at) for at in counts]
        marks += [(timed(runs), "seconds", at) for at in seconds]
        means = [
            np.mean([reached(r, key, at) for r in of]) if of else np.nan
            for of, key, at in marks
        ]
        quiet = (*timed(runs), {})[0]
        known = [(quiet if key == "compile_seconds" else runs[0], key) for key in about]
        body.append(
            (
                label(name),
                *(_shown(mean, digits) for mean in means),
                *(_shown(one.get(key, np.nan), 1) for one, key in known),
            )
        )
    return markdown_table(("training loss", *columns), body)


def plot_curves(results: Results, path: Path) -> None:
    """Draws the losses against epochs or steps and against seconds.

    Lines are means over seeds, with their ranges around them. Seconds are logarithmic,
    for contestants differ in them by factors.
    """
    begun = [result for result in results if result["curve"]]
    groups = by_optimizer(begun)
    unit, crowded = unit_of(results), len(groups) > 5
    across = {KEYS[unit]: f"{unit}s"}
    if timed(begun):
        across["seconds"] = "seconds of training"
    up = {"train_loss": "training loss", "test_loss": "test loss"}
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False}):
        figure = Figure(figsize=(9.5, 6.5), layout="constrained")
        panels = figure.subplots(
            2, len(across), sharex="col", sharey=True, squeeze=False
        )
        for row, loss in zip(panels, up, strict=True):
            for axes, key in zip(row, across, strict=True):
                _plot_loss(axes, groups, key, loss)
            row[0].set_ylabel(up[loss])
        for axes, (key, name) in zip(panels[-1], across.items(), strict=True):
            axes.set_xlabel(name)
            if key == "seconds":
                axes.set_xscale("log", nonpositive="mask")
                _label_logarithmic(axes.xaxis)
        first = panels[0][0]
        first.set_ylim(top=1.1 * max(run["curve"][0]["train_loss"] for run in begun))
        if crowded:
            lines = first.get_legend_handles_labels()
            figure.legend(*lines, loc="outside right center", frameon=False, fontsize=7)
        else:
            first.legend(frameon=False, fontsize=8)
        machine = (timed(results) or results)[0]["made"]["machine"]
        where = machine["device"]
        if machine["platform"] == "cpu":
            where = f"{machine['cores']} cores of an {machine['processor']}"
        figure.suptitle(f"{title(results)}\n{where}", fontsize=10)
        figure.savefig(path, dpi=150)


def _plot_loss(axes: Axes, groups: dict[str, Results], key: str, loss: str) -> None:
    """One loss of each optimizer against one figure of its points."""
    for i, (name, runs) in enumerate(groups.items()):
        seen = timed(runs) if key == "seconds" else runs
        if not seen:
            continue
        shared = min(len(run["curve"]) for run in seen)
        x, y = (
            np.array([[p[figure] for p in run["curve"][:shared]] for run in seen])
            for figure in (key, loss)
        )
        color, dashes = f"C{i % 10}", ("-", "--", ":")[i // 10 % 3]
        x = x.mean(axis=0)
        axes.plot(x, y.mean(axis=0), dashes, color=color, label=label(name))
        axes.fill_between(x, y.min(axis=0), y.max(axis=0), color=color, alpha=0.2, lw=0)
    axes.set_yscale("log")
    _label_logarithmic(axes.yaxis)
    axes.grid(alpha=0.3, which="both")


def _label_logarithmic(axis: Axis) -> None:
    """Labels at 1, 2 and 5, and tens of them."""
    axis.set_minor_locator(LogLocator(subs=(2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("{x:g}")
    axis.set_tick_params(which="both", length=3.5, pad=3.5)


def main(arguments: Sequence[str] | None = None) -> None:
    """Shows the table and redraws the picture of a file of results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report")
    add = parser.add_argument
    add("results", type=Path, help="a file of JSON lines")
    add("--only", nargs="+", metavar="NAME", help="these contestants, and no others")
    add("--picture", type=Path, help="where it goes; beside the results if not given")
    options = parser.parse_args(arguments)
    results = only(read_results(options.results), options.only)
    print_table(results)
    print(markdown(results), milestones(results), sep="\n\n")
    plot_curves(results, options.picture or options.results.with_suffix(".png"))


if __name__ == "__main__":
    main()
