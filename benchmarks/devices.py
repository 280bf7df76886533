"""LocoProp on several devices: what a step exchanges, computes and reaches.

Devices are simulated by one CPU, so that nothing here is a time. Three questions: how
many collective operations a compiled step has; how many operations each device does
when equal layers are spread over devices; and what it costs in training loss on the
deep autoencoder if each shard of the batch solves problems of its own, with one
reduction a step (`loco.averaged`).
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import locoprop_optax as loco
from benchmarks import datasets
from benchmarks.autoencoder import problem_of
from benchmarks.networks import Autoencoder, reconstruction_loss
from benchmarks.problem import make_task
from benchmarks.provenance import provenance

DEVICES = 8
EVERYWHERE, ROWS = PartitionSpec(), PartitionSpec("data")


VARIANTS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "locoprop": loco.locoprop,
    "locoprop_m": partial(loco.locoprop_m, learning_rate=1e-5),
}


def step_of(
    loss_fn: Callable[..., jax.Array],
    layers: loco.Layers,
    tx: optax.GradientTransformation,
) -> Callable[..., tuple[Any, Any, jax.Array]]:
    """A training step, as the README writes it."""
    capture = loco.value_and_grad(loss_fn, layers)

    def step(params, state, batch):
        loss, grads, intermediates = capture(params, batch)
        updates, state = tx.update(grads, state, params, intermediates=intermediates)
        return optax.apply_updates(params, updates), state, loss

    return step


def mesh_of(devices: int, name: str) -> jax.sharding.Mesh:
    """Some of the devices in a row, along an axis of this name."""
    chosen = jax.devices()[:devices]
    return jax.make_mesh((devices,), (name,), (AxisType.Auto,), devices=chosen)


def put(tree: Any, mesh: jax.sharding.Mesh, spec: PartitionSpec) -> Any:
    """A tree on the devices of a mesh."""
    return jax.device_put(tree, NamedSharding(mesh, spec))


def exchanges(batch_size: int) -> list[dict[str, Any]]:
    """The collective operations of a step on a sharded batch, by variant."""
    model, images = Autoencoder((64, 16, 64)), jnp.zeros((batch_size, 784))
    params, mesh = model.init(jax.random.key(0), images)["params"], mesh_of(8, "data")
    loss_fn, found = partial(reconstruction_loss, model), []
    layers = loco.layers(loss_fn)(params, images)
    for name, make in VARIANTS.items():
        for shards_own in (False, True):
            tx = loco.averaged(make(layers), "data") if shards_own else make(layers)
            step = step_of(loss_fn, layers, tx)
            if shards_own:
                step = _by_shards(step, mesh)
            with jax.set_mesh(mesh):
                given = put((params, tx.init(params)), mesh, EVERYWHERE)
                lowered = jax.jit(step).lower(*given, put(images, mesh, ROWS))
            seen = re.findall(
                r"= .*? (all-\w+|reduce-scatter|collective-permute)(?:-start)?\(",
                lowered.compile().as_text(),
            )
            kind = "each shard's own" if shards_own else "the whole batch's"
            found.append({"optimizer": name, "step": kind, "operations": Counter(seen)})
    return found


def _by_shards(step: Callable[..., Any], mesh: jax.sharding.Mesh) -> Callable[..., Any]:
    specs = {"in_specs": (EVERYWHERE, EVERYWHERE, ROWS), "out_specs": EVERYWHERE}
    return jax.shard_map(step, mesh=mesh, check_vma=False, **specs)


class Equal(nn.Module):
    """Eight layers of one width with tanh between them."""

    width: int = 256

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """From vectors to others."""
        for _ in range(8):
            x = nn.tanh(nn.Dense(self.width)(x))
        return x


def shares() -> list[dict[str, Any]]:
    """The operations of one device, equal layers spread over several."""
    model, x = Equal(), jnp.ones((256, 256))
    params = model.init(jax.random.key(0), x)["params"]

    def loss_fn(params, x):
        return jnp.mean((model.apply({"params": params}, x) - 1) ** 2)

    def operations(step, *given):
        return jax.jit(step).lower(*given).compile().cost_analysis()["flops"]

    backprop = operations(jax.value_and_grad(loss_fn), params, x)
    layers, found = loco.layers(loss_fn)(params, x), []
    for name in ("locoprop_m", "locoprop"):
        for devices in (1, 2, 4, 8):
            tx = VARIANTS[name](layers, stack_layers="layers")
            mesh = mesh_of(devices, "layers")
            with jax.set_mesh(mesh):
                given = put((params, tx.init(params), x), mesh, EVERYWHERE)
                total = operations(step_of(loss_fn, layers, tx), *given)
            local = (total - backprop) / backprop
            found.append({"optimizer": name, "devices": devices, "local": local})
    return found


def train(options: argparse.Namespace, name: str, shards: int, progress: Any) -> Any:
    """The training losses after each epoch, each shard's step its own.

    Shards take turns on one device: the mean of their steps is that of `loco.averaged`.
    """
    images = datasets.load(options.data, options.data_dir, options.train_size).train
    model, size = Autoencoder(), options.batch_size
    epoch = len(images) // size
    problem = problem_of(datasets.Images(images, images[:size]), model)
    steps = options.epochs * epoch
    task = make_task(problem, steps=steps, batch_size=size, seed=0)
    loss_fn = partial(reconstruction_loss, model)
    layers = loco.layers(loss_fn)(task.params, images[:1])
    tx = VARIANTS[name](layers)
    step = jax.jit(step_of(loss_fn, layers, tx))
    params, state = task.params, tx.init(task.params)
    evaluate = jax.jit(loss_fn)
    losses = []
    bar = progress.add_task(f"{name}, {shards} shards", total=steps)
    for done, rows in enumerate(task.order, 1):
        reached = [step(params, state, part) for part in np.split(images[rows], shards)]
        params, state, _ = jax.tree.map(_mean, *reached)
        progress.update(bar, advance=1)
        if done % epoch == 0:
            parts = np.split(images[: epoch * size], epoch)
            losses.append(float(np.mean([evaluate(params, part) for part in parts])))
    return {"optimizer": name, "shards": shards, "losses": losses}


def _mean(*leaves: jax.Array) -> jax.Array:
    """The mean of numbers; counters of shards are alike."""
    floats = jnp.issubdtype(leaves[0].dtype, jnp.floating)
    return jnp.mean(jnp.stack(leaves), axis=0) if floats else leaves[0]


def show(results: dict[str, Any], path: Path) -> None:
    """Three tables and a picture."""
    console = Console()
    table = Table("optimizer", "step", "operations", title="collectives in a program")
    for row in results["exchanges"]:
        counts = ", ".join(f"{n} {kind}" for kind, n in row["operations"].items())
        table.add_row(row["optimizer"], row["step"], counts)
    console.print(table)
    table = Table("optimizer", "devices", "operations of each", title="spread layers")
    for row in results["shares"]:
        units = f"{row['local']:.2f} × backprop"
        table.add_row(row["optimizer"], str(row["devices"]), units)
    console.print(table)
    runs = results["training"]
    epochs = range(1, len(runs[0]["losses"]) + 1)
    table = Table("optimizer", "shards", *map(str, epochs), title="loss after epochs")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        losses = [f"{loss:.1f}" for loss in run["losses"]]
        table.add_row(run["optimizer"], str(run["shards"]), *losses)
        label = f"{run['optimizer']}, {run['shards']} shards"
        axes.plot(epochs, run["losses"], label=label)
    console.print(table)
    axes.set(xlabel="epoch", ylabel="training loss", yscale="log")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, writes the results, and shows tables and a picture of them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.devices",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", choices=datasets.NAMES, default="curves", help="the images")
    add("--data-dir", type=Path, help="the folder with IDX files, plain or gzip")
    add("--train-size", type=int, default=20_000, help="how many training images")
    add("--batch-size", type=int, default=1000, help="images a step")
    add("--epochs", type=int, default=3, help="passes over the images")
    add("--shards", type=int, nargs="+", default=[1, 4], help="of the batch")
    add("--output", type=Path, default=Path("out"), help="the folder for results")
    options = parser.parse_args(arguments)
    jax.config.update("jax_num_cpu_devices", DEVICES)
    with Progress() as progress:
        results = {
            "exchanges": exchanges(DEVICES * 8),
            "shares": shares(),
            "training": [
                train(options, "locoprop", shards, progress)
                for shards in options.shards
            ],
        }
    settings = {"data": options.data, "train_images": options.train_size}
    settings["batch_size"] = options.batch_size
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "devices.json"
    made = {"settings": settings, "made": provenance()}
    path.write_text(json.dumps({**results, **made}, indent=1) + "\n")
    show(results, path.with_suffix(".png"))
    print(f"Results: {path}")


if __name__ == "__main__":
    main()
