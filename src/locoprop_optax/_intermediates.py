"""What flows from a captured forward and backward pass to an optimizer's update."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import jax
from jaxtyping import Array, Float

from locoprop_optax._linear_maps import DENSE, LinearMap, concatenate_examples
from locoprop_optax._transfers import IDENTITY, Transfer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerIntermediates:
    r"""One layer's part in a forward and backward pass.

    With loss :math:`L` and pre-activation :math:`a = xW + b`; n counts examples times
    positions, and a mean over the batch stays inside the cotangents.

    Attributes:
      inputs: the layer's input :math:`x`.
      preactivations: :math:`a`, at the parameters where the pass was made.
      cotangents: :math:`g = \partial L / \partial a`.
      gradient: :math:`\partial L / \partial \theta` of each of the layer's
        parameters by name, so that the first local step costs nothing.
      targets: the local targets, in the space that the local loss compares; None
        (the default) leaves them to the optimizer's `target`.
      transfer: the function applied to the pre-activation. Default: identity.
      linear_map: how the pre-activation depends on the parameters. Default: a
        product with the kernel plus a bias.
      stack_dims: how many leading axes of all arrays count layers of a stack that
        are solved each on its own. Default: 0.
    """

    inputs: Float[Array, "*n d_in"]
    preactivations: Float[Array, "*n d_out"]
    cotangents: Float[Array, "*n d_out"]
    gradient: Mapping[str, Array]
    targets: Float[Array, "*n d_out"] | None = None
    transfer: Transfer = field(default=IDENTITY, metadata={"static": True})
    linear_map: LinearMap = field(default=DENSE, metadata={"static": True})
    stack_dims: int = field(default=0, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Intermediates:
    """All layers' parts in a forward and backward pass.

    Attributes:
      layers: the layers by path, the keys of the parameter tree joined by "/".

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn
      >>> import locoprop_optax as loco
      >>> model, x = nn.Dense(2), jnp.ones((5, 3))
      >>> loss_fn = lambda params, x: jnp.mean(model.apply(params, x) ** 2)
      >>> params = model.init(jax.random.key(0), x)
      >>> loss, grads, intermediates = loco.linen.value_and_grad(loss_fn)(params, x)
      >>> intermediates.layers["params"].cotangents.shape
      (5, 2)
    """

    layers: Mapping[str, LayerIntermediates]


def join_intermediates(*parts: Intermediates) -> Intermediates:
    r"""Joins the intermediates of micro-batches into those of one large batch.

    For a loss that is a mean over examples and micro-batches of equal size, so that
    gradients are averaged, this is gradient accumulation done right: with :math:`m`
    parts, cotangents are divided by :math:`m`, gradients are averaged, and the
    examples of all parts stand one after another. All parts belong to the same
    parameters. (`optax.MultiSteps` keeps only the last part's intermediates.)

    Args:
      *parts: the intermediates of each micro-batch, examples on their first axis.

    Returns:
      The intermediates of the large batch.

    Raises:
      ValueError: if there is no part, or the parts' layers differ.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn
      >>> import locoprop_optax as loco
      >>> model, x = nn.Dense(2), jnp.eye(4)
      >>> loss_fn = lambda params, x: jnp.mean((model.apply(params, x) - 1) ** 2)
      >>> params = model.init(jax.random.key(0), x)
      >>> capture = loco.linen.value_and_grad(loss_fn)
      >>> parts = [capture(params, part)[2] for part in (x[:2], x[2:])]
      >>> loco.join_intermediates(*parts).layers["params"].inputs.shape
      (4, 4)
    """
    if not parts:
        raise ValueError("join_intermediates needs at least one part.")
    paths = [set(part.layers) for part in parts]
    if any(other != paths[0] for other in paths):
        differing = set.union(*paths) - set.intersection(*paths)
        raise ValueError(
            "The parts hold different layers; not in all of them: "
            f"{', '.join(map(repr, sorted(differing)))}."
        )
    return Intermediates(
        {path: _join([part.layers[path] for part in parts]) for path in parts[0].layers}
    )


def _join(layers: list[LayerIntermediates]) -> LayerIntermediates:
    first = layers[0]

    def examples(*arrays):
        return concatenate_examples(first.linear_map, arrays, first.stack_dims)

    def mean(*arrays):
        return sum(arrays) / len(arrays)

    joined = jax.tree.map(examples, *(replace(la, gradient={}) for la in layers))
    return replace(
        joined,
        cotangents=joined.cotangents / len(layers),
        gradient=jax.tree.map(mean, *(la.gradient for la in layers)),
    )
