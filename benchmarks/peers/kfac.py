"""K-FAC of `kfac-jax` on the models of `benchmarks.networks`.

Its environment holds kfac-jax 0.0.8, jax 0.9.1, flax 0.12.6 and numpy: the release does
not run with jax 0.10, but its main branch (commit babd853) does with jax 0.11.

Settings: `adaptive` (step size, momentum and damping by the quadratic model, as its
authors advise; default true), else `learning_rate`, warmed up and decayed over
`total_steps`, and `momentum`; `damping`, the first or the fixed one;
`inverse_update_period`. Layers that the package does not know, such as embeddings, get
the diagonal blocks that it gives them.
"""

import json
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import kfac_jax
import numpy as np
from flax import traverse_util
from kfac_jax import patches_second_moment
from protocol import (
    Arrays,
    Examples,
    Trainer,
    examples,
    process_memory,
    rate_at,
    serve,
)

from benchmarks import networks

# Products of patches without a loop and in two dimensions, for XLA compiles neither a
# convolution in a loop nor one of four dimensions to fast code on a CPU.
patches_second_moment.set_use_4d_convolution_in_psm_loop(False)
patches_second_moment.patches_moments = partial(
    patches_second_moment.patches_moments, unroll_loop=True
)


def registered_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The loss, of which kfac-jax is told the distribution that it belongs to.

    That is a class for each row of logits where targets are integers, else an
    independent binary variable for each logit.
    """
    if jnp.issubdtype(targets.dtype, jnp.integer):
        rows = logits.reshape(-1, logits.shape[-1])
        kfac_jax.register_softmax_cross_entropy_loss(
            rows, targets.reshape(-1), weight=len(logits) / len(rows)
        )
        return networks.softmax_cross_entropy(logits, targets)
    kfac_jax.register_multi_bernoulli_predictive_distribution(logits, targets)
    return networks.sigmoid_cross_entropy(logits, targets)


@cache
def loss_of(description: str) -> Callable[[Any, Any], jax.Array]:
    """From the parameters and a batch to the loss of the model so described."""
    model = networks.from_description(json.loads(description))

    def loss(params, batch):
        inputs, targets = batch
        return registered_loss(model.apply({"params": params}, inputs), targets)

    return loss


@cache
def optimizer_of(
    description: str, adaptive: bool, damping: float, period: int
) -> kfac_jax.Optimizer:
    """K-FAC; what it has compiled serves all runs with these settings."""
    return kfac_jax.Optimizer(
        jax.value_and_grad(loss_of(description)),
        l2_reg=0.0,
        use_adaptive_learning_rate=adaptive,
        use_adaptive_momentum=adaptive,
        use_adaptive_damping=adaptive,
        initial_damping=damping if adaptive else None,
        inverse_update_period=period,
        num_burnin_steps=0,
    )


def make(arrays: Arrays, settings: dict[str, Any]) -> Trainer:
    """K-FAC with these settings."""
    description = str(arrays["model"])
    adaptive = settings.get("adaptive", True)
    damping = settings.get("damping", 150.0)
    period = settings.get("inverse_update_period", 5)
    optimizer = optimizer_of(description, adaptive, damping, period)
    evaluate = jax.jit(loss_of(description))

    def given(count: int) -> dict[str, jax.Array]:
        if adaptive:
            return {}
        rate = settings.get("learning_rate", 0.1)
        rate *= rate_at(count, settings.get("total_steps"))
        fixed = (rate, settings.get("momentum", 0.9), damping)
        names = ("learning_rate", "momentum", "damping")
        return dict(zip(names, map(jnp.asarray, fixed), strict=True))

    flat = {n: jnp.asarray(a) for n, a in arrays.items() if n.startswith("params/")}
    params = traverse_util.unflatten_dict(flat, sep="/")["params"]
    size = sum(leaf.size for leaf in flat.values())
    first = examples(arrays, "train").at(arrays["order"][0])
    key = jax.random.key(0)
    state = optimizer.init(params, key, on_device(first))
    held = {"params": params, "state": state, "count": 0}

    def step(batch: tuple[jax.Array, jax.Array]) -> float:
        held["params"], held["state"], stats = optimizer.step(
            held["params"],
            held["state"],
            jax.random.fold_in(key, held["count"]),
            batch=batch,
            global_step_int=held["count"],
            **given(held["count"]),
        )
        held["count"] += 1
        jax.block_until_ready(held["params"])
        return float(stats["loss"])

    return Trainer(
        on_device,
        step,
        lambda batch: float(evaluate(held["params"], batch)),
        lambda: sum(np.size(leaf) for leaf in jax.tree.leaves(held["state"])) / size,
    )


def on_device(batch: Examples) -> tuple[jax.Array, jax.Array]:
    """Inputs and targets, a plain pair."""
    return jax.block_until_ready(
        (jnp.asarray(batch.inputs), jnp.asarray(batch.targets))
    )


def peak_memory() -> int:
    """The most memory that arrays have held on the device, in bytes."""
    stats = jax.local_devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else process_memory()


if __name__ == "__main__":
    serve(make, ("kfac-jax", "jax", "flax"), peak_memory)
