r"""The curvature of a squared loss in a layer's parameters, and its inverse.

For a layer with a bias it is that of the design with a column of ones,

.. math::
  \begin{pmatrix} x^\top x & s \\ s^\top & n \end{pmatrix}, \qquad
  s = x^\top 1,

whose parts are kept apart, so that no matrix is copied to join them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from locoprop_optax._inverse import inverse
from locoprop_optax._linear_maps import Matrices


class Gram(NamedTuple):
    r"""The Gram matrices of a layer's design, one for each of its groups.

    Attributes:
      inner: :math:`x^\top x`.
      sums: s as a column; None without a bias.
      rows: n.
    """

    inner: Float[Array, "g d d"]
    sums: Float[Array, "g d 1"] | None
    rows: Float[Array, ""]

    @classmethod
    def of(cls, design: Float[Array, "g n d"], has_bias: bool) -> Gram:
        """The Gram matrices of a design."""
        inner = jnp.einsum("gni,gnj->gij", design, design)
        sums = jnp.sum(design, axis=1)[..., None] if has_bias else None
        return cls(inner, sums, jnp.asarray(design.shape[1], design.dtype))

    def mean_eigenvalue(self) -> Float[Array, "g 1 1"]:
        """The trace over the size, with the column of ones."""
        trace = jnp.trace(self.inner, axis1=-2, axis2=-1)[:, None, None]
        if self.sums is None:
            return trace / self.inner.shape[-1]
        return (trace + self.rows) / (self.inner.shape[-1] + 1)

    def __matmul__(self, matrices: Matrices) -> Matrices:
        """The product with a layer's parameters."""
        kernel = self.inner @ matrices.kernel
        if self.sums is None or matrices.bias is None:
            return Matrices(kernel, None)
        sums = jnp.swapaxes(self.sums, 1, 2)
        bias = sums @ matrices.kernel + self.rows * matrices.bias
        return Matrices(kernel + self.sums * matrices.bias, bias)

    def solver(
        self, bound: Any, diagonal: Float[Array, "g 1 1"]
    ) -> Callable[[Matrices], Matrices]:
        r"""The product with :math:`(c\, x^\top x + D)^{-1}`, the bias eliminated."""
        eye = jnp.eye(self.inner.shape[-1], dtype=self.inner.dtype)
        inverted = jax.vmap(inverse)(bound * self.inner + diagonal * eye)
        if self.sums is None:
            return lambda right: Matrices(inverted @ right.kernel, None)
        column = bound * self.sums
        row = jnp.swapaxes(column, 1, 2)
        eliminated = inverted @ column
        complement = bound * self.rows + diagonal - row @ eliminated

        def solve(right):
            kernel = inverted @ right.kernel
            bias = (right.bias - row @ kernel) / complement
            return Matrices(kernel - eliminated * bias, bias)

        return solve
