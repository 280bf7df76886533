"""Tunes every contestant of a benchmark alike, with optuna.

Each gets the same number of trials and of steps, over the space that
`benchmarks.contestants` gives it, where the first trial stands, too; the second is what
was chosen before, with trials of another length. The training loss at the end decides;
a trial that is behind the median of the earlier ones at half of its steps, or at three
quarters, ends there. Trials are kept in an SQLite file, so that the same command
resumes after a kill, and commands with different optimizers may run side by side.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optuna
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import autoencoder, cnn, transformer
from benchmarks.comparison import add_arguments, interpreters_of
from benchmarks.contestants import CONTESTANTS, Choice, Space
from benchmarks.problem import Task, make_task
from benchmarks.provenance import provenance
from benchmarks.training import start

BENCHMARKS = {b.name: b for b in (m.BENCHMARK for m in (autoencoder, cnn, transformer))}


def draw(trial: optuna.Trial, space: Space) -> dict[str, Any]:
    """One setting of each number in a space."""
    drawn = {}
    for name, range_ in space.items():
        if isinstance(range_, Choice):
            drawn[name] = trial.suggest_categorical(name, range_.values)
        else:
            low, high, _ = range_
            drawn[name] = trial.suggest_float(name, low, high, log=True)
    return drawn


def loss_after(
    name: str,
    task: Task,
    settings: dict[str, Any],
    interpreters: Any,
    trial: optuna.Trial,
) -> float:
    """The training loss at the end of a task; infinite if it is not finite.

    Raises:
      optuna.TrialPruned: if the loss in the middle is behind that of other trials.
    """
    with start(name, task, settings, interpreters) as trainer:
        parts = [part for part in np.array_split(task.order, 4) if len(part)]
        for done, part in enumerate(parts, 1):
            losses = trainer.train(len(part)).losses
            if not np.all(np.isfinite(losses)):
                return math.inf
            trial.report(float(np.mean(losses)), done)
            if done < len(parts) and trial.should_prune():
                raise optuna.TrialPruned
        loss = trainer.evaluate()["train_loss"]
    return loss if math.isfinite(loss) else math.inf


def read(path: Path) -> dict[str, Any]:
    """What was chosen before, and how; nothing where there is no such file."""
    return json.loads(path.read_text()) if path.exists() else {}


def main(arguments: Sequence[str] | None = None) -> None:
    """Tunes, and writes the best settings of each contestant."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parsers = parser.add_subparsers(dest="benchmark", required=True)
    for benchmark in BENCHMARKS.values():
        one = parsers.add_parser(
            benchmark.name, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        add_arguments(one, benchmark)
        one.set_defaults(optimizers=list(benchmark.optimizers))
        one.add_argument("--trials", type=int, default=12, help="of each optimizer")
        one.add_argument("--steps", type=int, default=60, help="of each trial")
    options = parser.parse_args(arguments)
    benchmark = BENCHMARKS[options.benchmark]
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    made = provenance()
    task = make_task(
        benchmark.problem(options),
        steps=options.steps,
        batch_size=options.batch_size,
        seed=1000,  # none of those that the benchmark reports
    )
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / f"tuned_{benchmark.stem(options)}"
    path = stem.with_suffix(".json")
    with Progress() as progress:
        for name in options.optimizers:
            study = optuna.create_study(
                storage=f"sqlite:///{stem.with_suffix('.sqlite')}",
                study_name=f"{name}, {options.steps} steps",
                pruner=optuna.pruners.MedianPruner(
                    n_startup_trials=3, n_warmup_steps=2
                ),
                load_if_exists=True,
            )
            study.sampler = optuna.samplers.TPESampler(
                n_startup_trials=4,
                seed=1000 * options.steps + len(study.trials),  # else draws come again
            )
            if not study.trials:
                study.enqueue_trial(CONTESTANTS[name].first())
                if before := read(path).get(name):
                    study.enqueue_trial(before["settings"], skip_if_exists=True)
            finished = [t for t in study.trials if t.state.is_finished()]
            left = max(0, options.trials - len(finished))
            bar = progress.add_task(name, total=options.trials, completed=len(finished))

            def objective(trial, name=name, bar=bar):
                settings = draw(trial, CONTESTANTS[name].space)
                try:
                    peers = interpreters_of(options)
                    return loss_after(name, task, settings, peers, trial)
                except (RuntimeError, ValueError) as error:
                    trial.set_user_attr("error", f"{type(error).__name__}: {error}")
                    return math.inf
                finally:
                    jax.clear_caches()
                    progress.update(bar, advance=1)

            study.optimize(objective, n_trials=left)
            errors = [t.user_attrs["error"] for t in study.trials if t.user_attrs]
            completed = study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
            failed = sum(not math.isfinite(trial.value) for trial in completed)
            chosen = read(path)  # which another command may have written
            chosen[name] = {
                "settings": study.best_params,
                "train_loss": study.best_value,
                "failed_trials": failed,
                **({"error": errors[-1]} if errors else {}),
                "trials": options.trials,
                "steps": options.steps,
                "made": made,
            }
            path.write_text(json.dumps(chosen, indent=1) + "\n")
    table = Table("optimizer", "training loss", "failed", "settings")
    for name, found in chosen.items():
        settings = ", ".join(f"{k} {v:.3g}" for k, v in found["settings"].items())
        loss, failed = f"{found['train_loss']:.2f}", str(found["failed_trials"])
        table.add_row(CONTESTANTS[name].label, loss, failed, settings)
    Console().print(table)
    print(f"Settings: {path}")


if __name__ == "__main__":
    main()
