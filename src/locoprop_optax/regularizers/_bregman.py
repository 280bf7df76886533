"""Bregman divergences of a layer's parameters, as regularizers."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from locoprop_optax._records.linear_maps import LayerParams
from locoprop_optax._utils.errors import LayerError
from locoprop_optax._utils.hyperparams import (
    ScalarOrSchedule,
    at,
    check_positive,
    check_static,
)
from locoprop_optax.losses import MatchingLoss
from locoprop_optax.losses._potentials import exponential_remainder
from locoprop_optax.losses._transfers import Transfer

OfTwo: TypeAlias = Callable[[Array, Array], Array]


@dataclass(frozen=True)
class Mirror:
    r"""A map :math:`\nabla\psi` of weights, in a form that keeps small steps whole.

    Attributes:
      name: what it is called in messages.
      rise: from (θ, Δ) to :math:`\nabla\psi(\theta + \Delta) - \nabla\psi(\theta)`.
      divergence: from (θ, Δ) to :math:`D_\psi(\theta + \Delta, \theta)`, elementwise.
      move: the inverse of `rise`: from (θ, its result) to Δ. None if it is not known.
      derivative_bound: the smallest :math:`c \ge \psi''`; None if there is none.
    """

    name: str
    rise: OfTwo
    divergence: OfTwo
    move: OfTwo | None = None
    derivative_bound: float | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bregman:
    r"""The penalty :math:`\lambda D_\psi(\theta, \theta_0)`.

    Attributes:
      strength: :math:`\lambda`, or a schedule of it.
      mirror: :math:`\nabla\psi`.
    """

    strength: ScalarOrSchedule
    mirror: Mirror = field(metadata={"static": True})

    @property
    def curvature(self) -> float | Array | None:
        r"""The bound :math:`\lambda \max \psi''`; None if there is none."""
        bound = self.mirror.derivative_bound
        return None if bound is None else self._strength * bound

    @property
    def _strength(self) -> float | Array:
        assert not callable(self.strength)
        return self.strength

    def at(self, count: Array) -> "Bregman":
        """The same with its strength at step `count`."""
        return replace(self, strength=at(self.strength, count))

    def value(self, step: LayerParams, params: LayerParams) -> Float[Array, ""]:
        """The penalty, summed over the layer's parameters."""
        parts = [jnp.sum(self.mirror.divergence(params[n], s)) for n, s in step.items()]
        return jnp.asarray(self._strength * sum(parts))

    def gradient(self, step: LayerParams, params: LayerParams) -> LayerParams:
        r"""The vector :math:`\lambda (\nabla\psi(\theta) - \nabla\psi(\theta_0))`."""
        rise = self.mirror.rise
        return {n: self._strength * rise(params[n], s) for n, s in step.items()}

    def mirror_step(
        self, step: LayerParams, gradient: LayerParams, params: LayerParams
    ) -> LayerParams:
        """The next step of `solvers.mirror_descent`."""
        move = self.mirror.move
        if move is None:
            raise LayerError(
                f"mirror_descent needs the inverse of {self.mirror.name!r}. Give it to "
                "the Transfer as `inverse=`."
            )
        return {
            n: s + move(params[n] + s, -gradient[n] / self._strength)
            for n, s in step.items()
        }


def bregman(strength: ScalarOrSchedule, mirror: Transfer | Mirror) -> Bregman:
    r"""A Bregman divergence of the new parameters to the old ones.

    .. math::
      R(\Delta) = \lambda \big[ \psi(\theta_0 + \Delta) - \psi(\theta_0)
      - \langle \nabla\psi(\theta_0), \Delta \rangle \big]

    Args:
      strength: :math:`\lambda > 0`, a float or a schedule.
      mirror: the transfer function :math:`\nabla\psi` on weights, with its `potential`
        :math:`\psi`; its `inverse` is needed by `solvers.mirror_descent`, its
        `derivative_bound` by `solvers.majorized_newton`. Or a `Mirror`, which says how
        small steps are taken without cancellation.

    Returns:
      The regularizer.

    Raises:
      ValueError: if `strength` is not positive.

    Example:
      >>> import locoprop_optax as loco
      >>> r = loco.regularizers.bregman(0.5, loco.losses.as_transfer("identity"))
      >>> r.curvature
      0.5

    References:
      Amid, Anil, Warmuth, 2022, section 2.
    """
    check_positive("strength", strength)
    made = as_mirror(mirror) if isinstance(mirror, Transfer) else mirror
    return Bregman(strength, made)


@cache
def as_mirror(transfer: Transfer) -> Mirror:
    """A transfer function as a map of weights, by differences of its values."""
    dual, primal = transfer.function, transfer.inverse
    divergence = MatchingLoss(transfer).value

    def move(theta, change):
        assert primal is not None
        return primal(dual(theta) + change) - theta

    return Mirror(
        transfer.name,
        rise=lambda theta, step: dual(theta + step) - dual(theta),
        divergence=lambda theta, step: divergence(theta + step, dual(theta)),
        move=None if primal is None else move,
        derivative_bound=transfer.derivative_bound,
    )


def relative_entropy(strength: ScalarOrSchedule) -> Bregman:
    r"""The unnormalized relative entropy to the old parameters, which are positive.

    .. math::
      R(\Delta) = \lambda \sum \theta \log \frac{\theta}{\theta_0} - \theta + \theta_0

    With `solvers.mirror_descent` it gives the unnormalized exponentiated gradient,
    :math:`\theta_0\, e^{-\nabla / \lambda}`. All parameters of a local layer, its bias
    too, have to be positive and stay so; others become NaN.

    Args:
      strength: :math:`\lambda > 0`, a float or a schedule.

    Returns:
      The regularizer. Its curvature has no bound.

    Raises:
      ValueError: if `strength` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> import locoprop_optax as loco
      >>> r = loco.regularizers.relative_entropy(1.0)
      >>> step, params = {"kernel": jnp.array([1.0])}, {"kernel": jnp.array([1.0])}
      >>> round(float(r.value(step, params)), 4)  # 2 log 2 - 2 + 1
      0.3863

    References:
      Kivinen, Warmuth, "Exponentiated Gradient versus Gradient Descent for Linear
      Predictors", 1997.
    """
    return bregman(strength, _LOGARITHM)


def signed_entropy(strength: ScalarOrSchedule, scale: float = 1.0) -> Bregman:
    r"""The relative entropy for parameters of both signs.

    .. math::
      \psi(\theta) = \theta \operatorname{arsinh}\frac{\theta}{\beta}
      - \sqrt{\theta^2 + \beta^2}

    With `solvers.mirror_descent` it gives the exponentiated gradient EG± for
    :math:`\theta = \theta^+ - \theta^-` with :math:`\theta^+ \theta^- = \beta^2 / 4`.
    Large weights move in proportion to their size, small ones additively.

    Args:
      strength: :math:`\lambda > 0`, a float or a schedule.
      scale: :math:`\beta > 0`, the size of weights that count as small; a Python float.

    Returns:
      The regularizer. The bound of its curvature is :math:`\lambda / \beta`.

    Raises:
      TypeError: if `scale` is no Python number.
      ValueError: if `strength` or `scale` is not positive.

    Example:
      >>> import locoprop_optax as loco
      >>> loco.regularizers.signed_entropy(0.5, scale=0.1).curvature
      5.0

    References:
      Ghai, Hazan, Singer, `Exponentiated Gradient Meets Gradient Descent
      <https://arxiv.org/abs/1902.01903>`_, 2020.
    """
    check_static("scale", scale)
    check_positive("scale", scale)
    return bregman(strength, _arsinh(scale))


_LOGARITHM = Mirror(
    "log",
    rise=lambda theta, step: jnp.log1p(step / theta),
    divergence=lambda theta, step: (
        (theta + step) * exponential_remainder(-jnp.log1p(step / theta))
    ),
    move=lambda theta, change: theta * jnp.expm1(change),
)


@cache
def _arsinh(scale: float) -> Mirror:
    r"""The map :math:`\operatorname{arsinh}(\theta / \beta)`."""

    def rise(theta, step):
        u, v = (theta + step) / scale, theta / scale
        cu, cv = jnp.hypot(u, 1), jnp.hypot(v, 1)  # sinh of the difference, two ways
        apart, same = u * cv - v * cu, u * cv + v * cu
        near = u * v > 0
        ratio = (step / scale) * (u + v) / jnp.where(near, same, 1)
        return jnp.arcsinh(jnp.where(near, ratio, apart))

    def divergence(theta, step):
        new, change = theta + step, rise(theta, step)
        odd = exponential_remainder(change) - exponential_remainder(-change)
        even = 2 * jnp.sinh(0.5 * change) ** 2
        return jnp.maximum(jnp.hypot(new, scale) * even - 0.5 * new * odd, 0)

    def move(theta, change):
        grown = 2 * jnp.sinh(0.5 * change) ** 2
        return theta * grown + jnp.hypot(theta, scale) * jnp.sinh(change)

    return Mirror(f"arsinh({scale:g})", rise, divergence, move, 1 / scale)
