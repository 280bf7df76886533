"""The deep autoencoder of the LocoProp paper, trained by several optimizers.

All start from the same weights, see the same batches in the same order, and take turns
epoch by epoch, so that their times are measured under the same conditions. Peers take
part from environments of their own: `--peer SCRIPT=PYTHON` names a script of
`benchmarks/peers` and its interpreter. One that fails is listed with its error.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import comparison, datasets
from benchmarks.contestants import CONTESTANTS, MIXED
from benchmarks.networks import (
    NETWORKS,
    TRANSFERS,
    Autoencoder,
    sigmoid_cross_entropy,
)
from benchmarks.problem import Examples, Problem


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The images and the network."""
    add = parser.add_argument
    add("--data", choices=datasets.NAMES, default="curves", help="the images")
    add("--data-dir", type=Path, help="the folder with IDX files, plain or gzip")
    add("--train-size", type=int, help="how many training images; all if not given")
    add("--network", choices=NETWORKS, default="paper", help="the hidden layers")
    add("--transfer", choices=TRANSFERS, default="tanh", help="between the layers")
    add("--width", type=float, default=1.0, help="multiplies the hidden widths")


def problem_of(images: datasets.Images, model: Autoencoder) -> Problem:
    """Images are to be reproduced."""
    train, test = (Examples(part, part) for part in images)
    return Problem(model, sigmoid_cross_entropy, train, test, len(images.train))


def model_of(options: argparse.Namespace) -> Autoencoder:
    """The network that the command line names."""
    hidden = tuple(max(1, round(w * options.width)) for w in NETWORKS[options.network])
    return Autoencoder(hidden, transfer=options.transfer)


def load(options: argparse.Namespace) -> Problem:
    """The images and the network that the command line names."""
    images = datasets.load(options.data, options.data_dir, options.train_size)
    return problem_of(images, model_of(options))


def settings_of(options: argparse.Namespace, problem: Problem) -> dict[str, Any]:
    """What is trained on what."""
    return {
        "model": "deep autoencoder",
        "data": options.data,
        "hidden": list(problem.model.hidden),
        "transfer": problem.model.transfer,
        "epochs": options.rounds,
    }


def stem_of(options: argparse.Namespace) -> str:
    """What tells the files of this problem from those of others."""
    parts = ["autoencoder", options.data]
    parts += [options.network] * (options.network != "paper")
    parts += [options.transfer] * (options.transfer != "tanh")
    return "_".join(parts)


BENCHMARK = comparison.Benchmark(
    name="autoencoder",
    description=__doc__,
    optimizers=tuple(name for name in CONTESTANTS if name not in MIXED),
    default=("adam", "locoprop_m", "locoprop"),
    batch_size=1000,
    add_arguments=add_arguments,
    problem=load,
    settings=settings_of,
    stem=stem_of,
    round_steps=lambda options, problem: (
        len(problem.train.inputs) // options.batch_size
    ),
)
main = partial(comparison.main, BENCHMARK)

if __name__ == "__main__":
    main()
