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

from locoprop_optax._dtypes import at_least_float32
from locoprop_optax._hyperparams import (
    ScalarOrSchedule,
    at,
    check_not_negative,
    check_positive,
    check_share,
)
from locoprop_optax._intermediates import LayerIntermediates
from locoprop_optax._inverse import inverse
from locoprop_optax._layers import LayerError
from locoprop_optax._linear_maps import DENSE, Channelwise
from locoprop_optax.losses import Loss


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
      update: from (intermediates, local loss, state, count) to (displacement, new
        state).
    """

    init: Callable[[Array], Any]
    update: Callable[[LayerIntermediates, Loss, Any, Array], tuple[Displacement, Any]]


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

    def update(layer, loss, state, count):
        del loss
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
    check_share("decay", decay)

    def init(kernel):
        return _zeros(kernel, *kernel.shape[-1:] * by_unit)

    def update(layer, loss, state, count):
        del loss
        rows = math.prod(layer.cotangents.shape[:-1])
        per_example = rows * layer.cotangents.astype(state.dtype)
        axes = tuple(range(per_example.ndim - by_unit))
        mean_square = jnp.mean(per_example**2, axis=axes)
        if by_unit:
            _check_units(state.shape[-1], layer, "normalized(by_unit=True)")
        state, unbiased = _average(state, mean_square, decay, count)
        per_rms = jnp.where(unbiased > 0, jax.lax.rsqrt(unbiased), 0.0)
        scale = (at(learning_rate, count) * rows * per_rms).astype(state.dtype)
        if by_unit:
            return Displacement(scale * layer.cotangents), state
        return _scaled(layer, scale), state

    return Target(init, update)


def natural_gradient(
    learning_rate: ScalarOrSchedule,
    damping: ScalarOrSchedule = 0.1,
    decay: float = 0.9,
) -> Target:
    r"""A natural-gradient step of the layer's output: the output side of K-FAC.

    With :math:`n` examples and the second moment :math:`C` of their own cotangents,

    .. math::
      t = f(a_0) - \gamma\, n g \Big(\hat C + \lambda
      \tfrac{\operatorname{tr} \hat C}{d} I\Big)^{-1}, \qquad
      C \leftarrow \beta C
      + (1 - \beta) \operatorname{mean}\big( n g_i\, n g_i^\top \big), \quad
      \hat C = \frac{C}{1 - \beta^k}

    after :math:`k` batches. :math:`C` is made of the sampled cotangents if the
    intermediates carry them, and is then the Fisher matrix; else it is the empirical
    Fisher matrix. With `losses.squared_loss` and `solvers.exact` this is K-FAC. Each
    row of a Dense layer counts as an example; a convolution's positions do not, but
    share one second moment (KFC), as the heads of an attention projection do.

    Args:
      learning_rate: :math:`\gamma > 0`, a float or a schedule.
      damping: :math:`\lambda \ge 0` relative to the mean eigenvalue of
        :math:`\hat C`; a float or a schedule.
      decay: :math:`\beta` in [0, 1). 0 takes each batch by itself.

    Returns:
      The target. Its state is :math:`C` for the units of the output's last axis, an
      array of shape `kernel.shape[:-2] + (d, d)`: a copy for each entry of the
      kernel's other axes, which may count the layers of a stack.

    Raises:
      ValueError: if a number is out of its range; when a step is traced, if the units
        of a layer's output are not those of its kernel's last axis.

    Example:
      >>> import locoprop_optax as loco
      >>> kfac = loco.scale_by_locoprop(
      ...     loss=loco.losses.squared_loss(),
      ...     target=loco.targets.natural_gradient(1.0),
      ...     solver=loco.solvers.exact(damping=0.1))

    References:
      Martens, Grosse, `Optimizing Neural Networks with Kronecker-factored Approximate
      Curvature <https://arxiv.org/abs/1503.05671>`_, 2015, section 3; Grosse, Martens,
      `A Kronecker-factored Approximate Fisher Matrix for Convolution Layers
      <https://arxiv.org/abs/1602.01407>`_, 2016.
    """
    check_positive("learning_rate (γ of the target)", learning_rate)
    check_not_negative("damping", damping)
    check_share("decay", decay)

    def update(layer, loss, state, count):
        del loss
        units = layer.cotangents.shape[-1]
        _check_units(state.shape[-1], layer, "natural_gradient")
        sampled = layer.sampled_cotangents
        seen = layer.cotangents if sampled is None else sampled
        per_example = _examples(layer, seen) * at_least_float32(seen.reshape(-1, units))
        second_moment = per_example.T @ per_example / len(per_example)
        state, unbiased = _average(state, second_moment, decay, count)
        mean = jnp.trace(unbiased) / units
        diagonal = at(damping, count) * mean + (mean == 0)
        metric = inverse(unbiased + diagonal * jnp.eye(units, dtype=state.dtype))
        rows = _examples(layer, layer.cotangents)
        transform = (at(learning_rate, count) * rows * metric).astype(state.dtype)
        if layer.linear_map == DENSE:
            outputs, gradient = jax.tree.map(
                lambda leaf: leaf @ transform, (layer.cotangents, layer.gradient)
            )
            return Displacement(outputs, gradient), state
        return Displacement(layer.cotangents @ transform), state

    return Target(lambda kernel: _zeros(kernel, *2 * kernel.shape[-1:]), update)


def gauss_newton(
    learning_rate: ScalarOrSchedule,
    damping: ScalarOrSchedule = 0.1,
    decay: float = 0.9,
) -> Target:
    r"""A Gauss-Newton step of the layer's output.

    With the Jacobian :math:`J` of the network's output in the layer's, and the Hessian
    :math:`H` of the loss of one example in the network's output,

    .. math::
      t = f(a_0) - \gamma\, n g \Big(\hat C + \lambda
      \tfrac{\operatorname{tr} \hat C}{d} I\Big)^{-1}, \qquad
      C \approx \operatorname{mean}\big( J^\top H J \big) .

    It is `natural_gradient` for intermediates that must carry sampled cotangents: if
    labels are sampled so that the loss's gradients in the network's output have the
    covariance :math:`H`, as those of a likelihood in its natural parameters have, then
    the expectation of their second moment is :math:`J^\top H J`.

    Args:
      learning_rate: as in `natural_gradient`.
      damping: as in `natural_gradient`.
      decay: as in `natural_gradient`.

    Returns:
      The target, as `natural_gradient`.

    Raises:
      ValueError: as `natural_gradient`; when a step is traced, if there are no sampled
        cotangents.

    Example:
      >>> import locoprop_optax as loco
      >>> target = loco.targets.gauss_newton(1.0, damping=0.03)

    References:
      Botev, Ritter, Barber, `Practical Gauss-Newton Optimisation for Deep Learning
      <https://arxiv.org/abs/1706.03662>`_, 2017; Martens, `New Insights and
      Perspectives on the Natural Gradient Method <https://arxiv.org/abs/1412.1193>`_,
      2020, section 9.
    """
    natural = natural_gradient(learning_rate, damping, decay)

    def update(layer, loss, state, count):
        if layer.sampled_cotangents is None:
            raise LayerError(
                "targets.gauss_newton needs sampled cotangents, and its record has "
                "none. Add them with locoprop_optax.add_sampled_cotangents, or use "
                "targets.natural_gradient, which does without."
            )
        return natural.update(layer, loss, state, count)

    return Target(natural.init, update)


def clipped(target: Target) -> Target:
    r"""Another target, moved to the range of the transfer function.

    .. math::
      t = \operatorname{clip}\big(f(a_0) - \delta\big)

    A tanh is then asked for nothing beyond 1, so that each local problem has a finite
    minimum, or its infimum at zero loss. For the squared loss, whose targets are
    pre-activations, it changes nothing.

    Args:
      target: the other target.

    Returns:
      The target.

    Example:
      >>> import locoprop_optax as loco
      >>> target = loco.targets.clipped(loco.targets.gradient_descent(10.0))
    """

    def update(layer, loss, state, count):
        displacement, state = target.update(layer, loss, state, count)
        start = loss.output(layer.preactivations)
        goal = loss.project(start - displacement.outputs)
        return Displacement(start - goal), state

    return Target(target.init, update)


def momentum(target: Target, decay: float = 0.9) -> Target:
    r"""Another target, with momentum in the mean over the examples.

    Examples differ from batch to batch; what can be remembered of their displacements
    :math:`\delta_i` is the mean. Each is moved on by its velocity,

    .. math::
      \delta_i' = \delta_i + \mu v, \qquad
      v \leftarrow \mu v + \operatorname{mean}_i \delta_i ,

    so that the mean displacement is the new velocity.

    Args:
      target: the other target.
      decay: :math:`\mu` in [0, 1).

    Returns:
      The target. Its state holds :math:`v`, one number for each unit, beside the state
      of the other target.

    Raises:
      ValueError: if `decay` is not in [0, 1); when a step is traced, if the units of a
        layer's output are not those of its kernel's last axis.

    Example:
      >>> import locoprop_optax as loco
      >>> target = loco.targets.momentum(loco.targets.normalized(0.05), 0.9)

    References:
      Polyak, "Some methods of speeding up the convergence of iteration methods", 1964.
    """
    check_share("decay", decay)

    def init(kernel):
        return target.init(kernel), _zeros(kernel, kernel.shape[-1])

    def update(layer, loss, state, count):
        inner, velocity = state
        units = layer.cotangents.shape[-1]
        _check_units(velocity.shape[-1], layer, "momentum")
        displacement, inner = target.update(layer, loss, inner, count)
        kept = decay * velocity
        outputs = displacement.outputs + kept.reshape(-1, units)[0]
        mean = jnp.mean(displacement.outputs.reshape(-1, units), axis=0)
        velocity = kept + mean.astype(kept.dtype)
        return Displacement(outputs), (inner, velocity)

    return Target(init, update)


def _zeros(kernel: Array, *shape: int) -> Array:
    """State for a layer, with room for each layer of a scanned stack."""
    dtype = jnp.promote_types(kernel.dtype, "float32")
    return jnp.zeros(kernel.shape[:-2] + shape, dtype)


def _examples(layer: LayerIntermediates, cotangents: Array) -> int:
    """How many losses the loss is the mean of, if each row of a Dense layer has one.

    The positions of a convolution share the loss of their example.
    """
    if isinstance(layer.linear_map, Channelwise):
        return cotangents.shape[0]
    return math.prod(cotangents.shape[:-1])


def _average(
    state: Array, now: Array, decay: float, count: Array
) -> tuple[Array, Array]:
    """A running average, and its unbiased value, shaped as `now`."""
    state = decay * state + (1 - decay) * now.astype(state.dtype)
    average = state.reshape(-1, *now.shape)[0]
    return state, average / (1 - decay ** (count + 1.0)).astype(state.dtype)


def _check_units(known: int, layer: LayerIntermediates, what: str) -> None:
    units = layer.cotangents.shape[-1]
    if known != units:
        raise LayerError(
            f"{what} keeps something for each unit: the kernel's last axis counts "
            f"{known}, but the layer's output has {units} units. Use another target, "
            "or name the layer in `exclude=`."
        )
