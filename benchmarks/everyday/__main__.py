"""Everyday problems, with nothing set.

Small, ordinary models on data that packages ship or a few lines generate. LocoProp runs
with nothing set; each rival with a cosine decay to zero and the best of four rates. At
equal steps all take the same number of steps; at equal seconds each takes as many as
fit in the time of `locoprop()`, and its schedule ends with them.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress

from benchmarks.everyday import report
from benchmarks.everyday.problem import Problem
from benchmarks.everyday.problems import problems
from benchmarks.everyday.training import CONTESTANTS, Trainer
from benchmarks.provenance import provenance
from benchmarks.report import read_results, write_results

MOST = 20  # times the steps of a problem, where a step is very cheap


def trained(
    problem: Problem,
    names: Sequence[str],
    seeds: Sequence[int],
    progress: Progress,
    allowed: float = 0.0,
) -> list[dict[str, Any]]:
    """All runs of some contestants on a problem.

    Args:
      problem: what is to be learned.
      names: keys of `CONTESTANTS`.
      seeds: of weights and batches.
      progress: where bars are shown.
      allowed: the seconds of the runs at equal seconds; if zero, what the first
        contestant's runs take.
    """
    results = []
    for name in names:
        contestant = CONTESTANTS[name]
        bar = progress.add_task(f"{problem.name}: {name}", total=None)
        trainer = Trainer(problem, contestant)
        rates = contestant.rates or (0.0,)
        progress.update(bar, total=2 * len(rates) * len(seeds))

        def run(equal, steps, bar=bar, trainer=trainer, rates=rates):
            for rate in rates:
                for seed in seeds:
                    found = trainer.run(seed, steps, rate)._asdict()
                    progress.advance(bar)
                    yield {
                        **{"equal": equal, "rate": rate, "seed": seed, "steps": steps},
                        **{key: _plain(value) for key, value in found.items()},
                    }

        runs = list(run("steps", problem.steps))
        took = float(np.median([r["seconds"] for r in runs]))
        decides, allowed = not allowed, allowed or took
        fitting = min(MOST * problem.steps, round(problem.steps * allowed / took))
        if decides:
            runs += [{**r, "equal": "seconds"} for r in runs]
        else:
            runs += run("seconds", max(1, fitting))
        results.append(
            {
                "problem": problem.name,
                "apart": problem.apart,
                "batch_size": problem.batch_size,
                "steps": problem.steps,
                "contestant": name,
                "compile_seconds": round(trainer.compile_seconds, 2),
                "step_seconds": took / problem.steps,
                "runs": runs,
            }
        )
        progress.remove_task(bar)
    return results


def _order(result: dict[str, Any]) -> tuple[int, int]:
    """Where a result stands: by problem, then by contestant."""
    names = [problem.name for problem in problems()]
    return names.index(result["problem"]), [*CONTESTANTS].index(result["contestant"])


def _plain(value: Any) -> Any:
    """A number with six digits, as JSON can hold it; None if it is not finite."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if np.isfinite(value) else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, writes the results, and shows tables and a picture of them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.everyday",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    known = [problem.name for problem in problems()]
    add = parser.add_argument
    add("--problems", nargs="+", choices=known, default=known, metavar="NAME")
    add("--contestants", nargs="+", choices=[*CONTESTANTS], default=[*CONTESTANTS])
    add(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="of weights and batches"
    )
    add("--resume", action="store_true", help="keep and skip what was written before")
    add("--output", type=Path, default=Path("out"), help="the folder for results")
    options = parser.parse_args(arguments)
    made = provenance()
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "everyday.jsonl"
    results = read_results(path) if options.resume and path.exists() else []
    chosen = [problem for problem in problems() if problem.name in options.problems]
    with Progress() as progress:
        whole = progress.add_task("Problems", total=len(chosen))
        for problem in chosen:
            done = [r for r in results if r["problem"] == problem.name]
            known = {r["contestant"] for r in done}
            names = [name for name in options.contestants if name not in known]
            first = done[0] if done else {"steps": 0, "step_seconds": 0.0}
            allowed = first["steps"] * first["step_seconds"]
            found = trained(problem, names, options.seeds, progress, allowed)
            results += [{**result, "made": made} for result in found]
            write_results(sorted(results, key=_order), path)
            progress.advance(whole)
    results = sorted(results, key=_order)
    Console().print(Markdown(report.markdown(results)))
    report.plot(results, path.with_suffix(".png"))
    print(f"Results: {path}\nPicture: {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
