"""A model near its parameters: Gauss-Newton products, and the best step in a plane."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from locoprop_optax._utils.dtypes import at_least_float32
from locoprop_optax._utils.reductions import inner


class ModelAndLoss(NamedTuple):
    """A model and its loss as two functions, as a Gauss-Newton model needs them.

    Attributes:
      model_fn: from parameters to outputs; the same dropout masks at each call.
      loss_fn: from outputs to a scalar.
      mutated: from parameters to the collections that a pass changes, such as batch
        statistics; to be called once a step. Under `jit` it costs nothing: the pass is
        that of the optimizer.
    """

    model_fn: Callable[[Any], Any]
    loss_fn: Callable[[Any], Array]
    mutated: Callable[[Any], Any]


class Linearization(NamedTuple):
    """A model and its loss near the parameters; all products share one forward pass.

    Attributes:
      value: the loss.
      loss_gradient: of the loss in the outputs.
      jvp: from a change of the parameters, in any dtypes, to that of the outputs, J.
      vjp: from cotangents of the outputs to the parameters', the transpose of J.
      hvp: from a change of the outputs to that of the loss's gradient, H.
      loss_at: from a change of the parameters to the loss after it.
    """

    value: Array
    loss_gradient: Any
    jvp: Callable[[Any], Any]
    vjp: Callable[[Any], Any]
    hvp: Callable[[Any], Any]
    loss_at: Callable[[Any], Array]

    @classmethod
    def of(
        cls,
        model_fn: Callable[[Any], Any],
        loss_fn: Callable[[Any], Array],
        params: Any,
    ) -> Linearization:
        """Linearizes the model at the parameters and the loss's gradient there."""

        def outputs_of(params):
            return at_least_float32(model_fn(params))

        def loss_at(change):
            return loss_fn(outputs_of(optax.apply_updates(params, change)))

        outputs, forward = jax.linearize(outputs_of, params)
        loss_gradient, hvp = jax.linearize(jax.grad(loss_fn), outputs)
        transposed = jax.linear_transpose(forward, params)

        def jvp(change):
            return forward(jax.tree.map(lambda c, p: c.astype(p.dtype), change, params))

        def vjp(cotangents):
            return transposed(cotangents)[0]

        value = loss_fn(outputs_of(params))  # computed as `loss_at` computes it
        return cls(value, loss_gradient, jvp, vjp, hvp, loss_at)

    @classmethod
    def mean(cls, parts: Sequence[Linearization]) -> Linearization:
        """The mean of some losses of the same parameters."""
        share = 1 / len(parts)

        def mean(*leaves):
            return share * sum(leaves)

        def vjp(cotangents):
            pulled = [p.vjp(c) for p, c in zip(parts, cotangents, strict=True)]
            return jax.tree.map(lambda *leaves: sum(leaves), *pulled)

        def hvp(changes):
            curved = [p.hvp(c) for p, c in zip(parts, changes, strict=True)]
            return jax.tree.map(lambda leaf: share * leaf, curved)

        return cls(
            value=jnp.asarray(mean(*(part.value for part in parts))),
            loss_gradient=jax.tree.map(
                lambda leaf: share * leaf, [part.loss_gradient for part in parts]
            ),
            jvp=lambda change: [part.jvp(change) for part in parts],
            vjp=vjp,
            hvp=hvp,
            loss_at=lambda change: jnp.asarray(
                mean(*(part.loss_at(change) for part in parts))
            ),
        )


class PlaneModel(NamedTuple):
    r"""The change of the loss after :math:`\rho z - \beta d`, as a quadratic.

    .. math::
      q = s^\top u + \tfrac12 u^\top M u, \qquad u = (-\beta, \rho)

    Attributes:
      matrix: M, the curvature along d and z.
      slopes: s, the gradient's along d and z.
    """

    matrix: Float[Array, "2 2"]
    slopes: Float[Array, "2"]

    @classmethod
    def flat(cls, slopes: Float[Array, "2"]) -> PlaneModel:
        """The model without curvature."""
        return cls(jnp.zeros((2, 2), slopes.dtype), slopes)

    def astype(self, dtype: Any) -> PlaneModel:
        """The model in another dtype."""
        return PlaneModel(self.matrix.astype(dtype), self.slopes.astype(dtype))

    def slope(self, beta: Array, rho: Array) -> Array:
        """The gradient's slope along a step."""
        return jnp.stack([-beta, rho]) @ self.slopes

    def change(self, length: Array, beta: Array, rho: Array) -> Array:
        """The change of the loss after a part of a step."""
        step = jnp.stack([-beta, rho])
        return length * (step @ self.slopes + 0.5 * length * step @ self.matrix @ step)

    def minimum(self, beta: Array | None, rho: Array | None) -> tuple[Array, Array]:
        """The step size and the momentum, as far as they are not given."""
        return coefficients(self.matrix, self.slopes, beta, rho)


def slopes_along(gradient: Any, plane: Sequence[Any]) -> Float[Array, "2"]:
    """The slopes of the loss along d and z; zero if no gradient is known."""
    if gradient is None:
        return jnp.zeros(2, jnp.result_type(jnp.float32, *jax.tree.leaves(plane)))
    return jnp.stack([inner(gradient, along) for along in plane])


def on_the_plane(
    linear: Linearization,
    slopes: Float[Array, "2"] | None,
    plane: Sequence[Any],
    damping: Array | None,
) -> PlaneModel:
    """The model with damped curvature along d and z.

    Args:
      linear: the loss near the parameters.
      slopes: those of the loss; None to take them from its linearization.
      plane: d and z.
      damping: what is added to the curvature, if anything.
    """
    pushed = [linear.jvp(along) for along in plane]
    curved = [linear.hvp(change) for change in pushed]
    d_curves, crossed, z_curves = (
        inner(pushed[i], curved[j])
        + (0.0 if damping is None else damping * inner(plane[i], plane[j]))
        for i, j in ((0, 0), (1, 0), (1, 1))
    )
    matrix = jnp.stack([d_curves, crossed, crossed, z_curves]).reshape(2, 2)
    if slopes is None:
        slopes = slopes_along(linear.loss_gradient, pushed)
    return PlaneModel(matrix, slopes)


def coefficients(
    matrix: Float[Array, "2 2"],
    slopes: Float[Array, "2"],
    beta: Array | None,
    rho: Array | None,
) -> tuple[Array, Array]:
    """The step size and the momentum, as far as they are not given."""
    (d_curves, crossed), (_, z_curves) = matrix
    if beta is not None and rho is not None:
        return beta, rho
    if beta is not None:
        return beta, _divide(beta * crossed - slopes[1], z_curves)
    if rho is not None:
        return _divide(slopes[0] + rho * crossed, d_curves), rho
    scale = jnp.sqrt(jnp.diagonal(matrix))
    scaled, cosine = slopes / scale, crossed / (scale[0] * scale[1])
    determinant = 1 - cosine**2
    both = (scaled - cosine * scaled[::-1]) / (determinant * scale)
    independent = determinant > 64 * jnp.finfo(matrix.dtype).eps
    descends = independent & jnp.all(jnp.isfinite(both)) & (both @ slopes > 0)
    along_d = jnp.stack([_divide(slopes[0], d_curves), jnp.zeros_like(d_curves)])
    along_z = jnp.stack([jnp.zeros_like(z_curves), _divide(slopes[1], z_curves)])
    alone = jnp.where(d_curves > 0, along_d, along_z)
    chosen = jnp.where(descends, both, alone)
    return chosen[0], -chosen[1]


def _divide(number: Array, curvature: Array) -> Array:
    """The minimum of a parabola; zero where it is not curved upwards."""
    return jnp.where(curvature > 0, number / curvature, 0)
