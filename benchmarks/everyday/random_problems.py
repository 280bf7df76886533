"""Random small problems, with nothing set: does anything diverge?

A seed draws a network and what it is to learn: depth, width, transfer function, norm,
branches that start at zero, loss, size of the batch, and whether there is a penalty.
Each network is trained from several weights at once, with inputs of several scales,
labels of several qualities and penalties of several strengths.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from rich.progress import track

import locoprop_optax as loco
from benchmarks.provenance import provenance
from benchmarks.report import markdown_table

ROWS, STEPS, DRAWS = 512, 60, 20
QUICKLY_COMPILED = {"xla_backend_optimization_level": 0}  # it is most of the time
HIGHEST = 50  # a batch's loss, relative to the start: above it, a run has diverged
OPTIMIZERS = {"locoprop": loco.locoprop}
TRANSFERS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": nn.relu,
    "tanh": nn.tanh,
    "gelu": nn.gelu,
    "silu": nn.silu,
    "elu": nn.elu,
    "sigmoid": nn.sigmoid,
}


class Architecture(NamedTuple):
    """What a compiled step depends on."""

    depth: int
    width: int
    inputs: int
    outputs: int
    transfer: str
    norm: str
    branch: str
    loss: str
    batch_size: int
    penalized: bool

    @classmethod
    def drawn(cls, rng: np.random.Generator) -> "Architecture":
        """One of many."""
        loss = str(rng.choice(["squared", "sigmoid", "softmax"]))
        return cls(
            depth=int(rng.integers(0, 7)),
            width=int(rng.choice([4, 8, 16, 32])),
            inputs=int(rng.choice([2, 4, 8, 16])),
            outputs=int(rng.integers(2 if loss == "softmax" else 1, 6)),
            transfer=str(rng.choice(list(TRANSFERS))),
            norm=str(rng.choice(["none", "none", "layer", "batch"])),
            branch=str(rng.choice(["none", "none", "zero scale", "zero kernel"])),
            loss=loss,
            batch_size=int(2 ** rng.integers(2, 9)),
            penalized=bool(rng.random() < 0.4),
        )


class Draws(NamedTuple):
    """What is drawn several times for each network."""

    seed: jax.Array
    scale: jax.Array
    noise: jax.Array
    penalty: jax.Array

    @classmethod
    def drawn(cls, rng: np.random.Generator, count: int) -> "Draws":
        """As many as are trained at once."""
        return cls(
            seed=rng.integers(0, 2**31, count).astype(np.uint32),
            scale=(10 ** rng.uniform(-3, 3, count)).astype(np.float32),
            noise=rng.choice([0.0, 0.1, 0.5, 1.0], count).astype(np.float32),
            penalty=(10 ** rng.uniform(-5, -1, count)).astype(np.float32),
        )


class Network(nn.Module):
    """Dense layers, with norms or as branches that start at zero, if drawn so.

    Attributes:
      drawn: says how.
    """

    drawn: Architecture

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """From inputs to outputs."""
        drawn = self.drawn
        for _ in range(drawn.depth):
            y = nn.Dense(drawn.width)(x)
            if drawn.norm == "layer":
                y = nn.LayerNorm()(y)
            if drawn.norm == "batch":
                y = nn.BatchNorm(use_running_average=False)(y)
            y = TRANSFERS[drawn.transfer](y)
            if drawn.branch != "none" and x.shape == y.shape:
                y = x + Branch(drawn.branch == "zero kernel")(y)
            x = y
        return nn.Dense(drawn.outputs)(x)


class Branch(nn.Module):
    """A dense layer whose outputs start at zero.

    Attributes:
      by_kernel: whether its kernel does, or a scale behind it.
    """

    by_kernel: bool

    @nn.compact
    def __call__(self, y: jax.Array) -> jax.Array:
        """From features to as many."""
        zeros = nn.initializers.zeros
        if self.by_kernel:
            return nn.Dense(y.shape[-1], kernel_init=zeros)(y)
        return nn.Dense(y.shape[-1])(y) * self.param("scale", zeros, y.shape[-1:])


def targets_of(key: jax.Array, x: jax.Array, drawn: Architecture, noise: jax.Array):
    """What a random network of tanh makes of the inputs, some of it replaced."""
    keys = jax.random.split(key, 4)
    hidden = jnp.tanh(x @ jax.random.normal(keys[0], (drawn.inputs, 16)))
    clean = hidden @ jax.random.normal(keys[1], (16, drawn.outputs)) / 4
    if drawn.loss == "squared":
        return clean + noise * jax.random.normal(keys[2], clean.shape)
    replaced = jax.random.bernoulli(keys[2], noise, (len(x), 1))
    other = jax.random.normal(keys[3], clean.shape)
    chosen = jnp.where(replaced, other, clean)
    if drawn.loss == "sigmoid":
        return (chosen > 0).astype(jnp.float32)
    return jax.nn.one_hot(jnp.argmax(chosen, axis=-1), drawn.outputs)


COSTS = {
    "squared": lambda outputs, y: jnp.sum((outputs - y) ** 2, axis=-1),
    "sigmoid": lambda outputs, y: jnp.sum(
        optax.sigmoid_binary_cross_entropy(outputs, y), axis=-1
    ),
    "softmax": optax.softmax_cross_entropy,
}


def train(drawn: Architecture, optimizer: str, draw: Draws) -> dict[str, jax.Array]:
    """Trains one network with nothing set.

    Returns:
      The loss of all rows at the `start` and in the `end`, the `highest` of a batch,
      whether all weights are `finite`, and how many steps were `skipped`.
    """
    keys = jax.random.split(jax.random.key(draw.seed), 4)
    x = jax.random.normal(keys[0], (ROWS, drawn.inputs))
    y, x = targets_of(keys[1], x, drawn, draw.noise), draw.scale * x
    network = Network(drawn)
    params = network.init(keys[2], x[:2])["params"]
    rows = jax.random.randint(keys[3], (STEPS, drawn.batch_size), 0, ROWS)

    def loss_fn(params, rows):
        variables = {"params": params}
        outputs, _ = network.apply(variables, x[rows], mutable=["batch_stats"])
        loss = jnp.mean(COSTS[drawn.loss](outputs, y[rows]))
        if drawn.penalized:
            loss += draw.penalty * optax.tree.norm(params, squared=True)
        return loss

    layers = loco.layers(loss_fn)(params, rows[0])
    capture, tx = loco.value_and_grad(loss_fn, layers), OPTIMIZERS[optimizer](layers)

    def step(carry, rows):
        params, state = carry
        loss, grads, intermediates = capture(params, rows)
        updates, state = tx.update(grads, state, params, intermediates=intermediates)
        return (optax.apply_updates(params, updates), state), loss

    start = loss_fn(params, jnp.arange(ROWS))
    (params, state), losses = jax.lax.scan(step, (params, tx.init(params)), rows)
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]
    return {
        "start": start,
        "end": loss_fn(params, jnp.arange(ROWS)),
        "highest": jnp.max(losses),
        "finite": jnp.all(jnp.stack(finite)),
        "skipped": optax.tree.get(state, "skipped_steps"),
    }


def diverged(run: dict[str, Any]) -> bool:
    """Whether a weight or a loss is not finite, or a loss far above the start."""
    worst = max(run["end"] / run["start"], run["highest"] / run["start"])
    return not (run["finite"] and worst <= HIGHEST)


def runs_of(number: int, optimizers: Sequence[str]) -> list[dict[str, Any]]:
    """All runs of the network that a seed draws."""
    rng = np.random.default_rng(number)
    drawn, draws = Architecture.drawn(rng), Draws.drawn(rng, DRAWS)
    results = []
    for name in optimizers:
        trained = jax.jit(
            jax.vmap(partial(train, drawn, name)), compiler_options=QUICKLY_COMPILED
        )
        found = {**draws._asdict(), **jax.device_get(trained(draws))}
        for at in range(DRAWS):
            run = {key: value[at].item() for key, value in found.items()}
            about = {"network": number, "optimizer": name, **drawn._asdict()}
            results.append({**about, **run})
    return results


def summary(results: Sequence[dict[str, Any]]) -> str:
    """How many runs of each optimizer diverged, and how the others ended."""
    rows = []
    for name in dict.fromkeys(r["optimizer"] for r in results):
        own = [r for r in results if r["optimizer"] == name]
        ends = np.array([r["end"] / r["start"] for r in own])
        rows.append(
            (
                name,
                str(len(own)),
                str(sum(map(diverged, own))),
                str(int(np.sum(ends > 1))),
                f"{np.nanmax(ends):.2f}",
                f"{np.nanmax([r['highest'] / r['start'] for r in own]):.1f}",
                f"{np.nanmedian(ends):.3f}",
            )
        )
    columns = (
        "with nothing set",
        "problems",
        "diverged",
        "ended above the start",
        "highest end / start",
        "highest batch / start",
        "median end / start",
    )
    return markdown_table(columns, rows)


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws what share of the problems ended how far below or above their start."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name in dict.fromkeys(r["optimizer"] for r in results):
        ends = [r["end"] / r["start"] for r in results if r["optimizer"] == name]
        axes.plot(np.sort(ends), np.linspace(0, 1, len(ends)), label=name)
    axes.axvline(1, color="gray", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel(f"loss after {STEPS} steps / loss at the start")
    axes.set_ylabel("share of the problems")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, writes the results, and shows a table and a picture of them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.everyday.random_problems",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--networks", type=int, default=50, help=f"each trained {DRAWS} times")
    add("--first", type=int, default=0, help="the seed of the first network")
    add("--workers", type=int, default=2, help="networks that are trained at a time")
    add("--optimizers", nargs="+", choices=[*OPTIMIZERS], default=[*OPTIMIZERS])
    add("--output", type=Path, default=Path("out"), help="the folder for results")
    options = parser.parse_args(arguments)
    made = provenance()
    numbers = range(options.first, options.first + options.networks)
    work = partial(runs_of, optimizers=options.optimizers)
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        found = pool.map(work, numbers)
        parts = list(track(found, "Training", total=options.networks))
    results = [run for part in parts for run in part]
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "random_problems.jsonl"
    lines = [{"made": made, "steps": STEPS}, *results]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(summary(results))
    plot(results, path.with_suffix(".png"))
    print(f"Results: {path}\nPicture: {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
