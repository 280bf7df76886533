"""Does `locoprop()` need a schedule, and what does long training want?

Each everyday problem is trained with a constant rate of one, which is the default, and
with decays to zero; a few of them for many more steps.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.markdown import Markdown

import locoprop_optax as loco
from benchmarks.everyday.problems import problems
from benchmarks.everyday.report import LEAST
from benchmarks.everyday.runs import in_processes
from benchmarks.everyday.training import Contestant, Trainer, cosine
from benchmarks.provenance import provenance
from benchmarks.report import markdown_table, write_results

SHAPES = {
    "none": lambda done: 1.0 + 0.0 * done,
    "linear": lambda done: 1.0 - done,
    "cosine": partial(cosine, 1.0),
    "last fifth": lambda done: jnp.minimum(1.0, 5.0 * (1.0 - done)),
}
SCHEDULED = Contestant(
    "locoprop",
    loco.locoprop,
    captures=True,
    schedule=lambda shape, done: jax.lax.switch(
        jnp.int32(shape), [*SHAPES.values()], done
    ),
)
PARTS = {"train": "training", "valid": "validation"}


def runs_of(name: str, seeds: Sequence[int], steps: int | None) -> list[dict[str, Any]]:
    """A problem with each schedule and seed, for its own number of steps or another."""
    problem = next(problem for problem in problems() if problem.name == name)
    trainer, count = Trainer(problem, SCHEDULED), steps or problem.steps
    about = {"problem": name, "apart": problem.apart, "steps": count}
    return [
        {
            **about,
            "schedule": shape,
            "seed": seed,
            **trainer.run(seed, count, float(at))._asdict(),
        }
        for at, shape in enumerate(SHAPES)
        for seed in seeds
    ]


def means(results: Sequence[dict[str, Any]], part: str) -> dict[Any, dict[str, float]]:
    """The mean loss over seeds by problem and steps, and by schedule."""
    found: dict[Any, dict[str, list[float]]] = {}
    for run in results:
        row = found.setdefault((run["problem"], run["steps"]), {})
        row.setdefault(run["schedule"], []).append(run[part])
    return {
        problem: {shape: float(np.mean(losses)) for shape, losses in row.items()}
        for problem, row in found.items()
    }


def over_best(row: dict[str, float]) -> float:
    """What the loss without a schedule is over that of the best one."""
    return max(row["none"], LEAST) / max(min(row.values()), LEAST)


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """The losses, and on how many problems none is needed."""
    tables = []
    for part, label in PARTS.items():
        rows = means(results, part)
        body = [
            (name, str(steps), *(f"{row[s]:.3g}" for s in SHAPES), f"{ratio:.2f}")
            for (name, steps), row in rows.items()
            for ratio in [over_best(row)]
        ]
        header = (f"{label} loss", "steps", *SHAPES, "none / best")
        within = sum(over_best(row) <= 1.1 for row in rows.values())
        tables += [
            markdown_table(header, body),
            f"Without a schedule within 10 % of the best in {label} loss: {within} of "
            f"{len(rows)}.",
        ]
    return "\n\n".join(tables)


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the loss without a schedule over that of the best, sorted."""
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False}):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for part, label in PARTS.items():
            ratios = sorted(map(over_best, means(results, part).values()))
            axes.plot(np.linspace(0, 1, len(ratios)), ratios, label=f"{label} loss")
        axes.axhline(1.1, color="gray", linewidth=0.8)
        axes.set_xlabel("share of the problems")
        axes.set_ylabel("without a schedule / with the best")
        axes.legend(frameon=False)
        figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, writes the results, and shows a table and a picture of them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.everyday.schedules",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    names = [problem.name for problem in problems()]
    add = parser.add_argument
    add("--problems", nargs="+", choices=names, default=names, metavar="NAME")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of weights, batches")
    add("--steps", type=int, help="for all problems (default: each its own)")
    add("--workers", type=int, default=2, help="problems at a time, each on one core")
    add("--name", default="everyday_schedules", help="of the files")
    add("--output", type=Path, default=Path("out"), help="the folder for results")
    options = parser.parse_args(arguments)
    made = provenance()
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{options.name}.jsonl"
    tasks = [
        partial(runs_of, name, options.seeds, options.steps)
        for name in options.problems
    ]
    results: list[dict[str, Any]] = []
    for runs in in_processes(tasks, options.workers):
        results += [{**run, "made": made} for run in runs]
        results.sort(key=lambda run: names.index(run["problem"]))
        write_results(results, path)
    Console().print(Markdown(markdown(results)))
    plot(results, path.with_suffix(".png"))
    print(f"Results: {path}\nPicture: {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
