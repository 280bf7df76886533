r"""Targets: where each layer's output is asked to go.

A target turns a layer's cotangents :math:`g = \partial L / \partial a` into a
displacement :math:`\delta`; the local problem's target is then
:math:`t = f(a_0) - \delta` in the space that the local loss compares.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from locoprop_optax._hyperparams import ScalarOrSchedule, at, check_positive
from locoprop_optax._intermediates import LayerIntermediates


class Displacement(NamedTuple):
    r"""How far a layer is asked to move.

    Attributes:
      outputs: :math:`\delta`, shaped as the pre-activations.
      gradient: the gradient of the local loss before the first step, by parameter
        name, which is the layer's vector-Jacobian product with `outputs`. None if
        it does not follow from the backprop gradient and has to be computed.
    """

    outputs: Float[Array, "*n d_out"]
    gradient: Mapping[str, Array] | None = None


class Target(NamedTuple):
    """A target for one layer, as a pair of pure functions.

    Attributes:
      init: from a layer's kernel to the target's state for it, a pytree of arrays.
      update: from (intermediates, state, count) to (displacement, new state).
    """

    init: Callable[[Array], Any]
    update: Callable[[LayerIntermediates, Any, Array], tuple[Displacement, Any]]


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

    def update(layer, state, count):
        return _scaled(layer, at(learning_rate, count)), state

    return Target(lambda kernel: (), update)


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
      The target. Its state is :math:`v`, in an array of shape `kernel.shape[:-2]`,
      which has room for one number for each layer of a scanned stack; with `by_unit`
      it has the kernel's last axis, too.

    Raises:
      ValueError: if `learning_rate` is not positive or `decay` not in [0, 1).

    Example:
      >>> import locoprop_optax as loco
      >>> target = loco.targets.normalized(0.05)
    """
    check_positive("learning_rate (γ of the target)", learning_rate)
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), got {decay}.")

    def init(kernel):
        shape = kernel.shape[:-2] + kernel.shape[-1:] * by_unit
        return jnp.zeros(shape, jnp.promote_types(kernel.dtype, "float32"))

    def update(layer, state, count):
        rows = math.prod(layer.cotangents.shape[:-1])
        per_example = rows * layer.cotangents.astype(state.dtype)
        axes = tuple(range(per_example.ndim - by_unit))
        mean_square = jnp.mean(per_example**2, axis=axes)
        if by_unit and state.shape[-1] != mean_square.size:
            raise ValueError(
                f"normalized(by_unit=True): a kernel's last axis counts "
                f"{state.shape[-1]}, but its layer's output has {mean_square.size} "
                "units. Use by_unit=False for such a layer."
            )
        state = decay * state + (1 - decay) * mean_square
        moment = state.reshape(-1, *mean_square.shape)[0]
        unbiased = moment / (1 - decay ** (count + 1.0))
        per_rms = jnp.where(unbiased > 0, jax.lax.rsqrt(unbiased), 0.0)
        scale = (at(learning_rate, count) * rows * per_rms).astype(state.dtype)
        if by_unit:
            return Displacement(scale * layer.cotangents), state
        return _scaled(layer, scale), state

    return Target(init, update)
