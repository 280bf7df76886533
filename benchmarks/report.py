"""Tables and pictures, made from results alone.

`python -m benchmarks.report FILE.jsonl` shows the table, also in Markdown, and redraws
the picture of an autoencoder benchmark.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.contestants import CONTESTANTS


def read_results(path: Path) -> list[dict[str, Any]]:
    """The results in a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_results(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes results that `read_results` reads."""
    path.write_text("".join(json.dumps(result) + "\n" for result in results))


COLUMNS = ("train loss", "test loss", "steps", "seconds", "s / step", "× Adam")


def title(results: Sequence[dict[str, Any]]) -> str:
    """What was trained on what."""
    settings = results[0]["settings"]
    return (
        f"{settings['data']}, {settings['train_images']} images, "
        f"batch {settings['batch_size']}, {settings['epochs']} epochs"
    )


def rows(results: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Each optimizer's label and `COLUMNS`; times also relative to Adam's."""
    step_seconds = {r["optimizer"]: r["median_step_seconds"] for r in results}
    adam = step_seconds.get("adam")
    table = []
    for result in results:
        last, step = result["curve"][-1], step_seconds[result["optimizer"]]
        table.append(
            (
                CONTESTANTS[result["optimizer"]].label,
                f"{last['train_loss']:.2f}",
                f"{last['test_loss']:.2f}",
                str(last["steps"]),
                f"{last['seconds']:.1f}",
                f"{step:.3f}",
                f"{step / adam:.2f}" if adam else "–",
            )
        )
    return table


def print_table(results: Sequence[dict[str, Any]]) -> None:
    """Shows the results in the terminal."""
    table = Table("optimizer", title=f"Deep autoencoder on {title(results)}")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for row in rows(results):
        table.add_row(*row)
    Console().print(table)


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """The same table as the README shows it."""
    lines = [(title(results), *COLUMNS), ("---", *["---:"] * len(COLUMNS))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [*lines, *rows(results)])


def plot_curves(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the loss against epochs and against seconds, side by side."""
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False}):
        figure = Figure(figsize=(9.5, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, key in ((left, "epoch"), (right, "seconds")):
            for i, result in enumerate(results):
                curve, color = result["curve"], f"C{i}"
                at = [point[key] for point in curve]
                label = CONTESTANTS[result["optimizer"]].label
                train = [point["train_loss"] for point in curve]
                axes.plot(at, train, color=color, label=label)
                test = [point["test_loss"] for point in curve]
                axes.plot(at, test, color=color, linestyle=":", alpha=0.8)
            axes.set_xlabel(f"{key}s" if key == "epoch" else "seconds of training")
            axes.set_yscale("log")
            axes.grid(alpha=0.3, which="both")
        left.set_ylabel("loss (solid: training, dotted: test)")
        left.legend(frameon=False)
        machine = results[0]["made"]["machine"]
        where = f"{machine['cores']} cores of an {machine['processor']}"
        figure.suptitle(f"Deep autoencoder: {title(results)}; {where}", fontsize=10)
        figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Shows the table and redraws the picture of a file of results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report")
    parser.add_argument("results", type=Path, help="a file of JSON lines")
    path = parser.parse_args(arguments).results
    results = read_results(path)
    print_table(results)
    print(markdown(results))
    plot_curves(results, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
