"""Training that survives: checkpoints with Orbax, in one process or in several.

The deep autoencoder, narrow, on generated curves. The same command goes on where the
last one ended, whatever ended it. Several processes train together:

    python -m examples.resumable --folder run --processes 2 --process 0 &
    python -m examples.resumable --folder run --processes 2 --process 1
"""

import argparse
import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import locoprop_optax as loco
from benchmarks.datasets import curves
from benchmarks.networks import Autoencoder, reconstruction_loss


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="where the checkpoints lie")
    add("--steps", type=int, default=20, help="when training ends")
    add("--every", type=int, default=1, help="steps between two checkpoints")
    add("--batch-size", type=int, default=64, help="images a step")
    add("--hidden", type=int, nargs="+", default=[32, 8, 32], help="widths")
    add("--processes", type=int, default=1, help="how many train together")
    add("--process", type=int, default=0, help="which of them this is")
    add("--coordinator", default="localhost:12355", help="address of the first")
    add("--timeout", type=int, default=20, help="seconds until a silent one is dead")
    return parser.parse_args(arguments)


def batch_of(images: np.ndarray, step: int, size: int) -> np.ndarray:
    """The batch of a step: the number of steps is the position in the data."""
    return np.random.default_rng(step).choice(images, size)


def digest(params: Any) -> str:
    """The parameters in a few letters, equal if and only if every bit is."""
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]
    return hashlib.sha256(b"".join(leaves)).hexdigest()[:16]


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains from the last checkpoint, and prints each step."""
    options = parse(arguments)
    if options.processes > 1:
        jax.distributed.initialize(
            options.coordinator,
            options.processes,
            options.process,
            heartbeat_timeout_seconds=options.timeout,
        )
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    by_rows = NamedSharding(mesh, PartitionSpec("data"))
    images = curves(jax.random.key(0), 1000)
    model = Autoencoder(tuple(options.hidden))
    loss_fn = partial(reconstruction_loss, model)

    @partial(jax.jit, out_shardings=everywhere)
    def start():
        return model.init(jax.random.key(0), images[:1])["params"]

    params = start()
    layers = loco.layers(loss_fn)(params, images[:1])
    tx = optax.chain(
        loco.scale_by_locoprop(layers),
        optax.trace(0.9),
        optax.scale_by_learning_rate(0.1),
    )
    capture = loco.value_and_grad(loss_fn, layers)

    @jax.jit
    def train_step(params, opt_state, images):
        loss, grads, intermediates = capture(params, images)
        updates, opt_state = tx.update(
            grads, opt_state, params, intermediates=intermediates
        )
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state = jax.jit(tx.init, out_shardings=everywhere)(params)
    state, step = {"params": params, "opt_state": opt_state}, 0
    manager = ocp.CheckpointManager(
        options.folder.absolute(),
        item_handlers=ocp.StandardCheckpointHandler(),
        options=ocp.CheckpointManagerOptions(
            max_to_keep=2, save_interval_steps=options.every
        ),
    )
    with manager:
        if (last := manager.latest_step()) is not None:
            loco.check_state(manager.item_metadata(last).tree, state)
            state = manager.restore(last, args=ocp.args.StandardRestore(state))
            step = last
            print(f"resumed at step {step}", flush=True)
        while step < options.steps:
            rows = batch_of(images, step, options.batch_size)
            batch = jax.make_array_from_callback(rows.shape, by_rows, rows.__getitem__)
            params, opt_state, loss = train_step(**state, images=batch)
            state, step = {"params": params, "opt_state": opt_state}, step + 1
            print(f"step {step} loss {loss:.6f} {digest(params)}", flush=True)
            manager.save(step, args=ocp.args.StandardSave(state))


if __name__ == "__main__":
    main()
