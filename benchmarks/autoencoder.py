"""The deep autoencoder of the LocoProp paper, trained by several optimizers.

All start from the same weights, see the same batches in the same order, and take
turns epoch by epoch, so that their times are measured under the same conditions.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import Progress

import locoprop_optax as loco
from benchmarks import datasets, report
from benchmarks.contestants import CONTESTANTS
from benchmarks.provenance import provenance

HIDDEN = (1000, 500, 250, 30, 250, 500, 1000)


class Autoencoder(nn.Module):
    """Dense layers with tanh between them, but for a linear code layer.

    Attributes:
      hidden: the widths of the hidden layers, the middle one the code.
      pixels: the width of input and output.
    """

    hidden: Sequence[int] = HIDDEN
    pixels: int = 784

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """From pixels to the logits of their reconstruction."""
        code = len(self.hidden) // 2
        for i, width in enumerate((*self.hidden, self.pixels)):
            x = nn.Dense(width, kernel_init=nn.initializers.glorot_uniform())(x)
            if i not in (code, len(self.hidden)):
                x = nn.tanh(x)
        return x


def reconstruction_loss(model: nn.Module, params: Any, images: jax.Array) -> jax.Array:
    """Sigmoid cross-entropy, summed over pixels and averaged over images."""
    logits = model.apply({"params": params}, images)
    losses = optax.sigmoid_binary_cross_entropy(logits, images)
    return jnp.mean(jnp.sum(losses, axis=-1))


@dataclass
class Run:
    """One optimizer's training, its compiled step and its curve so far."""

    name: str
    step: Any
    params: Any
    opt_state: Any
    compile_seconds: float
    seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)


def start(
    name: str, model: nn.Module, params: Any, batch: jax.Array, total_steps: int
) -> Run:
    """Makes the optimizer and compiles its step."""
    tx = CONTESTANTS[name].make(total_steps)
    needs_intermediates = name.startswith("locoprop")

    def loss_fn(params, images):
        return reconstruction_loss(model, params, images)

    def step(params, opt_state, images):
        if needs_intermediates:
            loss, grads, intermediates = loco.linen.value_and_grad(loss_fn)(
                params, images
            )
            updates, opt_state = tx.update(
                grads, opt_state, params, intermediates=intermediates
            )
        else:
            loss, grads = jax.value_and_grad(loss_fn)(params, images)
            updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state = tx.init(params)
    began = time.perf_counter()
    jitted = jax.jit(step, donate_argnums=(0, 1))
    compiled = jitted.lower(params, opt_state, batch).compile()
    own_params = jax.tree.map(jnp.copy, params)
    return Run(name, compiled, own_params, opt_state, time.perf_counter() - began)


def train(
    model: nn.Module,
    images: datasets.Images,
    names: Sequence[str],
    *,
    epochs: int,
    batch_size: int,
    seed: int,
) -> list[Run]:
    """Trains with each optimizer, epoch by epoch in turns, showing progress.

    Raises:
      ValueError: if there are fewer images than one batch holds.
    """
    batches = len(images.train) // batch_size
    if batches < 1:
        raise ValueError(f"{len(images.train)} images make no batch of {batch_size}.")
    train_images, test_images = jnp.asarray(images.train), jnp.asarray(images.test)
    params = model.init(jax.random.key(seed), train_images[:1])["params"]
    rng = np.random.default_rng(seed)
    evaluate = _evaluator(model, batch_size)
    with Progress() as progress:
        runs = []
        for name in names:
            compiling = progress.add_task(f"{name}: compiling", total=None)
            first = train_images[:batch_size]
            runs.append(start(name, model, params, first, epochs * batches))
            progress.remove_task(compiling)
        bars = {n: progress.add_task(n, total=epochs * batches) for n in names}
        for run in runs:
            _record(run, 0, evaluate, train_images, test_images)
        for epoch in range(1, epochs + 1):
            order = rng.permutation(len(images.train))[: batches * batch_size]
            for run in runs:
                for rows in order.reshape(batches, batch_size):
                    batch = jax.block_until_ready(train_images[rows])
                    began = time.perf_counter()
                    run.params, run.opt_state, loss = jax.block_until_ready(
                        run.step(run.params, run.opt_state, batch)
                    )
                    run.step_seconds.append(time.perf_counter() - began)
                    text = f"{run.name:<11} loss {loss:8.2f}"
                    progress.update(bars[run.name], advance=1, description=text)
                run.seconds = sum(run.step_seconds)
                _record(run, epoch, evaluate, train_images, test_images)
    return runs


def _evaluator(model: nn.Module, batch_size: int) -> Any:
    """The mean loss over any number of images, in batches."""
    loss = jax.jit(lambda params, images: reconstruction_loss(model, params, images))

    def evaluate(params, images):
        parts = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
        losses = [float(loss(params, part)) for part in parts]
        return float(np.average(losses, weights=[len(part) for part in parts]))

    return evaluate


def _record(run: Run, epoch: int, evaluate: Any, train: Any, test: Any) -> None:
    run.curve.append(
        {
            "epoch": epoch,
            "steps": len(run.step_seconds),
            "seconds": round(run.seconds, 3),
            "train_loss": evaluate(run.params, train),
            "test_loss": evaluate(run.params, test),
        }
    )


def results_of(
    runs: Sequence[Run], settings: dict[str, Any], made: dict[str, Any]
) -> list[dict[str, Any]]:
    """One dictionary a run with every figure and how it was made."""
    return [
        {
            "optimizer": run.name,
            "settings": settings,
            "curve": run.curve,
            "median_step_seconds": float(np.median(run.step_seconds)),
            "compile_seconds": round(run.compile_seconds, 2),
            "made": made,
        }
        for run in runs
    ]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.autoencoder",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", choices=datasets.NAMES, default="curves", help="the images")
    add("--data-dir", type=Path, help="the folder with IDX files, plain or gzip")
    add("--train-size", type=int, help="how many training images; all if not given")
    add(
        "--optimizers",
        nargs="+",
        choices=CONTESTANTS,
        default=["adam", "locoprop_m", "locoprop"],
        help="the optimizers to compare",
    )
    add("--epochs", type=int, default=10, help="passes over the training images")
    add("--batch-size", type=int, default=1000, help="images a step")
    add("--width", type=float, default=1.0, help="multiplies the hidden widths")
    add("--seed", type=int, default=0, help="of the weights and the batches")
    add("--output", type=Path, default=Path("out"), help="the folder for results")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, writes the results, and shows a table and a picture of them."""
    options = parser().parse_args(arguments)
    made = provenance()
    images = datasets.load(options.data, options.data_dir, options.train_size)
    model = Autoencoder(tuple(round(w * options.width) for w in HIDDEN))
    settings = {
        "data": options.data,
        "train_images": len(images.train),
        "test_images": len(images.test),
        "hidden": list(model.hidden),
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "seed": options.seed,
    }
    runs = train(
        model,
        images,
        options.optimizers,
        epochs=options.epochs,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    results = results_of(runs, settings, made)
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / f"autoencoder_{options.data}"
    report.write_results(results, stem.with_suffix(".jsonl"))
    report.print_table(results)
    report.plot_curves(results, stem.with_suffix(".png"))
    print(f"Results: {stem}.jsonl\nPicture: {stem}.png")


if __name__ == "__main__":
    main()
