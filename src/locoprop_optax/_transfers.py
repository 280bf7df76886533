r"""Transfer functions, and what their matching losses are made of."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp, spence, xlogy
from jax.scipy.stats import norm
from jaxtyping import Array

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
        :math:`f`, where :math:`F^*` is infinite, its value at a near point of the
        range, so that a loss there is reported up to a constant. None where
        :math:`f` is not monotone and there is no :math:`F^*`.
      derivative_bound: the smallest :math:`c \ge f'`. None if there is none or it is
        not known; then `majorized_newton` cannot be used.
      over_last_axis: whether :math:`f` mixes the elements of the last axis.
    """

    name: str
    function: Elementwise
    potential: Elementwise | None = None
    conjugate: Elementwise | None = None
    derivative_bound: float | None = None
    over_last_axis: bool = False


def known_transfers() -> dict[str, Transfer]:
    """The transfer functions that can be named in `transfers=`, by name.

    Example:
      >>> import locoprop_optax as loco
      >>> ", ".join(list(loco.losses.known_transfers())[:5])
      'identity, tanh, sigmoid, relu, softmax'
    """
    return dict(_TRANSFERS)


def register_transfer(transfer: Transfer) -> Transfer:
    """Gives a transfer function a name, so that traces are searched for it.

    Args:
      transfer: the transfer function, its name not yet taken.

    Returns:
      The same transfer function.

    Raises:
      ValueError: if another transfer function has the name.

    Example:
      >>> import jax.numpy as jnp
      >>> import locoprop_optax as loco
      >>> asinh = loco.losses.Transfer("asinh", jnp.arcsinh, derivative_bound=1.0)
      >>> loco.losses.register_transfer(asinh).name
      'asinh'
    """
    if _TRANSFERS.setdefault(transfer.name, transfer) != transfer:
        raise ValueError(f"Another transfer function is named {transfer.name!r}.")
    return transfer


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


@cache
def leaky_relu(slope: float = 0.01) -> Transfer:
    """The leaky ReLU with the given slope below zero.

    Example:
      >>> import locoprop_optax as loco
      >>> loco.losses.leaky_relu(0.2).name
      'leaky_relu(0.2)'
    """
    return Transfer(
        "leaky_relu" if slope == 0.01 else f"leaky_relu({slope:g})",
        function=lambda a: jnp.where(a >= 0, a, slope * a),
        potential=lambda a: 0.5 * jnp.where(a >= 0, a**2, slope * a**2),
        conjugate=lambda t: 0.5 * jnp.where(t >= 0, t**2, t**2 / slope),
        derivative_bound=max(1.0, slope),
    )


@cache
def elu(alpha: float = 1.0, scale: float = 1.0) -> Transfer:
    r"""The exponential linear unit, :math:`s\,\alpha (e^a - 1)` below zero.

    Example:
      >>> import locoprop_optax as loco
      >>> loco.losses.elu(0.5).name
      'elu(0.5)'
    """

    def function(a):
        return scale * jnp.where(a >= 0, a, alpha * jnp.expm1(jnp.minimum(a, 0)))

    def potential(a):
        below = jnp.minimum(a, 0)
        return scale * jnp.where(a >= 0, 0.5 * a**2, alpha * (jnp.expm1(below) - below))

    def conjugate(t):
        u = jnp.maximum(t / scale, -alpha)
        rest = jnp.clip(1 + u / alpha, 0, 1)
        below = alpha * xlogy(rest, rest) - jnp.minimum(u, 0)
        return scale * jnp.where(u >= 0, 0.5 * u**2, below)

    plain = "elu" if alpha == 1 else f"elu({alpha:g})"
    name = plain if scale == 1 else "selu"
    bound = scale * max(1.0, alpha)
    return Transfer(name, function, potential, conjugate, bound)


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


@jax.custom_jvp
def _softplus_potential(a: Array) -> Array:
    """The integral of softplus, by the dilogarithm's reflection for a > 0."""
    small = spence(1 + jnp.exp(-jnp.abs(a)))
    return jnp.where(a > 0, 0.5 * a**2 + math.pi**2 / 6 + small, -small)


@_softplus_potential.defjvp
def _softplus_potential_jvp(primals, tangents):
    (a,), (tangent,) = primals, tangents
    return _softplus_potential(a), jax.nn.softplus(a) * tangent


def _softplus_conjugate(t: Array) -> Array:
    t = jnp.maximum(t, 1e-30)
    a = t + jnp.log(-jnp.expm1(-t))
    return a * t - _softplus_potential(a)


def _hard_tanh_potential(a: Array) -> Array:
    size = jnp.abs(a)
    return jnp.where(size <= 1, 0.5 * a**2, size - 0.5)


def _relu6_potential(a: Array) -> Array:
    inside = 0.5 * jnp.clip(a, 0, 6) ** 2
    return inside + 6 * jax.nn.relu(a - 6)


def _arctan_conjugate(t: Array) -> Array:
    edge = 0.5 * math.pi - 1e-3
    return -jnp.log(jnp.cos(jnp.clip(t, -edge, edge)))


def _softsign_conjugate(t: Array) -> Array:
    size = jnp.minimum(jnp.abs(t), 1 - 1e-3)
    return -size - jnp.log1p(-size)


_BUILT_IN = (
    Transfer(
        "identity",
        function=lambda a: a,
        potential=lambda a: 0.5 * a**2,
        conjugate=lambda t: 0.5 * t**2,
        derivative_bound=1.0,
    ),
    Transfer("tanh", jnp.tanh, _log_cosh, _tanh_conjugate, 1.0),
    Transfer("sigmoid", jax.nn.sigmoid, jax.nn.softplus, _sigmoid_conjugate, 0.25),
    Transfer(
        "relu",
        function=jax.nn.relu,
        potential=lambda a: 0.5 * jax.nn.relu(a) ** 2,
        conjugate=lambda t: 0.5 * jax.nn.relu(t) ** 2,
        derivative_bound=1.0,
    ),
    Transfer(
        "softmax",
        function=lambda a: jax.nn.softmax(a, axis=-1),
        potential=lambda a: logsumexp(a, axis=-1),
        conjugate=_softmax_conjugate,
        derivative_bound=0.5,
        over_last_axis=True,
    ),
    leaky_relu(),
    elu(),
    elu(1.6732632423543772, 1.0507009873554805),
    Transfer(
        "softplus", jax.nn.softplus, _softplus_potential, _softplus_conjugate, 1.0
    ),
    Transfer(
        "hard_tanh",
        function=jax.nn.hard_tanh,
        potential=_hard_tanh_potential,
        conjugate=lambda t: 0.5 * jnp.clip(t, -1, 1) ** 2,
        derivative_bound=1.0,
    ),
    Transfer(
        "relu6",
        function=jax.nn.relu6,
        potential=_relu6_potential,
        conjugate=lambda t: 0.5 * jnp.clip(t, 0, 6) ** 2,
        derivative_bound=1.0,
    ),
    Transfer(
        "softsign",
        function=jax.nn.soft_sign,
        potential=lambda a: jnp.abs(a) - jnp.log1p(jnp.abs(a)),
        conjugate=_softsign_conjugate,
        derivative_bound=1.0,
    ),
    Transfer(
        "arctan",
        function=jnp.arctan,
        potential=lambda a: a * jnp.arctan(a) - 0.5 * jnp.log1p(a**2),
        conjugate=_arctan_conjugate,
        derivative_bound=1.0,
    ),
    Transfer(
        "exp",
        function=jnp.exp,
        potential=jnp.exp,
        conjugate=lambda t: xlogy(jnp.maximum(t, 0), jnp.maximum(t, 0)) - t,
    ),
    Transfer(
        "gelu",
        function=lambda a: jax.nn.gelu(a, approximate=False),
        potential=lambda a: 0.5 * ((a**2 - 1) * norm.cdf(a) + a * norm.pdf(a)),
        derivative_bound=1.129,
    ),
    Transfer(
        "gelu_tanh",
        function=lambda a: jax.nn.gelu(a, approximate=True),
        derivative_bound=1.13,
    ),
    Transfer(
        "silu",
        function=jax.nn.silu,
        potential=lambda a: a * jax.nn.softplus(a) - _softplus_potential(a),
        derivative_bound=1.1,
    ),
)
_TRANSFERS = {transfer.name: transfer for transfer in _BUILT_IN}
IDENTITY = _TRANSFERS["identity"]
