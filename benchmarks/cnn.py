"""A small residual network on the digits of MNIST, trained by several optimizers.

Convolutions of 3 × 3 in two stages of two blocks each, 16 and 32 channels, group norms,
relu. All start from the same weights, see the same batches in the same order, and take
turns, so that their times are measured under the same conditions.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import comparison, datasets
from benchmarks.networks import ResidualNetwork, softmax_cross_entropy
from benchmarks.problem import Examples, Problem


def load(options: argparse.Namespace) -> Problem:
    """The images and the labels in the folder that the command line names."""
    images = datasets.load("mnist", options.data_dir, options.train_size)
    labels = datasets.read_labels(options.data_dir)
    train, test = (
        Examples(pixels, classes[: len(pixels)])
        for pixels, classes in zip(images, labels, strict=True)
    )
    return Problem(
        ResidualNetwork(options.channels),
        softmax_cross_entropy,
        train,
        test,
        len(test.inputs),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The images and the model."""
    add = parser.add_argument
    add("--data-dir", type=Path, required=True, help="the folder with IDX files")
    add("--train-size", type=int, help="how many training images; all if not given")
    add("--channels", type=int, default=16, help="of the first stage, a multiple of 8")


def settings_of(options: argparse.Namespace, problem: Problem) -> dict[str, Any]:
    """What is trained on what."""
    return {
        "model": f"residual network, {options.channels} channels",
        "data": "the classes of mnist",
    }


BENCHMARK = comparison.every_few_steps(
    "cnn",
    __doc__,
    batch_size=128,
    add_arguments=add_arguments,
    problem=load,
    settings=settings_of,
)
main = partial(comparison.main, BENCHMARK)

if __name__ == "__main__":
    main()
