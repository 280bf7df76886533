"""Regularizers: the protocol, none, and the squared distance."""

from dataclasses import dataclass, replace
from typing import Protocol, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from locoprop_optax._records.linear_maps import LayerParams
from locoprop_optax._utils.hyperparams import ScalarOrSchedule, at, check_not_negative


class Regularizer(Protocol):
    """What a local problem asks of its regularizer; a pytree."""

    @property
    def curvature(self) -> float | Array | None:
        """A bound on the second derivative; None if there is none."""
        ...

    def at(self, count: Array) -> Self:
        """The same with every schedule replaced by its value at step `count`."""
        ...

    def value(self, step: LayerParams, params: LayerParams) -> Array:
        """The penalty for a step away from `params`."""
        ...

    def gradient(self, step: LayerParams, params: LayerParams) -> LayerParams:
        """The derivative of `value` with respect to `step`."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SquaredL2:
    r"""The penalty :math:`\tfrac12 \lambda \lVert \theta - \theta_0 \rVert^2`.

    Attributes:
      strength: :math:`\lambda`, or a schedule of it.
    """

    strength: ScalarOrSchedule

    @property
    def curvature(self) -> float | Array:
        r"""The second derivative :math:`\lambda`."""
        assert not callable(self.strength)
        return self.strength

    def at(self, count: Array) -> "SquaredL2":
        """The same with its strength at step `count`."""
        return replace(self, strength=at(self.strength, count))

    def value(self, step: LayerParams, params: LayerParams) -> Float[Array, ""]:
        """The penalty, summed over the layer's parameters."""
        del params
        squares = sum(jnp.sum(s**2) for s in step.values())
        return jnp.asarray(0.5 * self.curvature * squares)

    def gradient(self, step: LayerParams, params: LayerParams) -> LayerParams:
        r"""The vector :math:`\lambda (\theta - \theta_0)`."""
        del params
        return {name: self.curvature * s for name, s in step.items()}

    def mirror_step(
        self, step: LayerParams, gradient: LayerParams, params: LayerParams
    ) -> LayerParams:
        r"""The next step of `solvers.mirror_descent`, gradient descent by 1 / λ."""
        del params
        return {n: s - gradient[n] / self.curvature for n, s in step.items()}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NoRegularizer:
    """The penalty that is always zero."""

    @property
    def curvature(self) -> float:
        """Zero."""
        return 0.0

    def at(self, count: Array) -> "NoRegularizer":
        """Itself."""
        del count
        return self

    def value(self, step: LayerParams, params: LayerParams) -> Float[Array, ""]:
        """Zero."""
        del step, params
        return jnp.zeros(())

    def gradient(self, step: LayerParams, params: LayerParams) -> LayerParams:
        """Zeros."""
        del params
        return {name: jnp.zeros_like(s) for name, s in step.items()}


def none() -> NoRegularizer:
    """No regularizer: what holds the parameters is the small number of steps.

    Returns:
      The regularizer.

    Example:
      >>> import locoprop_optax as loco
      >>> loco.regularizers.none().curvature
      0.0
    """
    return NoRegularizer()


def squared_l2(strength: ScalarOrSchedule) -> SquaredL2:
    r"""The squared distance to the old parameters.

    .. math::
      R(\Delta) = \tfrac12 \lambda \lVert \Delta \rVert^2

    Args:
      strength: :math:`\lambda \ge 0`, a float or a schedule.

    Returns:
      The regularizer.

    Raises:
      ValueError: if `strength` is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> import locoprop_optax as loco
      >>> r = loco.regularizers.squared_l2(0.5)
      >>> float(r.value({"kernel": jnp.array([2.0])}, {"kernel": jnp.zeros(1)}))
      1.0

    References:
      Amid, Anil, Warmuth, 2022, equation 2.
    """
    check_not_negative("strength", strength)
    return SquaredL2(strength)
