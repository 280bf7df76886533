"""K-FAC of `kfac-jax` on the deep autoencoder.

Its environment holds kfac-jax 0.0.8, jax 0.9.1, flax 0.12.6 and numpy; the release does
not run with jax 0.10. Settings: `adaptive` (step size, momentum and damping by the
quadratic model, as its authors advise; default true), else `learning_rate`, warmed up
and decayed over `total_steps`, and `momentum`; `damping`, the first or the fixed one;
`inverse_update_period`.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import kfac_jax
import numpy as np
from protocol import Trainer, layers_of, rate_at, serve

TRANSFERS = {"tanh": jnp.tanh, "relu": jax.nn.relu}


def logits_of(params: Any, images: jax.Array, transfer: str) -> jax.Array:
    """A transfer function between dense layers, but for a linear code, to logits."""
    x = images
    for i, (kernel, bias) in enumerate(params):
        x = x @ kernel + bias
        if i not in (len(params) // 2 - 1, len(params) - 1):
            x = TRANSFERS[transfer](x)
    return x


@cache
def loss_of(transfer: str) -> Callable[[Any, jax.Array], jax.Array]:
    """Sigmoid cross-entropy, summed over pixels and averaged over images."""

    def loss(params, images):
        logits = logits_of(params, images, transfer)
        kfac_jax.register_multi_bernoulli_predictive_distribution(logits, images)
        losses = jnp.logaddexp(0.0, logits) - logits * images
        return jnp.mean(jnp.sum(losses, axis=-1))

    return loss


@cache
def optimizer_of(
    transfer: str, adaptive: bool, damping: float, period: int
) -> kfac_jax.Optimizer:
    """K-FAC; what it has compiled serves all runs with these settings."""
    return kfac_jax.Optimizer(
        jax.value_and_grad(loss_of(transfer)),
        l2_reg=0.0,
        use_adaptive_learning_rate=adaptive,
        use_adaptive_momentum=adaptive,
        use_adaptive_damping=adaptive,
        initial_damping=damping if adaptive else None,
        inverse_update_period=period,
        num_burnin_steps=0,
    )


def make(arrays: Mapping[str, np.ndarray], settings: dict[str, Any]) -> Trainer:
    """K-FAC with these settings."""
    transfer = str(arrays["transfer"])
    adaptive = settings.get("adaptive", True)
    damping = settings.get("damping", 150.0)
    period = settings.get("inverse_update_period", 5)
    optimizer = optimizer_of(transfer, adaptive, damping, period)
    evaluate = jax.jit(loss_of(transfer))

    def given(count: int) -> dict[str, jax.Array]:
        if adaptive:
            return {}
        rate = settings.get("learning_rate", 0.1)
        rate *= rate_at(count, settings.get("total_steps"))
        fixed = (rate, settings.get("momentum", 0.9), damping)
        names = ("learning_rate", "momentum", "damping")
        return dict(zip(names, map(jnp.asarray, fixed), strict=True))

    params = [
        (jnp.asarray(arrays[f"kernel_{i}"]), jnp.asarray(arrays[f"bias_{i}"]))
        for i in range(layers_of(arrays)[0])
    ]
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    first = jnp.asarray(arrays["train"][arrays["order"][0]])
    key = jax.random.key(0)
    held = {"params": params, "state": optimizer.init(params, key, first), "count": 0}

    def step(images: np.ndarray) -> float:
        held["params"], held["state"], stats = optimizer.step(
            held["params"],
            held["state"],
            jax.random.fold_in(key, held["count"]),
            batch=jnp.asarray(images),
            global_step_int=held["count"],
            **given(held["count"]),
        )
        held["count"] += 1
        jax.block_until_ready(held["params"])
        return float(stats["loss"])

    return Trainer(
        step,
        lambda images: float(evaluate(held["params"], jnp.asarray(images))),
        lambda: sum(np.size(leaf) for leaf in jax.tree.leaves(held["state"])) / size,
    )


if __name__ == "__main__":
    serve(make, ("kfac-jax", "jax", "flax"))
