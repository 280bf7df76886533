"""What every peer does: announce itself, then answer each line of its input.

A peer runs in an environment of its own. It reads a file of arrays, `kernel_i` and
`bias_i` of each layer, `transfer`, the name of what lies between them, `train` and
`test` images, and `order`, the rows of `train` in each batch. It takes a few steps, so
that what is compiled is compiled, and begins anew. Then it writes one line of JSON for
itself and one for each line it reads:

- `{"steps": 3}` trains the next three batches: `seconds` and `losses` of each, the
  losses those before the step;
- `{"evaluate": true}` gives `train_loss` and `test_loss`, and `about`: the optimizer's
  state (`state_size`) and by how much the process's memory has grown at most
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


def layers_of(arrays: Mapping[str, np.ndarray]) -> tuple[int, int]:
    """The number of layers, and which of them is the code."""
    count = sum(name.startswith("kernel_") for name in arrays)
    return count, count // 2 - 1


def rate_at(step: int, total: int | None) -> float:
    """The share of the learning rate in a step: warm-up over 5 %, decay to zero."""
    if total is None:
        return 1.0
    warmup = max(1, round(0.05 * total))
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, 1 - (step - warmup) / max(1, total - warmup))


class Trainer(NamedTuple):
    """A peer's optimizer on its model, the weights inside.

    Attributes:
      step: trains on a batch of images; returns the loss before.
      loss: the mean loss of some images.
      state_size: the optimizer's state in multiples of the parameters.
    """

    step: Callable[[np.ndarray], float]
    loss: Callable[[np.ndarray], float]
    state_size: Callable[[], float]


WARM_UP = 6  # all that K-FAC does from time to time, it does every fifth step


def serve(
    make: Callable[[Mapping[str, np.ndarray], dict[str, Any]], Trainer],
    packages: Sequence[str],
) -> None:
    """Runs a peer from the command line.

    Args:
      make: from the arrays and the settings to the trainer. A second one takes over
        what the first has compiled.
      packages: whose versions are announced.
    """
    parser = argparse.ArgumentParser(description="A peer; see benchmarks/peers.")
    parser.add_argument("--input", type=Path, required=True, help="the arrays (npz)")
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON")
    options = parser.parse_args()
    with np.load(options.input) as file:
        arrays = dict(file)
    parameters = sum(
        leaf.nbytes for name, leaf in arrays.items() if name[:4] in ("kern", "bias")
    )
    before = peak_memory()
    compile_seconds = warm_up(make(arrays, options.settings), arrays)
    trainer = make(arrays, options.settings)
    versions = {name: version(name) for name in (*packages, "numpy")}
    answer({"versions": {"python": platform.python_version(), **versions}})
    batches = iter(arrays["order"])
    for line in sys.stdin:
        asked = json.loads(line)
        if "steps" in asked:
            seconds, losses = [], []
            for _, rows in zip(range(asked["steps"]), batches, strict=False):
                images = arrays["train"][rows]
                began = time.perf_counter()
                losses.append(trainer.step(images))
                seconds.append(time.perf_counter() - began)
            answer({"seconds": seconds, "losses": losses})
        else:
            losses = {
                f"{part}_loss": mean_loss(trainer, arrays[part])
                for part in ("train", "test")
            }
            about = {
                "state_size": trainer.state_size(),
                "peak_size": (peak_memory() - before) / parameters,
                "compile_seconds": compile_seconds,
            }
            answer({**losses, "about": about})


def warm_up(trainer: Trainer, arrays: Mapping[str, np.ndarray]) -> float:
    """Takes a few steps; returns how many seconds more than others the slow ones took.

    The fastest step tells what a step takes once all is compiled.
    """
    images, seconds = arrays["train"][arrays["order"][0]], []
    for _ in range(WARM_UP):
        began = time.perf_counter()
        trainer.step(images)
        seconds.append(time.perf_counter() - began)
    return sum(seconds) - WARM_UP * min(seconds)


def peak_memory() -> int:
    """The most memory that this process has held, in bytes; as Linux tells it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def mean_loss(trainer: Trainer, images: np.ndarray) -> float:
    """The mean loss over any number of images, in batches."""
    parts = [images[i : i + 1000] for i in range(0, len(images), 1000)]
    losses = [trainer.loss(part) for part in parts]
    return float(np.average(losses, weights=[len(part) for part in parts]))


def answer(line: dict[str, Any]) -> None:
    """Writes one line of JSON, at once."""
    print(json.dumps(line), flush=True)
