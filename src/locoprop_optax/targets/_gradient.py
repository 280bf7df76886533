"""Targets along the cotangents: the paper's, and those of the same relative length."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from locoprop_optax._records.intermediates import LayerIntermediates
from locoprop_optax._utils.hyperparams import (
    ScalarOrSchedule,
    at,
    check_positive,
    check_share,
)
from locoprop_optax.targets._target import (
    Displacement,
    Target,
    no_average,
)


def _scaled(layer: LayerIntermediates, scale: Any) -> Displacement:
    """The displacement along the cotangents, with the gradient that comes with it."""
    outputs, gradient = jax.tree.map(
        lambda leaf: scale * leaf, (layer.cotangents, layer.gradient)
    )
    return Displacement(outputs, gradient)


def gradient_descent(learning_rate: ScalarOrSchedule) -> Target:
    r"""One step of gradient descent on the layer's output, as in the paper.

    .. math::
      t = f(a_0) - \gamma g

    Args:
      learning_rate: the activation learning rate :math:`\gamma > 0`, a float or a
        schedule. The cotangents of a mean over a batch are small by the size of the
        batch, so 10 is a usual value at a batch of 1000.

    Returns:
      The target.

    Raises:
      ValueError: if `learning_rate` is not positive.

    Example:
      >>> import locoprop_optax as loco
      >>> target = loco.targets.gradient_descent(10.0)

    References:
      Amid, Anil, Warmuth, 2022, equations 3 and 6.
    """
    check_positive("learning_rate (γ of the target)", learning_rate)

    def displace(layer, loss, state, count):
        del loss, state
        return _scaled(layer, at(learning_rate, count))

    return Target(lambda layer, params: (), displace)


def normalized(
    learning_rate: ScalarOrSchedule, decay: float = 0.9, *, by_unit: bool = False
) -> Target:
    r"""A step of the same relative length in every layer.

    With :math:`n` rows, the per-example cotangents :math:`n g` are divided by their
    running root mean square, one number a layer or one a unit:

    .. math::
      t = f(a_0) - \gamma \frac{n g}{\sqrt{\hat v}}, \qquad
      v \leftarrow \beta v + (1 - \beta) \operatorname{mean}\big((n g)^2\big), \quad
      \hat v = \frac{v}{1 - \beta^{k}}

    after :math:`k` batches. Solvers without a learning rate of their own need this:
    the cotangents of different layers differ by orders of magnitude.

    Args:
      learning_rate: the relative distance :math:`\gamma > 0`, a float or a schedule.
      decay: :math:`\beta` in [0, 1). 0 takes each batch by itself.
      by_unit: whether each unit, an entry of the output's last axis, has a number of
        its own. Default False: one number for the layer.

    Returns:
      The target. Its state is :math:`v`, one number a layer, or one a unit.

    Raises:
      ValueError: if `learning_rate` is not positive or `decay` not in [0, 1).

    Example:
      >>> import locoprop_optax as loco
      >>> target = loco.targets.normalized(0.05)
    """
    check_positive("learning_rate (γ of the target)", learning_rate)
    check_share("decay", decay)

    def init(layer, params):
        return no_average(layer, params, *params["kernel"].shape[-1:] * by_unit)

    def refresh(layer, loss, state, count):
        del loss, count
        rows = math.prod(layer.cotangents.shape[:-1])
        per_example = rows * layer.cotangents.astype(state.total.dtype)
        axes = tuple(range(per_example.ndim - by_unit))
        return state.moved(jnp.mean(per_example**2, axis=axes), decay)

    def displace(layer, loss, state, count):
        del loss
        rows, mean_square = math.prod(layer.cotangents.shape[:-1]), state.value()
        per_rms = jnp.where(mean_square > 0, jax.lax.rsqrt(mean_square), 0.0)
        scale = (at(learning_rate, count) * rows * per_rms).astype(mean_square.dtype)
        if by_unit:
            return Displacement(scale * layer.cotangents)
        return _scaled(layer, scale)

    return Target(init, displace, refresh)
