"""Steps of shards on their own, with one reduction a step."""

import jax
import optax

from locoprop_optax._utils.reductions import is_float
from locoprop_optax._utils.sharding import averaging


def averaged(
    optimizer: optax.GradientTransformation, axis_name: str | tuple[str, ...]
) -> optax.GradientTransformationExtraArgs:
    """Lets each shard take a step of its own, and takes the mean of all.

    Inside a `jax.shard_map` over the batch, each shard solves its local problems on its
    own examples, and nothing is summed over shards but the updates and the state, in
    one reduction (and in another its counters, of which the largest is kept). Under
    plain `jax.jit` a sharded batch takes the very step of the whole batch instead, at
    one reduction for each local step.

    Args:
      optimizer: any, also of other packages.
      axis_name: of the mesh axis that the batch is sharded over, or several. () keeps
        each shard's step, for replicas of the parameters that are meant to part.

    Returns:
      A transformation that takes what `optimizer` takes, for a loss that is a mean over
      the examples of the shard, without collectives.

    Example:
      >>> from functools import partial
      >>> import jax, jax.numpy as jnp, flax.linen as nn, optax
      >>> from jax.sharding import PartitionSpec as P
      >>> import locoprop_optax as loco
      >>> model, x = nn.Dense(2), jnp.ones((4, 3))
      >>> loss_fn = lambda params, x: jnp.mean((model.apply(params, x) - 1) ** 2)
      >>> mesh = jax.make_mesh((2,), ("data",))
      >>> x = jax.device_put(x, jax.NamedSharding(mesh, P("data")))
      >>> params = model.init(jax.random.key(0), x)
      >>> layers = loco.layers(loss_fn)(params, x)
      >>> tx = loco.averaged(loco.locoprop(layers), "data")
      >>> @jax.jit
      ... @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P(), P("data")),
      ...          out_specs=P(), check_vma=False)
      ... def step(params, state, x):
      ...     _, grads, intermediates = loco.value_and_grad(loss_fn, layers)(params, x)
      ...     updates, state = tx.update(
      ...         grads, state, params, intermediates=intermediates)
      ...     return optax.apply_updates(params, updates), state
      >>> moved, _ = step(params, tx.init(params), x)
      >>> bool(loss_fn(moved, x) < loss_fn(params, x))
      True
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def update(updates, state, params=None, **extra_args):
        with averaging():
            step = optimizer.update(updates, state, params, **extra_args)
        leaves, structure = jax.tree.flatten(step)
        counters = [at for at, leaf in enumerate(leaves) if not is_float(leaf)]
        numbers = [at for at, leaf in enumerate(leaves) if is_float(leaf)]
        for combine, places in ((jax.lax.pmean, numbers), (jax.lax.pmax, counters)):
            combined = combine([leaves[at] for at in places], axis_name)
            for at, leaf in zip(places, combined, strict=True):
                leaves[at] = leaf
        return jax.tree.unflatten(structure, leaves)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)
