"""Local solves with products in bfloat16 beside float32: loss on the autoencoder.

A CPU computes `precision="BF16_BF16_F32"` in float32. Here such a product first rounds
what enters it to bfloat16, as an accelerator does, and sums in float32.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax._src.interpreters import mlir
from jax.extend.core.primitives import dot_general_p
from rich.console import Console
from rich.table import Table

import locoprop_optax as loco
from benchmarks import autoencoder, comparison, report
from benchmarks.contestants import (
    CONTESTANTS,
    INTERMEDIATES,
    Contestant,
    warmup_then_linear,
)
from benchmarks.problem import make_task
from benchmarks.provenance import provenance

BFLOAT16 = "BF16_BF16_F32"
MAKERS = {
    "locoprop": (loco.locoprop, 1.0),
    "locoprop_m": (loco.locoprop_m, 1e-5),
}


def round_on_cpu() -> None:
    """Makes products in bfloat16 round on this process's CPU, too, for good."""
    if jax.default_backend() != "cpu":
        return
    usual = mlir._platform_specific_lowerings["cpu"][dot_general_p].rule

    def rounded(x, y, **how):
        short = (jax.lax.reduce_precision(a, 8, 7) for a in (x, y))
        return dot_general_p.bind(*short, **how)

    def lower(context, x, y, **how):
        if how["precision"] != jax.lax.DotAlgorithmPreset.BF16_BF16_F32:
            return usual(context, x, y, **how)
        how = how | {"precision": None}
        function = mlir.lower_fun(rounded, multiple_results=False)
        return function(context, x, y, **how)

    mlir.register_lowering(dot_general_p, lower, platform="cpu")


def train(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Each of `MAKERS` in both precisions, from the same weights and batches."""
    names = []
    for name, (make, rate) in MAKERS.items():
        for precision in (None, BFLOAT16):
            key = f"{name}, bfloat16" if precision else f"{name}, float32"
            CONTESTANTS[key] = Contestant(
                key,
                lambda n, layers, make=make, rate=rate, precision=precision: make(
                    layers, warmup_then_linear(rate, n), precision=precision
                ),
                space={},
                needs=INTERMEDIATES,
            )
            names.append(key)
    problem, size = autoencoder.load(options), options.batch_size
    count = len(problem.train.inputs)
    steps = options.rounds * (count // size)
    task = make_task(problem, steps=steps, batch_size=size, seed=0)
    settings = {
        **autoencoder.settings_of(options, problem),
        "train_images": count,
        "batch_size": size,
    }
    made = provenance()
    results = comparison.train(
        task, names, rounds=options.rounds, settings={}, interpreters={}
    )
    return [{**result, "settings": settings, "made": made} for result in results]


def rows(results: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Epoch, and for each optimizer bfloat16's training loss over float32's."""
    curves = {r["optimizer"]: [p["train_loss"] for p in r["curve"]] for r in results}
    names = dict.fromkeys(name.split(",")[0] for name in curves)

    def ratio(name, epoch):
        return curves[f"{name}, bfloat16"][epoch] / curves[f"{name}, float32"][epoch]

    return [
        (str(epoch), *(f"{ratio(name, epoch):.4f}" for name in names))
        for epoch in range(1, results[0]["settings"]["epochs"] + 1)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, writes the results, and shows a table and a picture of them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.precision",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    autoencoder.add_arguments(parser)
    add = parser.add_argument
    add("--batch-size", type=int, default=1000, help="images a step")
    add("--epochs", dest="rounds", type=int, default=10, help="passes over the images")
    add("--output", type=Path, default=Path("out"), help="the folder for results")
    parser.set_defaults(train_size=20_000)
    options = parser.parse_args(arguments)
    round_on_cpu()
    results = train(options)
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / "precision"
    report.write_results(results, stem.with_suffix(".jsonl"))
    table = Table("epoch", *MAKERS, title="training loss, bfloat16 over float32")
    for row in rows(results):
        table.add_row(*row)
    Console().print(table)
    report.plot_curves(results, stem.with_suffix(".png"))


if __name__ == "__main__":
    main()
