"""Everyday problems, with nothing set.

Small, ordinary models on data that packages ship or a few lines generate. LocoProp runs
with nothing set; each rival with a cosine decay to zero and the best of four rates. At
equal steps all take the same number of steps; at equal seconds each takes as many as
fit in the time of `locoprop()`, and its schedule ends with them.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from benchmarks.everyday import report, runs
from benchmarks.everyday.problems import problems
from benchmarks.everyday.training import CONTESTANTS
from benchmarks.provenance import provenance
from benchmarks.report import read_results, write_results


def _contestants(results: Sequence[dict[str, Any]]) -> set[str]:
    return {result["contestant"] for result in results}


def _order(result: dict[str, Any]) -> tuple[int, int]:
    """Where a result stands: by problem, then by contestant."""
    names = [problem.name for problem in problems()]
    return names.index(result["problem"]), [*CONTESTANTS].index(result["contestant"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, writes the results, and shows tables and a picture of them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.everyday",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    names = [problem.name for problem in problems()]
    add = parser.add_argument
    add("--problems", nargs="+", choices=names, default=names, metavar="NAME")
    add("--contestants", nargs="+", choices=[*CONTESTANTS], default=[*CONTESTANTS])
    add(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="of weights and batches"
    )
    add("--workers", type=int, default=2, help="problems at a time, each on one core")
    add("--resume", action="store_true", help="keep and skip what was written before")
    add("--output", type=Path, default=Path("out"), help="the folder for results")
    options = parser.parse_args(arguments)
    made = provenance()
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "everyday.jsonl"
    results = read_results(path) if options.resume and path.exists() else []
    tasks = []
    for name in options.problems:
        done = [r for r in results if r["problem"] == name]
        left = [n for n in options.contestants if n not in _contestants(done)]
        allowed = done[0]["steps"] * done[0]["step_seconds"] if done else 0.0
        tasks.append(partial(runs.trained, name, left, options.seeds, allowed))
    for found in runs.in_processes(tasks, options.workers):
        results += [{**result, "made": made} for result in found]
        write_results(sorted(results, key=_order), path)
    results = sorted(results, key=_order)
    Console().print(Markdown(report.markdown(results)))
    report.plot(results, path.with_suffix(".png"))
    print(f"Results: {path}\nPicture: {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
