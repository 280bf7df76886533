"""The loss, its gradients, and its layers' intermediates, in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from locoprop_optax._records.fits import check_layers
from locoprop_optax._records.intermediates import Intermediates
from locoprop_optax._records.layers import Layers
from locoprop_optax._trace.collect import collect, go_back, run_forward, uses_of
from locoprop_optax._trace.cut_loss import cut_of
from locoprop_optax._trace.gauss_newton import GaussNewton
from locoprop_optax._trace.trace import trace


def value_and_grad(
    loss_fn: Callable[..., Any],
    layers: Layers,
    *,
    has_aux: bool = False,
    key: jax.Array | None = None,
) -> Callable[..., tuple[Any, Any, Intermediates]]:
    r"""`jax.value_and_grad` that also returns each layer's intermediates.

    From one forward and one backward pass come the loss :math:`L`, its gradients, and
    for each layer with :math:`a = xW + b` its input :math:`x`, pre-activation :math:`a`
    and cotangent :math:`\partial L/\partial a`. The loss is traced, and its trace is
    run with zeros added to each pre-activation, whose gradients are the cotangents.

    Args:
      loss_fn: a function from params, a tree of arrays, and any other arguments to a
        scalar loss, or to (loss, aux).
      layers: what `layers(loss_fn)` found.
      has_aux: whether `loss_fn` returns (loss, aux). Default: no.
      key: for what is sampled, the cotangents of labels drawn from the model's output.
        Default: one that is made of the arguments' bits.

    Returns:
      A function with the arguments of `loss_fn` that returns (loss, grads,
      intermediates), or ((loss, aux), grads, intermediates).

    Raises:
      TypeError: if `layers` are something else; when called, if `loss_fn` returns no
        scalar loss.
      ValueError: when called, if the loss no longer does what `layers` says.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn
      >>> import locoprop_optax as loco
      >>> model, x = nn.Dense(2), jnp.ones((5, 3))
      >>> loss_fn = lambda params, x: jnp.mean(model.apply(params, x) ** 2)
      >>> params = model.init(jax.random.key(0), x)
      >>> layers = loco.layers(loss_fn)(params, x)
      >>> loss, grads, intermediates = loco.value_and_grad(loss_fn, layers)(params, x)
      >>> intermediates.layers["params/kernel"].cotangents.shape
      (5, 2)
    """
    check_layers(layers)

    def loss_grads_and_intermediates(params, *args, **kwargs):
        traced, arrays = trace(loss_fn, has_aux, params, args, kwargs)
        uses = uses_of(traced, layers)
        cut = cut_of(traced, layers)
        there = run_forward(traced, uses, arrays, cut.values)
        leaves, structure = jax.tree.flatten(params)
        nothing = [jnp.zeros_like(value) for value in there.values]
        gradient, cotangents = go_back(
            there.jvp, leaves, uses, jnp.ones_like(there.loss), nothing
        )
        grads = jax.tree.unflatten(structure, gradient)
        model = GaussNewton(
            *(arrays, there.loss, gradient, there.values, there.jvp, key),
            *(traced, layers, cut),
        )
        collected = collect(
            *(traced, layers, uses, params, grads, model.penalties),
            *(there.records, cotangents),
        )
        value = jax.tree.unflatten(traced.returned, there.result)
        return value, grads, Intermediates(collected, model)

    return loss_grads_and_intermediates
