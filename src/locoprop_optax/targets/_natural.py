"""Targets along the cotangents in the metric of their second moment."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from locoprop_optax._problems.inverse import in_full_precision, inverse
from locoprop_optax._records.intermediates import LayerIntermediates
from locoprop_optax._utils.average import Average
from locoprop_optax._utils.dtypes import at_least_float32
from locoprop_optax._utils.hyperparams import (
    ScalarOrSchedule,
    at,
    check_not_negative,
    check_positive,
    check_share,
)
from locoprop_optax.targets._target import (
    Displacement,
    Target,
    no_average,
    zeros_for,
)

# Where a softmax is sure, sampled cotangents vanish, those of a wrong label do not.
LEAST_SHARE = 1e-6
# Cotangents below 1e-15 have a second moment whose inverse float32 does not hold.
LEAST_DAMPING = 1e-30


def natural_gradient(
    learning_rate: ScalarOrSchedule,
    damping: ScalarOrSchedule = 0.1,
    decay: float = 0.9,
) -> Target:
    r"""A natural-gradient step of the layer's output: the output side of K-FAC.

    With :math:`n` rows, and the Gauss-Newton matrix :math:`C` of the loss in the
    layer's output, summed over the rows,

    .. math::
      t = f(a_0) - \gamma\, n g \Big(\hat C + \lambda
      \tfrac{\operatorname{tr} \hat C}{d} I\Big)^{-1}, \qquad
      C \leftarrow \beta C + (1 - \beta) M, \quad
      \hat C = \frac{C}{1 - \beta^k}

    after :math:`k` batches, so that :math:`t - f(a_0)` is the Newton step of a row, if
    all have the same curvature. Wherever the loss has curvature, :math:`\tilde g` are
    the sampled cotangents, and :math:`C` is the Fisher matrix; else they are the
    layer's own times the root of the number of examples, which makes the empirical
    Fisher matrix of a loss that is a mean over examples. Each row of a Dense layer then
    counts as an example, and a convolution's positions as one. With
    `losses.squared_loss` and `solvers.exact` this is K-FAC. Heads of an attention
    projection share one second moment. An elementwise factor has one number for each
    unit.

    M is the second moment of the rows, :math:`E = \sum_{ip} \tilde g_{ip}\, \tilde
    g_{ip}^\top`. Where an example i has P positions p that meet the same parameters (of
    an image, of a sequence), its gradient is a sum over them, and may be far larger
    than if they were independent:

    .. math::
      M = E + \max(0, r - 1) \frac{\operatorname{tr} E}{\operatorname{tr} S} S, \qquad
      S = \sum_i \Big(\sum_p \tilde g_{ip}\Big) \Big(\sum_p \tilde
      g_{ip}\Big)^\top, \\
      r = \kappa s + (1 - \kappa) \big(1 - \tfrac{s}{P}\big), \qquad
      s = \frac{\operatorname{tr} S}{\operatorname{tr} E}, \quad
      \kappa = \frac{\sum_i \|\sum_p x_{ip}\|^2}{P \sum_{ip} \|x_{ip}\|^2} .

    r is how many times the trace of the Fisher matrix lies above that of independent
    positions, if the mean over positions and what differs from it are each independent
    between inputs and cotangents. :math:`\kappa` is 1 where the inputs are equal at all
    positions, as a bias' are (K-FAC "reduce"), and 1/P where they have nothing in
    common (about "expand", KFC). The first axis of rows counts examples.

    Args:
      learning_rate: :math:`\gamma > 0`, a float or a schedule.
      damping: :math:`\lambda \ge 0` relative to the mean eigenvalue of
        :math:`\hat C`, or to a millionth of that of this batch's own cotangents, if
        that is larger; a float or a schedule.
      decay: :math:`\beta` in [0, 1). 0 takes each batch by itself.

    Returns:
      The target. Its state is :math:`C` for the units of the output's last axis, and
      the damped inverse, both made anew at each refresh.

    Raises:
      ValueError: if a number is out of its range.

    Example:
      As the options of `scale_by_locoprop(layers, **kfac)`:

      >>> import locoprop_optax as loco
      >>> kfac = dict(
      ...     loss=loco.losses.squared_loss(),
      ...     target=loco.targets.natural_gradient(1.0),
      ...     solver=loco.solvers.exact(damping=0.1))

    References:
      Martens, Grosse, `Optimizing Neural Networks with Kronecker-factored Approximate
      Curvature <https://arxiv.org/abs/1503.05671>`_, 2015, section 3; Grosse, Martens,
      `A Kronecker-factored Approximate Fisher Matrix for Convolution Layers
      <https://arxiv.org/abs/1602.01407>`_, 2016; Eschenhagen, Immer, Turner, Schneider,
      Hennig, `Kronecker-Factored Approximate Curvature for Modern Neural Network
      Architectures <https://arxiv.org/abs/2311.00636>`_, 2023.
    """
    check_positive("learning_rate (γ of the target)", learning_rate)
    check_not_negative("damping", damping)
    check_share("decay", decay)

    @in_full_precision
    def refresh(layer, loss, state, count):
        del loss
        linear_map, units = layer.linear_map, layer.cotangents.shape[-1]
        own = linear_map.examples(layer.cotangents) ** 0.5 * at_least_float32(
            layer.cotangents
        )
        sampled = layer.sampled_cotangents
        seen = own if sampled is None else at_least_float32(sampled)
        moment = _second_moment(layer, seen)
        averaged = state.second_moment.moved(moment, decay)
        unbiased = averaged.value()
        mean = jnp.maximum(_trace(unbiased), LEAST_SHARE * jnp.sum(own**2)) / units
        diagonal = jnp.maximum(at(damping, count) * mean, LEAST_DAMPING)
        if linear_map.units_apart:
            metric = 1 / (unbiased + diagonal)
        else:
            eye = jnp.eye(units, dtype=unbiased.dtype)
            metric = inverse(unbiased + diagonal * eye)
        return NaturalGradientState(averaged, metric.astype(state.metric.dtype))

    @in_full_precision
    def displace(layer, loss, state, count):
        del loss
        rows = layer.cotangents.size // layer.cotangents.shape[-1]
        metric = at(learning_rate, count) * rows * state.metric
        metric = metric.astype(state.metric.dtype)
        product = jnp.multiply if layer.linear_map.units_apart else jnp.matmul
        outputs = product(layer.cotangents, metric)
        if not layer.linear_map.ends_in_units:
            return Displacement(outputs)
        gradient = _in_one(lambda rows: product(rows, metric), layer.gradient)
        return Displacement(outputs, gradient)

    def init(layer, params):
        units = params["kernel"].shape[-1]
        shape = (units,) if layer.linear_map.units_apart else (units, units)
        return NaturalGradientState(
            no_average(layer, params, *shape), zeros_for(layer, params, *shape)
        )

    return Target(init, displace, refresh, samples=True)


class NaturalGradientState(NamedTuple):
    """State of `natural_gradient` for one layer.

    Attributes:
      second_moment: C, averaged; its diagonal for an elementwise factor.
      metric: the damped inverse.
    """

    second_moment: Average
    metric: Float[Array, "*units"]


def _second_moment(layer: LayerIntermediates, cotangents: Array) -> Array:
    """M, of the units with one another, or of each by itself."""
    linear_map, units = layer.linear_map, cotangents.shape[-1]

    def of_rows(cotangents):
        rows = cotangents.reshape(-1, units)
        if linear_map.units_apart:
            return jnp.sum(jnp.square(rows), axis=0)
        return rows.T @ rows

    each = of_rows(cotangents)
    positions = tuple(range(1, cotangents.ndim - linear_map.outputs))
    number = math.prod(cotangents.shape[at] for at in positions)
    if number == 1:
        return each
    summed = of_rows(jnp.sum(cotangents, axis=positions))
    s = _trace(summed) / _trace(each)
    likeness = linear_map.likeness(layer.gradient, layer.inputs)
    excess = likeness * s + (1 - likeness) * (1 - s / number) - 1
    share = jnp.where(excess > 0, excess / s, 0.0).astype(summed.dtype)
    return each + share * summed


def _in_one(
    function: Callable[[Array], Array], params: Mapping[str, Array]
) -> dict[str, Array]:
    """Applies a function of rows to those of all of a layer's parameters at once."""
    parts = [part.reshape(-1, part.shape[-1]) for part in params.values()]
    ends = np.cumsum([len(part) for part in parts])[:-1]
    found = jnp.split(function(jnp.concatenate(parts)), ends)
    return {
        name: rows.reshape(params[name].shape)
        for name, rows in zip(params, found, strict=True)
    }


def _trace(moment: Array) -> Array:
    """Of a matrix, or of its diagonal."""
    return jnp.trace(moment) if moment.ndim > 1 else jnp.sum(moment)
