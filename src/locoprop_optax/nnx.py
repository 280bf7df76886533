"""The same for losses of NNX modules.

A loss of a module is a function of its `nnx.Param`s and of its other state. It runs on
a copy of the module, and what it changes there, such as batch statistics and random
counts, is put back into the module, once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from locoprop_optax._quadratic.linearization import ModelAndLoss
from locoprop_optax._records.intermediates import Intermediates
from locoprop_optax._records.layers import Layers
from locoprop_optax._records.paths import PathPattern
from locoprop_optax._trace import capture, find
from locoprop_optax._trace.find import Transfers
from locoprop_optax._trace.trace import loss_in

__all__ = ["layers", "model_and_loss", "value_and_grad"]


def layers(
    loss_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    transfers: Transfers | None = None,
    exclude: PathPattern | None = None,
) -> Callable[..., Layers]:
    """Finds the layers of a loss of an NNX module, as `locoprop_optax.layers` does.

    Args:
      loss_fn: a function from a module and any other arguments to a scalar loss, or to
        (loss, aux). It is traced, on a copy of the module.
      has_aux: as there.
      transfers: as there.
      exclude: as there.

    Returns:
      A function with the arguments of `loss_fn` that returns the `Layers`.

    Raises:
      TypeError: when called, as there.
      ValueError: when called, as there.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import locoprop_optax as loco
      >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.tanh)
      >>> loss_fn = lambda model, x: jnp.mean((model(x) - 0.5) ** 2)
      >>> print(loco.nnx.layers(loss_fn)(model, jnp.ones((5, 3))))
      layer                   product  rows  inputs  outputs  transfer  why
      layers/0/kernel + bias  product  5     3       4        tanh      applied to the pre-activation
      <BLANKLINE>
      curvature: the loss is convex in outputs of shape 5×4 (squared error)
    """  # noqa: E501
    find_layers = find.layers(
        _functional(loss_fn, has_aux),
        has_aux=True,
        transfers=transfers,
        exclude=exclude,
    )

    def find_in(model, *args, **kwargs):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        return find_layers(params, graphdef, rest, _split(args), _split(kwargs))

    return find_in


def value_and_grad(
    loss_fn: Callable[..., Any],
    layers: Layers,
    *,
    has_aux: bool = False,
    key: jax.Array | None = None,
) -> Callable[..., tuple[Any, nnx.State, Intermediates]]:
    r"""`nnx.value_and_grad` that also returns each layer's intermediates.

    Args:
      loss_fn: a function from a module and any other arguments to a scalar loss, or to
        (loss, aux).
      layers: what `nnx.layers(loss_fn)` found.
      has_aux: as in `locoprop_optax.value_and_grad`.
      key: as there.

    Returns:
      A function with the arguments of `loss_fn` that returns (loss, grads,
      intermediates), or ((loss, aux), grads, intermediates); the gradients are those of
      the module's `nnx.Param`s.

    Raises:
      TypeError: when called, as there.
      ValueError: when called, as there.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import locoprop_optax as loco
      >>> model, x = nnx.Linear(3, 4, rngs=nnx.Rngs(0)), jnp.eye(3)
      >>> loss_fn = lambda model, x: jnp.mean((model(x) - 0.5) ** 2)
      >>> layers = loco.nnx.layers(loss_fn)(model, x)
      >>> optimizer = nnx.Optimizer(model, loco.locoprop(layers), wrt=nnx.Param)
      >>> capture = loco.nnx.value_and_grad(loss_fn, layers)
      >>> @nnx.jit
      ... def train_step(model, optimizer, x):
      ...     loss, grads, intermediates = capture(model, x)
      ...     optimizer.update(model, grads, intermediates=intermediates)
      ...     return loss
      >>> losses = [float(train_step(model, optimizer, x)) for _ in range(9)]
      >>> losses[-1] < losses[0]
      True
    """
    differentiate = capture.value_and_grad(
        _functional(loss_fn, has_aux), layers, has_aux=True, key=key
    )

    def loss_grads_and_intermediates(model, *args, **kwargs):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        (loss, (aux, changed)), grads, intermediates = differentiate(
            params, graphdef, rest, _split(args), _split(kwargs)
        )
        nnx.update(model, changed[0])
        for given, states in ((args, changed[1]), (kwargs, changed[2])):
            for name, state in states.items():
                nnx.update(given[name], state)
        return (loss, aux) if has_aux else loss, grads, intermediates

    return loss_grads_and_intermediates


def model_and_loss(
    model: nnx.Module, loss_fn: Callable[[Any], jax.Array], *inputs: Any, **options: Any
) -> ModelAndLoss:
    """Parts a loss into a model and a loss of its outputs, for one batch.

    `curveball` and `scale_by_quadratic_model` take the two functions. The model itself
    is not changed; random counts stay the same in all passes of a step.

    Args:
      model: the model.
      loss_fn: from the model's outputs to a scalar.
      *inputs: what the model is called with.
      **options: what else it is called with, by name.

    Returns:
      The functions of the parameters, an `nnx.State`, and one to the state that a pass
      changes, to be put into the model by `nnx.update`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import locoprop_optax as loco
      >>> model, x = nnx.BatchNorm(3, rngs=nnx.Rngs(0)), jnp.ones((4, 3))
      >>> functions = loco.nnx.model_and_loss(model, lambda y: jnp.mean(y**2), x)
      >>> params = nnx.state(model, nnx.Param)
      >>> functions.model_fn(params).shape
      (4, 3)
      >>> nnx.update(model, functions.mutated(params))
      >>> [round(float(mean), 2) for mean in model.mean]
      [0.01, 0.01, 0.01]
    """
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)

    def run(params):
        copy: Any = nnx.merge(graphdef, params, rest, copy=True)
        outputs = copy(*inputs, **options)
        return outputs, nnx.state(copy, nnx.Not(nnx.Param))

    return ModelAndLoss(
        model_fn=lambda params: run(params)[0],
        loss_fn=loss_fn,
        mutated=lambda params: run(params)[1],
    )


def _functional(loss_fn: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    """A loss as a function of parameters, which also returns the state it changed."""

    def function(params, graphdef, rest, args, kwargs):
        model = nnx.merge(graphdef, params, rest, copy=True)
        given, named = _merged(args), _merged(kwargs)
        result = loss_fn(model, *given.values(), **named)
        loss = loss_in(result, has_aux)
        aux = result[1] if has_aux else None
        changed = nnx.state(model, nnx.Not(nnx.Param)), *map(_states, (given, named))
        return loss, (aux, changed)

    return function


def _split(arguments: Any) -> dict[Any, Any]:
    """The arguments by position or name; those that hold state in two parts."""
    items = arguments if isinstance(arguments, dict) else dict(enumerate(arguments))
    return {
        name: _Held(*nnx.split(value)) if isinstance(value, nnx.Pytree) else value
        for name, value in items.items()
    }


class _Held(NamedTuple):
    """An argument that holds state: what it is, and the state."""

    graphdef: Any
    state: Any


def _merged(arguments: dict[Any, Any]) -> dict[Any, Any]:
    """Copies of the arguments."""
    return {
        name: nnx.merge(*value, copy=True) if isinstance(value, _Held) else value
        for name, value in arguments.items()
    }


def _states(arguments: dict[Any, Any]) -> dict[Any, nnx.State]:
    """The states of those arguments that hold any."""
    held = {k: v for k, v in arguments.items() if isinstance(v, nnx.Pytree)}
    return {key: nnx.state(value) for key, value in held.items()}
