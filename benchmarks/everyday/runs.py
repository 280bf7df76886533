"""All runs of some contestants on an everyday problem, in a process of its own."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any, TypeVar

import numpy as np
from rich.progress import track

from benchmarks.everyday.problems import problems
from benchmarks.everyday.training import CONTESTANTS, Trainer

T = TypeVar("T")
MOST = 20  # times the steps of a problem, where a step is very cheap


def in_processes(tasks: Sequence[Callable[[], T]], workers: int) -> Iterator[T]:
    """What each task returns, as they end, and a bar of how many have.

    Each worker keeps to one core, so that the others change its times less.
    """
    context = get_context("spawn")
    cores = context.Queue()
    pinned = sorted(os.sched_getaffinity(0))[:workers]
    for core in pinned:
        cores.put(core)
    with ProcessPoolExecutor(
        len(pinned), context, initializer=_pin, initargs=(cores,)
    ) as pool:
        pending = [pool.submit(task) for task in tasks]
        for future in track(as_completed(pending), "Problems", total=len(pending)):
            yield future.result()


def _pin(cores: Any) -> None:
    os.sched_setaffinity(0, {cores.get()})


def trained(
    name: str, contestants: Sequence[str], seeds: Sequence[int], allowed: float
) -> list[dict[str, Any]]:
    """All runs of some contestants on a problem.

    Args:
      name: of the problem.
      contestants: keys of `CONTESTANTS`.
      seeds: of weights and batches.
      allowed: the seconds of the runs at equal seconds; if zero, what the first
        contestant's runs take.
    """
    problem = next(problem for problem in problems() if problem.name == name)
    results = []
    for contestant in contestants:
        trainer = Trainer(problem, CONTESTANTS[contestant])
        rates = CONTESTANTS[contestant].rates or (0.0,)

        def run(equal, steps, trainer=trainer, rates=rates):
            for rate in rates:
                for seed in seeds:
                    found = trainer.run(seed, steps, rate)._asdict()
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
                "contestant": contestant,
                "compile_seconds": round(trainer.compile_seconds, 2),
                "step_seconds": took / problem.steps,
                "runs": runs,
            }
        )
    return results


def _plain(value: Any) -> Any:
    """A number with six digits, as JSON can hold it; None if it is not finite."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if np.isfinite(value) else None
