r"""Local losses: what a layer's pre-activation is held against.

Every transfer function :math:`f = \nabla F` brings a loss of its own, the Bregman
divergence of its potential :math:`F`, called the matching loss:

.. math::
  D(a, t) = F(a) - \langle a, t \rangle + F^*(t), \qquad
  \nabla_a D(a, t) = f(a) - t .

It is convex in the pre-activation :math:`a` wherever :math:`f` is monotone, is never
negative, and is zero exactly where :math:`f(a) = t`.

References:
  Amid, Anil, Warmuth, `LocoProp: Enhancing BackProp via Local Loss Optimization
  <https://arxiv.org/abs/2106.06199>`_, 2022, section 3.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float

from locoprop_optax._transfers import (
    IDENTITY,
    Elementwise,
    Transfer,
    as_transfer,
    elu,
    known_transfers,
    leaky_relu,
    register_transfer,
)

__all__ = [
    "Loss",
    "LossFactory",
    "MatchingLoss",
    "Transfer",
    "as_transfer",
    "elu",
    "known_transfers",
    "leaky_relu",
    "matching_loss",
    "register_transfer",
    "squared_loss",
]


class Loss(Protocol):
    """What a local problem asks of its loss."""

    @property
    def curvature(self) -> float | None:
        """A bound on the second derivative in the pre-activation; None if unknown."""
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
class MatchingLoss:
    r"""The Bregman divergence :math:`D(a, t)` of one transfer function's potential.

    Attributes:
      transfer: the transfer function :math:`f`.
    """

    transfer: Transfer

    @property
    def curvature(self) -> float | None:
        """The bound of :math:`f'`."""
        return self.transfer.derivative_bound

    def output(self, preactivations: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        """The activations :math:`f(a)`."""
        return self.transfer.function(preactivations)

    def value(
        self, preactivations: Float[Array, "*n d"], targets: Float[Array, "*n d"]
    ) -> Float[Array, ""]:
        r"""The sum of :math:`F(a) - a t + F^*(t)` over examples and units.

        Without :math:`F^*` where the transfer function has none.
        """
        potential, conjugate = self.transfer.potential, self.transfer.conjugate
        if potential is None:
            raise ValueError(
                f"The matching loss of {self.transfer.name!r} has no value: its "
                "potential is not given. Its gradient does not need it."
            )
        value = jnp.sum(potential(preactivations)) - jnp.sum(preactivations * targets)
        return value if conjugate is None else value + jnp.sum(conjugate(targets))

    def gradient(
        self, preactivations: Float[Array, "*n d"], targets: Float[Array, "*n d"]
    ) -> Float[Array, "*n d"]:
        """The difference :math:`f(a) - t`."""
        return self.output(preactivations) - targets


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


def squared_loss() -> LossFactory:
    r"""The loss of LocoProp-S: the squared distance before the activation.

    .. math::
      \tfrac12 \lVert a - t \rVert^2

    It is the matching loss of the identity, whatever the layer's transfer function.

    Returns:
      A function from a layer's transfer function to its `Loss`.

    Example:
      >>> import jax.numpy as jnp
      >>> import locoprop_optax as loco
      >>> loss = loco.losses.squared_loss()(loco.losses.as_transfer("relu"))
      >>> float(loss.value(jnp.array([3.0]), jnp.array([1.0])))
      2.0

    References:
      Amid, Anil, Warmuth, 2022, section 3.1.
    """
    return matching_loss(IDENTITY)
