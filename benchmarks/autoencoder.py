"""The deep autoencoder of the LocoProp paper, trained by several optimizers.

All start from the same weights, see the same batches in the same order, and take turns
epoch by epoch, so that their times are measured under the same conditions. Peers take
part from environments of their own: `--peer SCRIPT=PYTHON` names a script of
`benchmarks/peers` and its interpreter. One that fails is listed with its error.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from benchmarks import datasets, report
from benchmarks.contestants import CONTESTANTS
from benchmarks.network import NETWORKS, TRANSFERS, Autoencoder
from benchmarks.provenance import provenance
from benchmarks.training import Task, Trainer, make_task, start


@dataclass
class Run:
    """One optimizer's training and its curve so far.

    Attributes:
      name: a key of `CONTESTANTS`.
      trainer: None if it could not start.
      step_seconds: the time of each step.
      curve: the losses at the end of each epoch.
      error: why it ended early.
    """

    name: str
    trainer: Trainer | None
    step_seconds: list[float] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)
    error: str | None = None

    def advance(self, steps: int, epoch: int) -> float:
        """Takes steps and adds a point to the curve; returns the training loss."""
        if self.trainer is None or self.error:
            return np.nan
        try:
            if steps:
                self.step_seconds += self.trainer.train(steps).seconds
            losses = self.trainer.evaluate()
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"
            return np.nan
        seconds = round(sum(self.step_seconds), 3)
        point = {"epoch": epoch, "steps": len(self.step_seconds), "seconds": seconds}
        self.curve.append({**point, **losses})
        if not np.isfinite(losses["train_loss"]):
            self.error = f"The loss is {losses['train_loss']} after epoch {epoch}."
        return losses["train_loss"]

    def result(self) -> dict[str, Any]:
        """All of it in one dictionary."""
        described = self.trainer.described() if self.trainer else {}
        steps = self.step_seconds
        return {
            "optimizer": self.name,
            "curve": self.curve,
            "median_step_seconds": float(np.median(steps)) if steps else None,
            **described,
            **({"error": self.error} if self.error else {}),
        }


def train(
    task: Task,
    names: Sequence[str],
    *,
    epochs: int,
    settings: Mapping[str, Mapping[str, Any]],
    interpreters: Mapping[str, Path],
) -> list[dict[str, Any]]:
    """Trains with each optimizer, epoch by epoch in turns; returns their results.

    Args:
      task: what to train on.
      names: keys of `CONTESTANTS`.
      epochs: into how many parts the task's steps are cut.
      settings: by name; a contestant's defaults where there are none.
      interpreters: of the peers' environments, by script.
    """
    steps = len(task.order)
    with Progress() as progress, ExitStack() as stack:
        runs = []
        for name in names:
            compiling = progress.add_task(f"{name}: compiling", total=None)
            try:
                started = start(name, task, settings.get(name), interpreters)
                runs.append(Run(name, stack.enter_context(started)))
            except Exception as error:
                message = f"{type(error).__name__}: {error}"
                runs.append(Run(name, None, error=message))
            progress.remove_task(compiling)
        bars = {n: progress.add_task(n, total=epochs) for n in names}
        for run in runs:
            run.advance(0, 0)
        for epoch in range(1, epochs + 1):
            for run in runs:
                loss = run.advance(steps // epochs, epoch)
                text = f"{run.name:<11} loss {loss:8.2f}"
                progress.update(bars[run.name], advance=1, description=text)
        return [run.result() for run in runs]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.autoencoder",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add_task_arguments(parser)
    add(
        "--optimizers",
        nargs="+",
        choices=CONTESTANTS,
        default=["adam", "locoprop_m", "locoprop"],
        help="the optimizers to compare",
    )
    add("--epochs", type=int, default=10, help="passes over the training images")
    add("--seeds", nargs="+", type=int, default=[0], help="of weights and batches")
    add("--resume", action="store_true", help="keep and skip what was written before")
    add("--settings", type=Path, help="what `benchmarks.tune` found; else defaults")
    return parser


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """What says on what and in which environments to train."""
    add = parser.add_argument
    add("--data", choices=datasets.NAMES, default="curves", help="the images")
    add("--data-dir", type=Path, help="the folder with IDX files, plain or gzip")
    add("--train-size", type=int, help="how many training images; all if not given")
    add("--network", choices=NETWORKS, default="paper", help="the hidden layers")
    add("--transfer", choices=TRANSFERS, default="tanh", help="between the layers")
    add("--width", type=float, default=1.0, help="multiplies the hidden widths")
    add("--batch-size", type=int, default=1000, help="images a step")
    add(
        "--peer",
        type=lambda text: tuple(text.split("=", 1)),
        action="append",
        default=[],
        metavar="SCRIPT=PYTHON",
        help="a script of benchmarks/peers and its interpreter",
    )
    add("--output", type=Path, default=Path("out"), help="the folder for results")


def model_of(options: argparse.Namespace) -> Autoencoder:
    """The network that the command line names."""
    hidden = tuple(max(1, round(w * options.width)) for w in NETWORKS[options.network])
    return Autoencoder(hidden, transfer=options.transfer)


def interpreters_of(options: argparse.Namespace) -> dict[str, Path]:
    """The interpreters of the peers, by script."""
    return {script: Path(python) for script, python in options.peer}


def stem_of(options: argparse.Namespace, prefix: str) -> Path:
    """Where results go, without a suffix."""
    parts = [prefix, options.data]
    parts += [options.network] * (options.network != "paper")
    parts += [options.transfer] * (options.transfer != "tanh")
    options.output.mkdir(parents=True, exist_ok=True)
    return options.output / "_".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, writes the results, and shows a table and a picture of them."""
    options = parser().parse_args(arguments)
    made = provenance()
    images = datasets.load(options.data, options.data_dir, options.train_size)
    model = model_of(options)
    tuned = json.loads(options.settings.read_text()) if options.settings else {}
    chosen = {name: found["settings"] for name, found in tuned.items()}
    common = {
        "data": options.data,
        "train_images": len(images.train),
        "test_images": len(images.test),
        "hidden": list(model.hidden),
        "transfer": model.transfer,
        "epochs": options.epochs,
        "batch_size": options.batch_size,
    }
    path = stem_of(options, "autoencoder").with_suffix(".jsonl")
    results = report.read_results(path) if options.resume and path.exists() else []
    for seed in options.seeds:
        done = {r["optimizer"] for r in results if r["settings"]["seed"] == seed}
        steps = options.epochs * (len(images.train) // options.batch_size)
        task = make_task(
            model, images, steps=steps, batch_size=options.batch_size, seed=seed
        )
        found = train(
            task,
            [name for name in options.optimizers if name not in done],
            epochs=options.epochs,
            settings=chosen,
            interpreters=interpreters_of(options),
        )
        for result in found:
            tuned_to = chosen.get(result["optimizer"], {})
            settings = {**common, "seed": seed, "tuned": tuned_to}
            results.append({**result, "settings": settings, "made": made})
        report.write_results(results, path)
    report.print_table(results)
    report.plot_curves(results, path.with_suffix(".png"))
    print(f"Results: {path}\nPicture: {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
