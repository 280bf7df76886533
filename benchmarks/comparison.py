"""Optimizers side by side: what the benchmarks of all models have in common.

All start from the same weights, see the same batches in the same order, and take turns
round by round, so that their times are measured under the same conditions. Peers take
part from environments of their own. One that fails is listed with its error.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.progress import Progress

from benchmarks import report, sharing
from benchmarks.contestants import CONTESTANTS, MIXED
from benchmarks.problem import Problem, Task, make_task
from benchmarks.provenance import provenance
from benchmarks.training import Trainer, start


class Benchmark(NamedTuple):
    """A model and its data, for optimizers to be compared on.

    Attributes:
      name: of its module.
      description: what the command line says of it.
      optimizers: keys of `CONTESTANTS`, those that can run.
      default: those that run if none are named.
      batch_size: if none is given.
      add_arguments: adds what its problem is made of to a command line.
      problem: from the command line to the problem.
      settings: from the command line and the problem to what results say of it: at
        least `model`, `data` and `train_images`.
      stem: from the command line to the name of its files, without a suffix.
      round_steps: from the command line and the problem to the steps between two
        measurements of the losses.
    """

    name: str
    description: str
    optimizers: Sequence[str]
    default: Sequence[str]
    batch_size: int
    add_arguments: Callable[[argparse.ArgumentParser], None]
    problem: Callable[[argparse.Namespace], Problem]
    settings: Callable[[argparse.Namespace, Problem], dict[str, Any]]
    stem: Callable[[argparse.Namespace], str]
    round_steps: Callable[[argparse.Namespace, Problem], int]


def every_few_steps(
    name: str,
    description: str,
    *,
    batch_size: int,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    problem: Callable[[argparse.Namespace], Problem],
    settings: Callable[[argparse.Namespace, Problem], dict[str, Any]],
) -> Benchmark:
    """A model that is more than local layers, measured every few steps.

    Args:
      name: as in `Benchmark`, as all others.
      description: as there.
      batch_size: as there.
      add_arguments: as there.
      problem: as there.
      settings: as there.
    """
    optimizers = ("adamw", "muon", "kfac", "locoprop", *MIXED)

    def add_all(parser):
        add_arguments(parser)
        parser.add_argument(
            "--round-steps", type=int, default=20, help="steps between measurements"
        )

    return Benchmark(
        name=name,
        description=description,
        optimizers=optimizers,
        default=tuple(name for name in optimizers if CONTESTANTS[name].peer is None),
        batch_size=batch_size,
        add_arguments=add_all,
        problem=problem,
        settings=settings,
        stem=lambda options: name,
        round_steps=lambda options, problem: options.round_steps,
    )


ALONE_EVERY = 20  # rounds, on a machine that is shared
STEPS_BESIDE = 10  # at a time: who wants to be alone waits so long


@dataclass
class Run:
    """One optimizer's training and its curve so far.

    Attributes:
      name: a key of `CONTESTANTS`.
      epoch_steps: the steps of one pass over the training examples.
      trainer: None if it could not start.
      room: what processes share that train beside one another; None if this one has
        the machine for itself.
      step_seconds: the time of each step; NaN beside others.
      curve: the losses before the first step and after each round.
      error: why it ended early.
    """

    name: str
    epoch_steps: int
    trainer: Trainer | None
    room: Path | None = None
    step_seconds: list[float] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)
    error: str | None = None

    def advance(self, steps: int) -> float:
        """Takes steps and adds a point to the curve; returns the training loss."""
        if self.trainer is None or self.error:
            return np.nan
        try:
            self._train(self.trainer, steps)
            with self._turn(alone=False):
                losses = self.trainer.evaluate()
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"
            return np.nan
        done = len(self.step_seconds)
        point = {"epoch": round(done / self.epoch_steps, 4), "steps": done}
        self.curve.append({**point, **losses})
        if not np.isfinite(losses["train_loss"]):
            self.error = f"The loss is {losses['train_loss']} after {done} steps."
        return losses["train_loss"]

    def _train(self, trainer: Trainer, steps: int) -> None:
        """Takes steps, timed if they run alone."""
        alone = self.room is None or len(self.curve) % ALONE_EVERY == 1
        some = steps if alone else STEPS_BESIDE
        for begun in range(0, steps, some or 1):
            count = min(some, steps - begun)
            with self._turn(alone=alone):
                seconds = trainer.train(count).seconds
            self.step_seconds += seconds if alone else count * [np.nan]

    def _turn(self, *, alone: bool) -> AbstractContextManager[None]:
        """What to wait for."""
        return sharing.turn(self.room, alone=alone) if self.room else nullcontext()

    def result(self) -> dict[str, Any]:
        """All of it in one dictionary, the mean time for the steps that have none."""
        described = self.trainer.described() if self.trainer else {}
        steps = np.array(self.step_seconds)
        alone = steps[np.isfinite(steps)]
        mean = alone.mean() if alone.size else np.nan
        passed = np.cumsum([0.0, *np.where(np.isfinite(steps), steps, mean)])
        return {
            "optimizer": self.name,
            "curve": [
                {**point, "seconds": round(passed[point["steps"]], 3)}
                for point in self.curve
            ],
            "median_step_seconds": float(np.median(alone)) if alone.size else None,
            **({"timed_steps": alone.size} if self.room else {}),
            **described,
            **({"error": self.error} if self.error else {}),
        }

    def stop(self) -> None:
        """Ends it early."""
        self.error = self.error or f"Stopped after {len(self.step_seconds)} steps."


def train(
    task: Task,
    names: Sequence[str],
    *,
    rounds: int,
    settings: Mapping[str, Mapping[str, Any]],
    interpreters: Mapping[str, Path],
    room: Path | None = None,
) -> list[dict[str, Any]]:
    """Trains with each optimizer, round by round in turns; returns their results.

    An interrupt ends the training early, with what there is.

    Args:
      task: what to train on.
      names: keys of `CONTESTANTS`.
      rounds: into how many parts the task's steps are cut.
      settings: by name; a contestant's defaults where there are none.
      interpreters: of the peers' environments, by script.
      room: what processes share that train beside one another, if any.
    """
    steps, batch_size = task.order.shape
    epoch_steps = len(task.problem.train.inputs) // batch_size
    with Progress() as progress, ExitStack() as stack:
        runs = []
        for name in names:
            compiling = progress.add_task(f"{name}: compiling", total=None)
            try:
                started = start(name, task, settings.get(name), interpreters)
                trainer = stack.enter_context(started)
                runs.append(Run(name, epoch_steps, trainer, room))
            except Exception as error:
                message = f"{type(error).__name__}: {error}"
                runs.append(Run(name, epoch_steps, None, error=message))
            progress.remove_task(compiling)
        bars = {n: progress.add_task(n, total=rounds) for n in names}
        try:
            for count in (0, *rounds * [steps // rounds]):
                for run in runs:
                    loss = run.advance(count)
                    text = f"{run.name:<11} loss {loss:8.2f}"
                    progress.update(bars[run.name], advance=count > 0, description=text)
        except KeyboardInterrupt:
            for run in runs:
                run.stop()
        return [run.result() for run in runs]


def add_arguments(parser: argparse.ArgumentParser, benchmark: Benchmark) -> None:
    """What says on what, in which environments and with what to train."""
    benchmark.add_arguments(parser)
    add = parser.add_argument
    add("--batch-size", type=int, default=benchmark.batch_size, help="examples a step")
    add(
        "--peer",
        type=lambda text: tuple(text.split("=", 1)),
        action="append",
        default=[],
        metavar="SCRIPT=PYTHON",
        help="a script of benchmarks/peers and its interpreter",
    )
    add(
        "--optimizers",
        nargs="+",
        choices=benchmark.optimizers,
        default=list(benchmark.default),
        help="the optimizers to compare",
    )
    add("--output", type=Path, default=Path("out"), help="the folder for results")


def interpreters_of(options: argparse.Namespace) -> dict[str, Path]:
    """The interpreters of the peers, by script."""
    return {script: Path(python) for script, python in options.peer}


def parser(benchmark: Benchmark) -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{benchmark.name}",
        description=benchmark.description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add_arguments(parser, benchmark)
    add(
        *("--epochs", "--rounds"),
        dest="rounds",
        type=int,
        default=10,
        help="how often losses are measured; of the autoencoder after each epoch",
    )
    add("--seeds", nargs="+", type=int, default=[0], help="of weights and batches")
    add("--loaded", action="store_true", help="the machine is busy: report no times")
    add(
        "--room",
        type=Path,
        help="a file that commands share which run beside one another: of every "
        f"{ALONE_EVERY} rounds each then has one alone, which gives its times",
    )
    add("--resume", action="store_true", help="keep and skip what was written before")
    add("--settings", type=Path, help="what `benchmarks.tune` found; else defaults")
    return parser


def main(benchmark: Benchmark, arguments: Sequence[str] | None = None) -> None:
    """Trains, writes the results, and shows a table and a picture of them."""
    options = parser(benchmark).parse_args(arguments)
    made = provenance()
    problem = benchmark.problem(options)
    tuned = json.loads(options.settings.read_text()) if options.settings else {}
    chosen = {name: found["settings"] for name, found in tuned.items()}
    steps = options.rounds * benchmark.round_steps(options, problem)
    common = {
        **benchmark.settings(options, problem),
        "train_images": len(problem.train.inputs),
        "test_images": len(problem.test.inputs),
        "steps": steps,
        "batch_size": options.batch_size,
        "loaded": options.loaded,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{benchmark.stem(options)}.jsonl"
    results = report.read_results(path) if options.resume and path.exists() else []
    for seed in options.seeds:
        done = {r["optimizer"] for r in results if r["settings"]["seed"] == seed}
        names = [name for name in options.optimizers if name not in done]
        print(f"Seed {seed}: {', '.join(names) or 'nothing is left'}")
        task = make_task(problem, steps=steps, batch_size=options.batch_size, seed=seed)
        found = train(
            task,
            names,
            rounds=options.rounds,
            settings=chosen,
            interpreters=interpreters_of(options),
            room=options.room,
        )
        for result in found:
            tuned_to = chosen.get(result["optimizer"], {})
            settings = {**common, "seed": seed, "tuned": tuned_to}
            results.append({**result, "settings": settings, "made": made})
        report.write_results(results, path)
    report.print_table(results)
    report.plot_curves(results, path.with_suffix(".png"))
    print(f"Results: {path}\nPicture: {path.with_suffix('.png')}")
