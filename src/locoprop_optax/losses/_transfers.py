r"""Transfer functions, and what their matching losses are made of."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm
from jaxtyping import Array

from locoprop_optax.losses import _potentials as of

Elementwise: TypeAlias = Callable[[Array], Array]


def _unchanged(array: Array) -> Array:
    return array


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
      project: from any target to a near one in the closure of the range of
        :math:`f`. Default: the range is all numbers.
      divergence: :math:`D(a, t) = F(a) - a t + F^*(t)` for targets in the range,
        shaped as `potential` and written so that nothing cancels. None to compute
        it from `potential` and `conjugate`.
      inverse: :math:`f^{-1}`, where mirror descent on weights needs it.
    """

    name: str
    function: Elementwise
    potential: Elementwise | None = None
    conjugate: Elementwise | None = None
    derivative_bound: float | None = None
    over_last_axis: bool = False
    project: Elementwise = _unchanged
    divergence: Callable[[Array, Array], Array] | None = None
    inverse: Elementwise | None = None


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
        divergence=partial(of.leaky_relu_divergence, slope=slope),
    )


@cache
def elu(alpha: float = 1.0, scale: float = 1.0) -> Transfer:
    r"""The exponential linear unit, :math:`s\,\alpha (e^a - 1)` below zero.

    Example:
      >>> import locoprop_optax as loco
      >>> loco.losses.elu(0.5).name
      'elu(0.5)'
    """
    plain = "elu" if alpha == 1 else f"elu({alpha:g})"
    return Transfer(
        name=plain if scale == 1 else "selu",
        function=lambda a: scale * of.elu(a, alpha),
        potential=lambda a: scale * of.elu_potential(a, alpha),
        conjugate=lambda t: scale * of.elu_conjugate(t / scale, alpha),
        derivative_bound=scale * max(1.0, alpha),
        project=partial(jnp.clip, min=-scale * alpha),
        divergence=lambda a, t: scale * of.elu_divergence(a, t / scale, alpha),
    )


def _clip(
    name: str, low: float, high: float, function: Elementwise, potential: Elementwise
) -> Transfer:
    """A transfer function that cuts its argument off at two ends."""
    return Transfer(
        name,
        function,
        potential,
        conjugate=lambda t: 0.5 * jnp.clip(t, low, high) ** 2,
        derivative_bound=1.0,
        project=partial(jnp.clip, min=low, max=high),
        divergence=partial(of.clip_divergence, low=low, high=high),
    )


_BUILT_IN = (
    Transfer(
        "identity",
        function=_unchanged,
        potential=lambda a: 0.5 * a**2,
        conjugate=lambda t: 0.5 * t**2,
        derivative_bound=1.0,
        divergence=lambda a, t: 0.5 * (a - t) ** 2,
        inverse=_unchanged,
    ),
    Transfer(
        "tanh",
        function=jnp.tanh,
        potential=of.tanh_potential,
        conjugate=of.tanh_conjugate,
        derivative_bound=1.0,
        project=partial(jnp.clip, min=-1, max=1),
        divergence=of.tanh_divergence,
    ),
    Transfer(
        "sigmoid",
        function=jax.nn.sigmoid,
        potential=jax.nn.softplus,
        conjugate=of.sigmoid_conjugate,
        derivative_bound=0.25,
        project=partial(jnp.clip, min=0, max=1),
        divergence=of.sigmoid_divergence,
    ),
    _clip(
        "relu",
        0,
        math.inf,
        function=jax.nn.relu,
        potential=lambda a: 0.5 * jax.nn.relu(a) ** 2,
    ),
    Transfer(
        "softmax",
        function=lambda a: jax.nn.softmax(a, axis=-1),
        potential=of.softmax_potential,
        conjugate=of.softmax_conjugate,
        derivative_bound=0.5,
        over_last_axis=True,
        project=of.to_simplex,
        divergence=of.softmax_divergence,
    ),
    leaky_relu(),
    elu(),
    elu(1.6732632423543772, 1.0507009873554805),
    Transfer(
        "softplus",
        function=jax.nn.softplus,
        potential=of.softplus_potential,
        conjugate=of.softplus_conjugate,
        derivative_bound=1.0,
        project=partial(jnp.clip, min=0),
        divergence=of.softplus_divergence,
    ),
    _clip(
        "hard_tanh",
        -1,
        1,
        function=jax.nn.hard_tanh,
        potential=of.hard_tanh_potential,
    ),
    _clip("relu6", 0, 6, function=jax.nn.relu6, potential=of.relu6_potential),
    Transfer(
        "softsign",
        function=jax.nn.soft_sign,
        potential=lambda a: jnp.abs(a) - jnp.log1p(jnp.abs(a)),
        conjugate=of.softsign_conjugate,
        derivative_bound=1.0,
        project=partial(jnp.clip, min=-1, max=1),
        divergence=of.softsign_divergence,
    ),
    Transfer(
        "arctan",
        function=jnp.arctan,
        potential=lambda a: a * jnp.arctan(a) - 0.5 * jnp.log1p(a**2),
        conjugate=of.arctan_conjugate,
        derivative_bound=1.0,
        project=partial(jnp.clip, min=-0.5 * math.pi, max=0.5 * math.pi),
        divergence=of.arctan_divergence,
    ),
    Transfer(
        "exp",
        function=jnp.exp,
        potential=jnp.exp,
        conjugate=of.exp_conjugate,
        project=partial(jnp.clip, min=0),
        divergence=lambda a, t: of.relative_entropy(t, a),
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
        potential=lambda a: a * jax.nn.softplus(a) - of.softplus_potential(a),
        derivative_bound=1.1,
    ),
)
_TRANSFERS = {transfer.name: transfer for transfer in _BUILT_IN}
IDENTITY = _TRANSFERS["identity"]
