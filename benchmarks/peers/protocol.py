"""What every peer does: announce itself, then answer each line of its input.

A peer runs in an environment of its own. It reads a file of arrays: the parameters,
such as `params/Dense_0/kernel`; `model`, a description of the model in JSON;
`train_inputs`, `train_targets`, and the same of `test`; `order`, the rows of the
training examples in each batch; and `measured`, on how many of those, the first, the
loss is measured. It takes a few steps, so that what is compiled is compiled, and begins
anew. Then it writes one line of JSON for itself and one for each line it reads:

- `{"steps": 3}` trains the next three batches: `seconds` and `losses` of each, the
  losses those before the step;
- `{"evaluate": true}` gives `train_loss` and `test_loss`, and `about`: the optimizer's
  state (`state_size`) and by how much the memory in use has grown at most
  (`peak_size`), in multiples of the parameters, and `compile_seconds`, by how much
  longer the first steps took.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


def rate_at(step: int, total: int | None) -> float:
    """The share of the learning rate in a step: warm-up over 5 %, decay to zero."""
    if total is None:
        return 1.0
    warmup = max(1, round(0.05 * total))
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, 1 - (step - warmup) / max(1, total - warmup))


Arrays = Mapping[str, np.ndarray]


class Examples(NamedTuple):
    """Inputs and targets, one example a row."""

    inputs: np.ndarray
    targets: np.ndarray

    def at(self, rows: Any) -> "Examples":
        """Some of them."""
        return Examples(self.inputs[rows], self.targets[rows])


def examples(arrays: Arrays, part: str) -> Examples:
    """Those of "train" or "test"."""
    return Examples(arrays[f"{part}_inputs"], arrays[f"{part}_targets"])


class Trainer(NamedTuple):
    """A peer's optimizer on its model, the weights inside.

    Attributes:
      place: brings examples to the model's device; no part of a step's time.
      step: trains on a batch that was placed; returns the loss before.
      loss: the mean loss of a batch that was placed.
      state_size: the optimizer's state in multiples of the parameters.
    """

    place: Callable[[Examples], Any]
    step: Callable[[Any], float]
    loss: Callable[[Any], float]
    state_size: Callable[[], float]


def process_memory() -> int:
    """The most memory that this process has held, in bytes; as Linux tells it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


WARM_UP = 6  # all that K-FAC does from time to time, it does every fifth step


def serve(
    make: Callable[[Arrays, dict[str, Any]], Trainer],
    packages: Sequence[str],
    peak_memory: Callable[[], int] = process_memory,
) -> None:
    """Runs a peer from the command line.

    Args:
      make: from the arrays and the settings to the trainer. A second one takes over
        what the first has compiled.
      packages: whose versions are announced.
      peak_memory: the most that was held where the model is, in bytes.
    """
    parser = argparse.ArgumentParser(description="A peer; see benchmarks/peers.")
    parser.add_argument("--input", type=Path, required=True, help="the arrays (npz)")
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON")
    options = parser.parse_args()
    with np.load(options.input) as file:
        arrays = dict(file)
    parameters = sum(a.nbytes for n, a in arrays.items() if n.startswith("params/"))
    train, test = (examples(arrays, part) for part in ("train", "test"))
    measured = {"train": train.at(slice(arrays["measured"])), "test": test}
    before = peak_memory()
    first = train.at(arrays["order"][0])
    compile_seconds = warm_up(make(arrays, options.settings), first)
    trainer = make(arrays, options.settings)
    versions = {name: version(name) for name in (*packages, "numpy")}
    answer({"versions": {"python": platform.python_version(), **versions}})
    batches = iter(arrays["order"])
    for line in sys.stdin:
        asked = json.loads(line)
        if "steps" in asked:
            seconds, losses = [], []
            for _, rows in zip(range(asked["steps"]), batches, strict=False):
                batch = trainer.place(train.at(rows))
                began = time.perf_counter()
                losses.append(trainer.step(batch))
                seconds.append(time.perf_counter() - began)
            answer({"seconds": seconds, "losses": losses})
        else:
            size = len(arrays["order"][0])
            losses = {
                f"{name}_loss": mean_loss(trainer, part, size)
                for name, part in measured.items()
            }
            about = {
                "state_size": trainer.state_size(),
                "peak_size": (peak_memory() - before) / parameters,
                "compile_seconds": compile_seconds,
            }
            answer({**losses, "about": about})


def warm_up(trainer: Trainer, batch: Examples) -> float:
    """Takes a few steps; returns how many seconds more than others the slow ones took.

    The fastest step tells what a step takes once all is compiled.
    """
    seconds, placed = [], trainer.place(batch)
    for _ in range(WARM_UP):
        began = time.perf_counter()
        trainer.step(placed)
        seconds.append(time.perf_counter() - began)
    return sum(seconds) - WARM_UP * min(seconds)


def mean_loss(trainer: Trainer, part: Examples, size: int) -> float:
    """The mean loss over any number of examples, in batches of a size."""
    starts = range(0, len(part.inputs), size)
    batches = [part.at(slice(i, i + size)) for i in starts]
    losses = [trainer.loss(trainer.place(batch)) for batch in batches]
    return float(np.average(losses, weights=[len(batch.inputs) for batch in batches]))


def answer(line: dict[str, Any]) -> None:
    """Writes one line of JSON, at once."""
    print(json.dumps(line), flush=True)
