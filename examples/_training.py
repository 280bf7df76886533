"""What the example scripts share: options, data, the training loop and the table."""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import datasets

HELD_OUT_ROWS = 1000


class Data(NamedTuple):
    """Arrays whose first axes count the same examples, to train on and held out."""

    train: tuple[np.ndarray, ...]
    held_out: tuple[np.ndarray, ...]


class Outcome(NamedTuple):
    """How one optimizer's training went.

    Attributes:
      first: each training loss in the first step, before any update.
      last: each training loss, averaged over the last tenth of the steps.
      held_out: each loss on held-out examples, after the last step.
      seconds: the median time of a step.
    """

    first: dict[str, float]
    last: dict[str, float]
    held_out: dict[str, float]
    seconds: float


def parse(
    description: str | None,
    arguments: Sequence[str] | None,
    *,
    steps: int,
    batch_size: int,
    width: int,
) -> argparse.Namespace:
    """Reads the command line, which is the same for all scripts.

    Args:
      description: what the script does.
      arguments: the command line; None for the one that the script was called with.
      steps: the default number of steps.
      batch_size: the default number of examples a step.
      width: the default width of the model.

    Returns:
      The options: `steps`, `batch_size`, `width` and `data_dir`.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=steps, help=f"steps of training ({steps})")
    add("--data-dir", type=Path, help="the folder with the data; none: a stand-in")
    add("--batch-size", type=int, default=batch_size, help=f"({batch_size})")
    add("--width", type=int, default=width, help=f"of the model's layers ({width})")
    return parser.parse_args(arguments)


def warm_up_and_decay(peak: float, steps: int) -> optax.Schedule:
    """Rises over a twentieth of the steps, then falls to zero along a cosine."""
    warm_up = max(1, steps // 20)
    return optax.warmup_cosine_decay_schedule(0.1 * peak, peak, warm_up, steps)


@cache
def labeled_images(data_dir: Path | None) -> Data:
    """MNIST from a folder of IDX files, or generated curves, with 10 classes.

    Args:
      data_dir: the folder; None for curves, whose classes are the deciles of
        brightness.

    Returns:
      Images of shape (n, 28, 28, 1) with values in [0, 1], and labels.
    """
    if data_dir is None:
        images = datasets.curves(jax.random.key(0), 3000)
        brightness = images.mean(axis=1)
        edges = np.quantile(brightness, np.linspace(0.1, 0.9, 9))
        pixels = images.reshape(-1, 28, 28, 1)
        labels = np.digitize(brightness, edges)
        return Data((pixels[:2000], labels[:2000]), (pixels[2000:], labels[2000:]))
    parts = zip(datasets.load("mnist", data_dir), ("train", "t10k"), strict=True)
    return Data(
        *(
            (images.reshape(-1, 28, 28, 1), _labels(data_dir, name))
            for images, name in parts
        )
    )


def images(data_dir: Path | None) -> Data:
    """The images of `labeled_images` alone."""
    data = labeled_images(data_dir)
    return Data(data.train[:1], data.held_out[:1])


def text(data_dir: Path | None, length: int) -> tuple[Data, int]:
    """The characters of `input.txt`, or of generated sums, in windows.

    Args:
      data_dir: the folder of `input.txt`; None for sums such as "12+7=19;".
      length: how many characters a window holds.

    Returns:
      The windows, integers of shape (n, length), of which the last tenth of the text
      is held out; and the number of different characters.
    """
    if data_dir is None:
        pairs = np.random.default_rng(0).integers(100, size=(8000, 2))
        characters = "".join(f"{a}+{b}={a + b};" for a, b in pairs)
    else:
        characters = (data_dir / "input.txt").read_text()
    alphabet, codes = np.unique(list(characters), return_inverse=True)
    split = len(codes) * 9 // 10
    windows = [
        np.lib.stride_tricks.sliding_window_view(part.astype(np.int32), length)
        for part in (codes[:split], codes[split:])
    ]
    return Data((windows[0],), (windows[1],)), len(alphabet)


def compare(
    states: dict[str, Any],
    train_step: Callable[..., tuple[Any, dict[str, jax.Array]]],
    evaluate: Callable[..., dict[str, jax.Array]],
    data: Data,
    options: argparse.Namespace,
) -> dict[str, Outcome]:
    """Trains from each state on the same batches, and prints a table of the losses.

    The states take turns, so that their times are measured under the same conditions.

    Args:
      states: by the optimizer's name, what `train_step` starts from.
      train_step: from (state, *batch) to (new state, losses by name).
      evaluate: from (state, *batch) to losses by name.
      data: what the batches are drawn from.
      options: the options of `parse`.

    Returns:
      The outcomes by the optimizer's name.
    """
    states = dict(states)
    losses: dict[str, list[dict[str, float]]] = {name: [] for name in states}
    seconds: dict[str, list[float]] = {name: [] for name in states}
    with Progress() as progress:
        bars = {name: progress.add_task(name, total=options.steps) for name in states}
        for batch in _batches(data.train, options.batch_size, options.steps):
            for name, state in states.items():
                began = time.perf_counter()
                states[name], found = train_step(state, *batch)
                losses[name].append(jax.tree.map(float, found))
                seconds[name].append(time.perf_counter() - began)
                shown = ", ".join(f"{k} {v:.4f}" for k, v in losses[name][-1].items())
                progress.update(bars[name], advance=1, description=f"{name}: {shown}")
    rows = np.linspace(0, len(data.held_out[0]) - 1, HELD_OUT_ROWS).astype(int)
    held_out = [jnp.asarray(part[rows]) for part in data.held_out]
    outcomes = {
        name: Outcome(
            first=losses[name][0],
            last=_mean(losses[name][-max(1, options.steps // 10) :]),
            held_out=_mean([evaluate(state, *held_out)]),
            seconds=float(np.median(seconds[name])),
        )
        for name, state in states.items()
    }
    _print_table(outcomes)
    return outcomes


def _labels(folder: Path, part: str) -> np.ndarray:
    name = f"{part}-labels-idx1-ubyte"
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.exists()), None)
    if path is None:
        raise ValueError(f"{folder}: neither {name} nor {name}.gz is there.")
    return datasets.read_idx(path).astype(np.int32)


def _batches(
    arrays: Sequence[np.ndarray], size: int, steps: int
) -> Iterator[tuple[jax.Array, ...]]:
    """Examples drawn at random, with replacement, from a fixed seed."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        rows = rng.integers(len(arrays[0]), size=size)
        yield tuple(jnp.asarray(array[rows]) for array in arrays)


def _mean(losses: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {k: float(np.mean([step[k] for step in losses])) for k in losses[0]}


def _print_table(outcomes: dict[str, Outcome]) -> None:
    table = Table(title="after the last step")
    table.add_column("optimizer")
    for name in next(iter(outcomes.values())).last:
        table.add_column(f"training {name}", justify="right")
        table.add_column(f"held-out {name}", justify="right")
    table.add_column("ms / step", justify="right")
    for optimizer, outcome in outcomes.items():
        cells = [
            f"{part[name]:.4f}"
            for name in outcome.last
            for part in (outcome.last, outcome.held_out)
        ]
        table.add_row(optimizer, *cells, f"{1000 * outcome.seconds:.0f}")
    Console().print(table)
