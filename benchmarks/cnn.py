"""A small residual network on the digits of MNIST, trained by several optimizers.

Convolutions of 3 × 3 in two stages of two blocks each, 16 and 32 channels, group norms,
relu. All start from the same weights, see the same batches in the same order, and take
turns, so that their times are measured under the same conditions.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks import comparison, datasets
from benchmarks.training import Examples, Problem
from benchmarks.transformer import cross_entropy


class Block(nn.Module):
    """Two convolutions, added to their input.

    Attributes:
      channels: of the output.
      stride: of the first convolution.
    """

    channels: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """From an image to another."""
        conv = partial(nn.Conv, self.channels, (3, 3), use_bias=False)
        norm = partial(nn.GroupNorm, num_groups=8)
        y = conv(strides=self.stride)(nn.relu(norm()(x)))
        y = conv()(nn.relu(norm()(y)))
        if x.shape != y.shape:
            x = nn.Conv(self.channels, (1, 1), self.stride, use_bias=False)(x)
        return x + y


class ResidualNetwork(nn.Module):
    """From images to the logits of their classes.

    Attributes:
      channels: of the first stage; the second has twice as many.
      classes: how many there are.
    """

    channels: int = 16
    classes: int = 10

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """From rows of pixels."""
        x = images.reshape(-1, 28, 28, 1)
        x = nn.Conv(self.channels, (3, 3), use_bias=False)(x)
        for channels, stride in ((1, 1), (1, 1), (2, 2), (2, 1)):
            x = Block(channels * self.channels, stride)(x)
        x = nn.relu(nn.GroupNorm(num_groups=8)(x))
        return nn.Dense(self.classes)(jnp.mean(x, axis=(1, 2)))


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
        cross_entropy,
        train,
        test,
        len(test.inputs),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The images and the model."""
    add = parser.add_argument
    add("--data-dir", type=Path, required=True, help="the folder with IDX files")
    add("--train-size", type=int, help="how many training images; all if not given")
    add("--channels", type=int, default=16, help="of the first stage")


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
