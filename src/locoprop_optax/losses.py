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

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp, xlogy
from jaxtyping import Array, Float

Elementwise: TypeAlias = Callable[[Array], Array]


@dataclass(frozen=True)
class Transfer:
    r"""A transfer function and what its matching loss is made of.

    Attributes:
      name: what it is called in `transfers=` and in tables.
      function: :math:`f`, from pre-activations to activations, shape kept.
      potential: :math:`F` with :math:`\nabla F = f`. One value per element, or, if
        `over_last_axis`, one value per row. None where the value of the matching
        loss is not needed: its gradient takes :math:`f` alone.
      conjugate: :math:`F^*`, shaped as `potential`. Outside the range of
        :math:`f`, where :math:`F^*` is infinite, its value at the nearest point of
        the range, so that a loss there is reported up to a constant.
      derivative_bound: the smallest :math:`c \ge f'`. None if it is not known;
        then `majorized_newton` cannot be used.
      over_last_axis: whether :math:`f` mixes the elements of the last axis.
    """

    name: str
    function: Elementwise
    potential: Elementwise | None = None
    conjugate: Elementwise | None = None
    derivative_bound: float | None = None
    over_last_axis: bool = False


def _log_cosh(a: Array) -> Array:
    size = jnp.abs(a)
    return size + jnp.log1p(jnp.exp(-2 * size)) - jnp.log(2.0).astype(a.dtype)


def _tanh_conjugate(t: Array) -> Array:
    t = jnp.clip(t, -1, 1)
    return 0.5 * (xlogy(1 + t, 1 + t) + xlogy(1 - t, 1 - t))


def _sigmoid_conjugate(t: Array) -> Array:
    t = jnp.clip(t, 0, 1)
    return xlogy(t, t) + xlogy(1 - t, 1 - t)


def _softmax_conjugate(t: Array) -> Array:
    t = jnp.clip(t, 0, 1)
    return jnp.sum(xlogy(t, t), axis=-1)


IDENTITY = Transfer(
    "identity",
    function=lambda a: a,
    potential=lambda a: 0.5 * a**2,
    conjugate=lambda t: 0.5 * t**2,
    derivative_bound=1.0,
)
TANH = Transfer(
    "tanh",
    function=jnp.tanh,
    potential=_log_cosh,
    conjugate=_tanh_conjugate,
    derivative_bound=1.0,
)
SIGMOID = Transfer(
    "sigmoid",
    function=jax.nn.sigmoid,
    potential=jax.nn.softplus,
    conjugate=_sigmoid_conjugate,
    derivative_bound=0.25,
)
RELU = Transfer(
    "relu",
    function=jax.nn.relu,
    potential=lambda a: 0.5 * jax.nn.relu(a) ** 2,
    conjugate=lambda t: 0.5 * jax.nn.relu(t) ** 2,
    derivative_bound=1.0,
)
SOFTMAX = Transfer(
    "softmax",
    function=lambda a: jax.nn.softmax(a, axis=-1),
    potential=lambda a: logsumexp(a, axis=-1),
    conjugate=_softmax_conjugate,
    derivative_bound=0.5,
    over_last_axis=True,
)

_TRANSFERS = {t.name: t for t in (IDENTITY, TANH, SIGMOID, RELU, SOFTMAX)}


def known_transfers() -> dict[str, Transfer]:
    """The transfer functions that can be named in `transfers=`, by name.

    Example:
      >>> import locoprop_optax as loco
      >>> sorted(loco.losses.known_transfers())
      ['identity', 'relu', 'sigmoid', 'softmax', 'tanh']
    """
    return dict(_TRANSFERS)


def as_transfer(transfer: str | Transfer | Elementwise) -> Transfer:
    """The `Transfer` for a name, an elementwise callable, or itself.

    Args:
      transfer: a known name, a `Transfer`, or any elementwise callable. For a
        callable the matching loss has a gradient, but no value and no bound.

    Returns:
      The transfer function.

    Raises:
      ValueError: if the name is not known.

    Example:
      >>> import jax.numpy as jnp
      >>> import locoprop_optax as loco
      >>> loco.losses.as_transfer("tanh").derivative_bound
      1.0
      >>> loco.losses.as_transfer(jnp.sin).name
      'sin'
    """
    if isinstance(transfer, Transfer):
        return transfer
    if callable(transfer):
        return Transfer(getattr(transfer, "__name__", repr(transfer)), transfer)
    if transfer not in _TRANSFERS:
        raise ValueError(
            f"Unknown transfer function {transfer!r}. Known names: "
            f"{', '.join(sorted(_TRANSFERS))}. An elementwise callable works too."
        )
    return _TRANSFERS[transfer]


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
        r"""The sum of :math:`F(a) - a t + F^*(t)` over examples and units."""
        potential, conjugate = self.transfer.potential, self.transfer.conjugate
        if potential is None or conjugate is None:
            raise ValueError(
                f"The matching loss of {self.transfer.name!r} has no value: its "
                "potential or its conjugate is not given. Its gradient needs neither."
            )
        return (
            jnp.sum(potential(preactivations))
            - jnp.sum(preactivations * targets)
            + jnp.sum(conjugate(targets))
        )

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
