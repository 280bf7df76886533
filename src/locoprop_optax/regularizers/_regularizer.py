"""Regularizers: the protocol, and those that are quadratic."""

from dataclasses import dataclass, field, replace
from typing import Protocol, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from locoprop_optax._records.linear_maps import LayerParams
from locoprop_optax._utils.errors import LayerError
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
    r"""The penalty :math:`\tfrac12 \lambda \lVert \theta - c \rVert^2`.

    Attributes:
      strength: :math:`\lambda`, or a schedule of it.
      from_zero: whether :math:`c = 0`, as in weight decay; else :math:`c = \theta_0`,
        and the penalty is on the step.
    """

    strength: ScalarOrSchedule
    from_zero: bool = field(default=False, metadata={"static": True})

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
        offsets = self._offsets(step, params).values()
        return jnp.asarray(0.5 * self.curvature * sum(jnp.sum(o**2) for o in offsets))

    def gradient(self, step: LayerParams, params: LayerParams) -> LayerParams:
        r"""The vector :math:`\lambda (\theta - c)`."""
        offsets = self._offsets(step, params).items()
        return {name: self.curvature * offset for name, offset in offsets}

    def mirror_step(
        self, step: LayerParams, gradient: LayerParams, params: LayerParams
    ) -> LayerParams:
        r"""The next step of `solvers.mirror_descent`, gradient descent by 1 / λ."""
        del params
        if self.from_zero:
            raise LayerError(
                "mirror_descent needs a distance to the old weights, which "
                "weight_decay is not. Use regularizers.squared_l2, or another solver."
            )
        return {n: s - gradient[n] / self.curvature for n, s in step.items()}

    def _offsets(self, step: LayerParams, params: LayerParams) -> LayerParams:
        if not self.from_zero:
            return step
        return {name: params[name] + s for name, s in step.items()}


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


def weight_decay(strength: ScalarOrSchedule) -> SquaredL2:
    r"""Weight decay inside the local problem.

    .. math::
      R(\Delta) = \tfrac12 \lambda \lVert \theta_0 + \Delta \rVert^2

    Unlike decay applied after the step, the solver weighs it against the local loss.

    Args:
      strength: :math:`\lambda \ge 0`, a float or a schedule.

    Returns:
      The regularizer.

    Raises:
      ValueError: if `strength` is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> import locoprop_optax as loco
      >>> r = loco.regularizers.weight_decay(0.5)
      >>> float(r.value({"kernel": jnp.zeros(1)}, {"kernel": jnp.array([2.0])}))
      1.0
    """
    check_not_negative("strength", strength)
    return SquaredL2(strength, from_zero=True)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sum:
    """The sum of several penalties.

    Attributes:
      parts: the penalties.
    """

    parts: tuple[Regularizer, ...]

    @property
    def curvature(self) -> float | Array | None:
        """The sum of the bounds; None if a part has none."""
        total: float | Array = 0.0
        for part in self.parts:
            if part.curvature is None:
                return None
            total = total + part.curvature
        return total

    def at(self, count: Array) -> "Sum":
        """The same with each part at step `count`."""
        return Sum(tuple(part.at(count) for part in self.parts))

    def value(self, step: LayerParams, params: LayerParams) -> Float[Array, ""]:
        """The sum of the parts' values."""
        return jnp.asarray(sum(part.value(step, params) for part in self.parts))

    def gradient(self, step: LayerParams, params: LayerParams) -> LayerParams:
        """The sum of the parts' gradients."""
        gradients = [part.gradient(step, params) for part in self.parts]
        return {name: jnp.asarray(sum(g[name] for g in gradients)) for name in step}


def sum_of(*parts: Regularizer) -> Sum:
    """The sum of several regularizers.

    Args:
      *parts: the regularizers, at least one.

    Returns:
      The regularizer.

    Raises:
      ValueError: if there is none.

    Example:
      >>> import locoprop_optax as loco
      >>> r = loco.regularizers
      >>> r.sum_of(r.squared_l2(1.0), r.weight_decay(0.5)).curvature
      1.5
    """
    if not parts:
        raise ValueError("sum_of needs at least one regularizer.")
    return Sum(parts)
