r"""Potentials, conjugates and divergences of transfer functions, in closed form.

With :math:`\nabla F = f`, the divergence :math:`D(a, t) = F(a) - a t + F^*(t)` is small
where its parts are large. It is therefore written so that nothing cancels: as a sum of
terms that are not negative each.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp, spence, xlogy
from jaxtyping import Array


def exponential_remainder(d: Array) -> Array:
    """The function :math:`e^d - 1 - d`, without cancellation near zero."""
    near = jnp.abs(d) < 0.1
    small = jnp.where(near, d, 0)
    series = jnp.zeros_like(d)
    for k in range(11, 1, -1):
        series = series * small + 1 / math.factorial(k)
    return jnp.where(near, small**2 * series, jnp.expm1(d) - d)


def relative_entropy(p: Array, log_q: Array, log_p: Array | None = None) -> Array:
    r"""The terms :math:`p \log(p / q) - p + q` of positive numbers p and q."""
    log_p = jnp.log(p) if log_p is None else log_p
    d = log_q - jnp.where(p > 0, log_p, 0)
    near = jnp.abs(d) < 0.1
    close = p * exponential_remainder(jnp.where(near, d, 0))
    return jnp.where(near & (p > 0), close, jnp.exp(log_q) - p - p * d)


def binary_relative_entropy(p: Array, rest: Array, logits: Array) -> Array:
    r"""The relative entropy of :math:`(p, 1 - p)` to the sigmoid of the logits."""
    return relative_entropy(p, jax.nn.log_sigmoid(logits)) + relative_entropy(
        rest, jax.nn.log_sigmoid(-logits)
    )


def clip_divergence(a: Array, t: Array, low: float, high: float) -> Array:
    r"""Of :math:`\operatorname{clip}(a)`, as the identity and ReLU are, too."""
    c = jnp.clip(a, low, high)
    return 0.5 * (c - t) ** 2 + (a - c) * (c - t)


def leaky_relu_divergence(a: Array, t: Array, slope: float) -> Array:
    """Of the leaky ReLU."""
    scale = jnp.where(a >= 0, 1, slope)
    source = jnp.where(t >= 0, t, t / slope)
    same = 0.5 * scale * (a - source) ** 2
    apart = 0.5 * scale * a**2 - a * t + 0.5 * source * t
    return jnp.where((a >= 0) == (t >= 0), same, apart)


def elu(a: Array, alpha: float) -> Array:
    """The exponential linear unit."""
    return jnp.where(a >= 0, a, alpha * jnp.expm1(jnp.minimum(a, 0)))


def elu_potential(a: Array, alpha: float) -> Array:
    """Of the exponential linear unit."""
    below = alpha * exponential_remainder(jnp.minimum(a, 0))
    return jnp.where(a >= 0, 0.5 * a**2, below)


def elu_conjugate(t: Array, alpha: float) -> Array:
    """Of the exponential linear unit, at its range's nearest point."""
    below = _elu_entropy(jnp.minimum(t, 0), jnp.zeros_like(t), alpha)
    return jnp.where(t >= 0, 0.5 * t**2, below)


def elu_divergence(a: Array, t: Array, alpha: float) -> Array:
    """Of the exponential linear unit."""
    same = jnp.where(
        a >= 0,
        0.5 * (a - t) ** 2,
        _elu_entropy(jnp.minimum(t, 0), jnp.minimum(a, 0), alpha),
    )
    apart = elu_potential(a, alpha) - a * t + elu_conjugate(t, alpha)
    return jnp.where((a >= 0) == (t >= 0), same, apart)


def _elu_entropy(t: Array, a: Array, alpha: float) -> Array:
    """The divergence where neither is above zero."""
    share = jnp.maximum(t, -alpha) / alpha
    return alpha * relative_entropy(1 + share, a, jnp.log1p(share))


def tanh_potential(a: Array) -> Array:
    r"""The logarithm of cosh."""
    size = jnp.abs(a)
    return size + jnp.log1p(jnp.exp(-2 * size)) - jnp.log(2.0).astype(a.dtype)


def tanh_conjugate(t: Array) -> Array:
    """Of tanh, at its range's nearest point."""
    t = jnp.clip(t, -1, 1)
    return 0.5 * (xlogy(1 + t, 1 + t) + xlogy(1 - t, 1 - t))


def tanh_divergence(a: Array, t: Array) -> Array:
    """Of tanh: a sigmoid of twice the argument, between -1 and 1."""
    return binary_relative_entropy((1 + t) / 2, (1 - t) / 2, 2 * a)


def sigmoid_conjugate(t: Array) -> Array:
    """Of the sigmoid, at its range's nearest point."""
    t = jnp.clip(t, 0, 1)
    return xlogy(t, t) + xlogy(1 - t, 1 - t)


def sigmoid_divergence(a: Array, t: Array) -> Array:
    """Of the sigmoid."""
    return binary_relative_entropy(t, 1 - t, a)


def softmax_potential(a: Array) -> Array:
    """Of the softmax."""
    return logsumexp(a, axis=-1)


def softmax_conjugate(t: Array) -> Array:
    """Of the softmax, at its range's nearest point."""
    t = jnp.clip(t, 0, 1)
    return jnp.sum(xlogy(t, t), axis=-1)


def softmax_divergence(a: Array, t: Array) -> Array:
    """Of the softmax."""
    log_q = jax.nn.log_softmax(a, axis=-1)
    return jnp.sum(relative_entropy(t, log_q), axis=-1)


def to_simplex(t: Array) -> Array:
    """Shares: what is negative is cut, the rest is scaled to the sum 1."""
    t = jnp.maximum(t, 0)
    return t / jnp.maximum(jnp.sum(t, axis=-1, keepdims=True), jnp.finfo(t.dtype).tiny)


@jax.custom_jvp
def softplus_potential(a: Array) -> Array:
    """The integral of softplus, by the dilogarithm's reflection for a > 0."""
    return 0.5 * jax.nn.relu(a) ** 2 + _beside_relu(a)


@softplus_potential.defjvp
def _softplus_potential_jvp(primals, tangents):
    (a,), (tangent,) = primals, tangents
    return softplus_potential(a), jax.nn.softplus(a) * tangent


def _beside_relu(a: Array) -> Array:
    """The part of softplus's potential that stays bounded."""
    small = spence(1 + jnp.exp(-jnp.abs(a)))
    return jnp.where(a > 0, math.pi**2 / 6 + small, -small)


def _inverse_softplus(t: Array) -> Array:
    t = jnp.maximum(t, jnp.finfo(t.dtype).tiny)
    return t + jnp.log(-jnp.expm1(-t))


def softplus_conjugate(t: Array) -> Array:
    """Of softplus, at its range's nearest point."""
    t = jnp.maximum(t, 0)
    a = _inverse_softplus(t)
    return a * t - softplus_potential(a)


def softplus_divergence(a: Array, t: Array) -> Array:
    r"""Of softplus: near its minimum by quadrature, else as that of ReLU and a rest.

    The integrand is
    :math:`f(b + d) - f(b) = \log(1 + \sigma(b) (e^d - 1))` with :math:`f(b) = t`.
    """
    b = _inverse_softplus(t)
    near = jnp.abs(a - b) < 1
    width = jnp.where(near, a - b, 0)
    nodes, weights = np.polynomial.legendre.leggauss(8)
    close = sum(
        0.5 * w * jnp.log1p(jax.nn.sigmoid(b) * jnp.expm1(0.5 * (1 + u) * width))
        for u, w in zip(nodes.tolist(), weights.tolist(), strict=True)
    )
    excess = jnp.log1p(jnp.exp(-jnp.abs(b)))
    rest = _beside_relu(a) - _beside_relu(b) - excess * (a - b)
    far = clip_divergence(a, jax.nn.relu(b), 0, jnp.inf) + rest
    return jnp.where(near, width * close, far)


def hard_tanh_potential(a: Array) -> Array:
    """Of the hard tanh."""
    size = jnp.abs(a)
    return jnp.where(size <= 1, 0.5 * a**2, size - 0.5)


def relu6_potential(a: Array) -> Array:
    """Of ReLU6."""
    return 0.5 * jnp.clip(a, 0, 6) ** 2 + 6 * jax.nn.relu(a - 6)


def _inside(t: Array, edge: float) -> Array:
    """The nearest point that is not at an open range's edge."""
    edge *= 1 - 2 * float(jnp.finfo(t.dtype).eps)
    return jnp.clip(t, -edge, edge)


def arctan_conjugate(t: Array) -> Array:
    """Of arctan, at its range's nearest point."""
    return -jnp.log(jnp.cos(_inside(t, 0.5 * math.pi)))


def arctan_divergence(a: Array, t: Array) -> Array:
    """Of arctan."""
    b = jnp.tan(_inside(t, 0.5 * math.pi))
    angle = jnp.arctan2(a - b, 1 + a * b)
    ratio = (a - b) * (a + b) / (1 + b**2)
    near = jnp.abs(ratio) < 0.5
    close = jnp.log1p(jnp.where(near, ratio, 0))
    logarithm = jnp.where(near, close, jnp.log1p(a**2) - jnp.log1p(b**2))
    return a * angle - 0.5 * logarithm


def softsign_conjugate(t: Array) -> Array:
    """Of softsign, at its range's nearest point."""
    size = jnp.abs(_inside(t, 1.0))
    return -size - jnp.log1p(-size)


def softsign_divergence(a: Array, t: Array) -> Array:
    """Of softsign."""
    t = _inside(t, 1.0)
    ratio = (1 + jnp.abs(a)) * (1 - jnp.abs(t))
    return exponential_remainder(jnp.log(ratio)) + 2 * jax.nn.relu(-a * t)


def exp_conjugate(t: Array) -> Array:
    """Of the exponential function, at its range's nearest point."""
    t = jnp.maximum(t, 0)
    return xlogy(t, t) - t
