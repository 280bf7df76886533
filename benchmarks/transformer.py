"""A decoder-only character transformer on a text, trained by several optimizers.

Three blocks of width 128 with four heads, context 64, gelu; a tenth of the text, its
end, is held out. All start from the same weights, see the same batches in the same
order, and take turns, so that their times are measured under the same conditions.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import comparison
from benchmarks.networks import Transformer, softmax_cross_entropy
from benchmarks.problem import Examples, Problem

MEASURED = 1024


def windows(text: np.ndarray, context: int) -> Examples:
    """Characters, and those that follow each, in windows that do not overlap."""
    count = (len(text) - 1) // context
    inputs, targets = (text[i : i + count * context] for i in (0, 1))
    return Examples(inputs.reshape(count, -1), targets.reshape(count, -1))


def load(options: argparse.Namespace) -> Problem:
    """The text in the folder that the command line names."""
    path = options.data_dir / "input.txt"
    if not path.exists():
        raise ValueError(f"{path} is not there. Put the text there, as plain UTF-8.")
    known, text = np.unique(list(path.read_text("utf-8")), return_inverse=True)
    train, test = np.split(text.astype(np.int32), [round(0.9 * len(text))])
    return Problem(
        Transformer(len(known), options.width, options.blocks),
        softmax_cross_entropy,
        windows(train, options.context),
        Examples(*(part[:MEASURED] for part in windows(test, options.context))),
        MEASURED,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The text and the model."""
    add = parser.add_argument
    add("--data-dir", type=Path, required=True, help="the folder with input.txt")
    add("--context", type=int, default=64, help="characters seen at once")
    add("--width", type=int, default=128, help="of the vectors")
    add("--blocks", type=int, default=3, help="how many follow each other")


def settings_of(options: argparse.Namespace, problem: Problem) -> dict[str, Any]:
    """What is trained on what."""
    return {
        "model": f"transformer, {options.blocks} blocks of width {options.width}",
        "data": "a text",
        "examples": f"windows of {options.context} characters",
    }


BENCHMARK = comparison.every_few_steps(
    "transformer",
    __doc__,
    batch_size=32,
    add_arguments=add_arguments,
    problem=load,
    settings=settings_of,
)
main = partial(comparison.main, BENCHMARK)

if __name__ == "__main__":
    main()
