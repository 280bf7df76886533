"""Local losses: the protocol, and those there are."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from locoprop_optax._utils.dtypes import at_least_float32
from locoprop_optax._utils.errors import LayerError
from locoprop_optax.losses._transfers import (
    IDENTITY,
    Elementwise,
    Transfer,
    as_transfer,
)


class Loss(Protocol):
    """What a local problem asks of its loss."""

    @property
    def curvature(self) -> float | None:
        """A bound on the second derivative in the pre-activation; None if unknown."""
        ...

    @property
    def is_matching(self) -> bool:
        """Whether `gradient` is the difference of `output` and the targets."""
        ...

    def output(self, preactivations: Array) -> Array:
        """Maps pre-activations to the space in which targets live."""
        ...

    def value(self, preactivations: Array, targets: Array) -> Array:
        """The loss, summed over examples and units."""
        ...

    def gradient(self, preactivations: Array, targets: Array) -> Array:
        """The derivative of `value` with respect to the pre-activations."""
        ...


LossFactory: TypeAlias = Callable[[Transfer], Loss]


@dataclass(frozen=True)
class _OfActivations:
    """A loss whose targets live where the transfer function leads."""

    transfer: Transfer

    def output(self, preactivations: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        """The activations :math:`f(a)`."""
        return self.transfer.function(preactivations)


@dataclass(frozen=True)
class MatchingLoss(_OfActivations):
    r"""The Bregman divergence :math:`D(a, t)` of one transfer function's potential.

    Attributes:
      transfer: the transfer function :math:`f`.
    """

    is_matching = True

    @property
    def curvature(self) -> float | None:
        """The bound of :math:`f'`."""
        return self.transfer.derivative_bound

    def value(
        self, preactivations: Float[Array, "*n d"], targets: Float[Array, "*n d"]
    ) -> Float[Array, ""]:
        r"""The sum of :math:`F(a) - a t + F^*(t)` over examples and units.

        It is summed in float32 at least. Outside the range of :math:`f`, where
        :math:`F^*(t)` is infinite, that of a near point of the range stands for it;
        where the transfer function has no :math:`F^*`, zero does. Targets of a softmax
        that sum to 1 but for rounding are taken as shares of their sum.
        """
        if self.transfer.potential is None:
            raise LayerError(
                f"The matching loss of {self.transfer.name!r} has no value: its "
                "potential is not given. Register a Transfer that has one, or use a "
                "solver that needs only gradients."
            )
        a, t = at_least_float32((preactivations, targets))
        rounding = float(jnp.finfo(jnp.result_type(targets)).eps)
        return _matching_value(self.transfer, rounding, a, t)

    def gradient(
        self, preactivations: Float[Array, "*n d"], targets: Float[Array, "*n d"]
    ) -> Float[Array, "*n d"]:
        """The difference :math:`f(a) - t`."""
        return self.output(preactivations) - targets


def _divergence(transfer: Transfer, rounding: float, a: Array, t: Array) -> Array:
    if transfer.divergence is None:
        assert transfer.potential is not None
        value = jnp.sum(transfer.potential(a)) - jnp.sum(a * t)
        conjugate = transfer.conjugate
        return value if conjugate is None else value + jnp.sum(conjugate(t))
    if transfer.over_last_axis:
        return _divergence_of_rows(transfer, rounding, a, t)
    within = transfer.project(t)
    divergence = jnp.maximum(transfer.divergence(a, within), 0)
    return jnp.sum(divergence) + jnp.sum(a * (within - t))


def _divergence_of_rows(
    transfer: Transfer, rounding: float, a: Array, t: Array
) -> Array:
    """Of shares: a constant in a row of a counts only as far as t misses the sum 1."""
    assert transfer.divergence is not None
    total = jnp.sum(t, axis=-1, keepdims=True)
    size = jnp.maximum(1, jnp.sum(jnp.abs(t), axis=-1, keepdims=True))
    rounded = jnp.abs(total - 1) <= rounding * t.shape[-1] * size
    t = jnp.where(rounded, t / jnp.where(rounded, total, 1), t)
    missing = jnp.where(rounded, 0, 1 - total)
    constant = jnp.max(a, axis=-1, keepdims=True)
    within = transfer.project(t)
    divergence = jnp.maximum(transfer.divergence(a, within), 0)
    beyond = jnp.sum((a - constant) * (within - t)) + jnp.sum(constant * missing)
    return jnp.sum(divergence) + beyond


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _matching_value(transfer: Transfer, rounding: float, a: Array, t: Array) -> Array:
    return _divergence(transfer, rounding, a, t)


@_matching_value.defjvp
def _matching_value_jvp(transfer, rounding, primals, tangents):
    (a, t), (a_dot, t_dot) = primals, tangents
    of_targets = partial(_divergence, transfer, rounding, a)
    value, along_t = jax.jvp(of_targets, (t,), (t_dot,))
    return value, along_t + jnp.sum((transfer.function(a) - t) * a_dot)


def matching_loss(transfer: str | Transfer | Elementwise | None = None) -> LossFactory:
    r"""The loss of LocoProp-M: each layer's transfer function brings its own.

    .. math::
      D(a, t) = F(a) - a t + F^*(t), \quad \nabla F = f

    Args:
      transfer: the transfer function to use in every layer. Default None: the one
        that was found for the layer when its intermediates were captured.

    Returns:
      A function from a layer's transfer function to its `Loss`.

    Raises:
      ValueError: if the name is not known.

    Example:
      >>> import jax.numpy as jnp
      >>> import locoprop_optax as loco
      >>> loss = loco.losses.matching_loss()(loco.losses.as_transfer("relu"))
      >>> loss.gradient(jnp.array([-1.0, 2.0]), jnp.array([0.0, 1.5])).tolist()
      [0.0, 0.5]

    References:
      Amid, Anil, Warmuth, 2022, section 3.2.
    """
    if transfer is None:
        return MatchingLoss
    fixed = MatchingLoss(as_transfer(transfer))
    return lambda _: fixed


@dataclass(frozen=True)
class SquaredLossAfterActivation(_OfActivations):
    r"""The squared distance :math:`\tfrac12 \lVert f(a) - t \rVert^2`.

    Attributes:
      transfer: the transfer function :math:`f`.
    """

    is_matching = False
    curvature = None

    def value(
        self, preactivations: Float[Array, "*n d"], targets: Float[Array, "*n d"]
    ) -> Float[Array, ""]:
        """Half the sum of the squared differences."""
        a, t = at_least_float32((preactivations, targets))
        return 0.5 * jnp.sum((self.output(a) - t) ** 2)

    def gradient(
        self, preactivations: Float[Array, "*n d"], targets: Float[Array, "*n d"]
    ) -> Float[Array, "*n d"]:
        r"""The differences, pulled back through :math:`f`."""
        outputs, pull_back = jax.vjp(self.output, preactivations)
        return pull_back(outputs - targets)[0]


def squared_loss(after_activation: bool = False) -> LossFactory:
    r"""The loss of LocoProp-S: the squared distance before the activation.

    .. math::
      \tfrac12 \lVert a - t \rVert^2 \qquad \text{or, after the activation,} \qquad
      \tfrac12 \lVert f(a) - t \rVert^2

    The first is the matching loss of the identity, whatever the layer's transfer
    function. The second is that of classic target propagation: not convex, flat where
    :math:`f` saturates, and without a bound that `majorized_newton` could use; its
    first gradient is the backprop gradient times :math:`f'`.

    Args:
      after_activation: whether to compare activations instead of pre-activations.

    Returns:
      A function from a layer's transfer function to its `Loss`.

    Example:
      >>> import jax.numpy as jnp
      >>> import locoprop_optax as loco
      >>> loss = loco.losses.squared_loss()(loco.losses.as_transfer("relu"))
      >>> float(loss.value(jnp.array([3.0]), jnp.array([1.0])))
      2.0

    References:
      Amid, Anil, Warmuth, 2022, section 3.1; Lee, Zhang, Fischer, Bengio,
      `Difference Target Propagation <https://arxiv.org/abs/1412.7525>`_, 2015.
    """
    return SquaredLossAfterActivation if after_activation else matching_loss(IDENTITY)
