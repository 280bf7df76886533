r"""The curvature of a squared loss in a layer's parameters, and its inverse.

For a layer with a bias it is that of the design with a column of ones,

.. math::
  \begin{pmatrix} x^\top x & s \\ s^\top & n \end{pmatrix}, \qquad
  s = x^\top 1,

whose parts are kept apart, so that no matrix is copied to join them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from locoprop_optax._problems.inverse import in_full_precision, inverse
from locoprop_optax._records.linear_maps import (
    Factor,
    LayerParams,
    LinearMap,
    Lookup,
    Matrices,
)


def gram_of(
    linear_map: LinearMap, params: LayerParams, inputs: Array
) -> Gram | DiagonalGram:
    """The Gram matrices of a layer's design, in the dtype of its parameters."""
    dtype = jnp.result_type(*params.values())
    if isinstance(linear_map, Lookup | Factor):
        entries = linear_map.squares(params, inputs).astype(dtype)
        rows = inputs.size / (entries.size if linear_map.summed else 1)
        return DiagonalGram(entries[..., None], jnp.asarray(rows, dtype))
    design = linear_map.design(params, inputs)
    return Gram.of(design.astype(dtype), "bias" in params)


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

    @in_full_precision
    def inverse(self, bound: Any, diagonal: Float[Array, "g 1 1"]) -> Inverse:
        r"""The inverse of :math:`c\, x^\top x + D`, c the bound."""
        eye = jnp.eye(self.inner.shape[-1], dtype=self.inner.dtype)
        inner = jax.vmap(inverse)(bound * self.inner + diagonal * eye)
        if self.sums is None:
            return Inverse(inner, None, None)
        column = bound * self.sums
        row = jnp.swapaxes(column, 1, 2)
        eliminated = inner @ column
        return Inverse(
            inner, eliminated, bound * self.rows + diagonal - row @ eliminated
        )

    def inverse_above(self, bound: Any, diagonal: Float[Array, "g 1 1"]) -> Inverse:
        """The inverse of the multiple of the identity that lies above, the trace."""
        size = self.inner.shape[-1] + (self.sums is not None)
        above = bound * size * self.mean_eigenvalue() + diagonal
        inner = jnp.eye(self.inner.shape[-1], dtype=self.inner.dtype) / above
        if self.sums is None:
            return Inverse(inner, None, None)
        return Inverse(inner, jnp.zeros_like(self.sums), above)


class DiagonalGram(NamedTuple):
    r"""The Gram matrix of a design that makes it diagonal.

    Attributes:
      inner: the entries of :math:`x^\top x`.
      rows: n.
    """

    inner: Float[Array, "1 d 1"]
    rows: Float[Array, ""]

    def mean_eigenvalue(self) -> Float[Array, "1 1 1"]:
        """The mean of the entries."""
        return jnp.mean(self.inner, axis=1, keepdims=True)

    def __matmul__(self, matrices: Matrices) -> Matrices:
        """The product with a layer's parameters."""
        return Matrices(self.inner * matrices.kernel, None)

    def inverse(self, bound: Any, diagonal: Float[Array, "1 1 1"]) -> DiagonalInverse:
        r"""The inverse of :math:`c\, x^\top x + D`; zero where there is nothing."""
        entries = bound * self.inner + diagonal
        return DiagonalInverse(jnp.where(entries > 0, 1 / entries, 0.0))

    def inverse_above(self, bound: Any, diagonal: Any) -> DiagonalInverse:
        """The inverse of the multiple of the identity that lies above."""
        above = bound * jnp.sum(self.inner, axis=1, keepdims=True) + diagonal
        return DiagonalInverse(jnp.broadcast_to(1 / above, self.inner.shape))


class DiagonalInverse(NamedTuple):
    """The inverse of a diagonal matrix.

    Attributes:
      entries: its diagonal.
    """

    entries: Float[Array, "1 d 1"]

    def is_definite(self, least: Any) -> Bool[Array, ""]:
        """Whether it is finite; no rounding spoils it."""
        del least
        return jnp.all(jnp.isfinite(self.entries))

    def __matmul__(self, right: Matrices) -> Matrices:
        """The product with numbers of the shapes of a layer's parameters."""
        return Matrices(self.entries * right.kernel, None)


class Inverse(NamedTuple):
    r"""The inverse of a symmetric matrix, by its parts.

    .. math::
      \begin{pmatrix} A & v \\ v^\top & k \end{pmatrix}

    Attributes:
      inner: :math:`A^{-1}`, for the kernel.
      eliminated: :math:`A^{-1} v`; None without a bias.
      complement: :math:`k - v^\top A^{-1} v`; None without a bias.
    """

    inner: Float[Array, "g d d"]
    eliminated: Float[Array, "g d 1"] | None
    complement: Float[Array, "g 1 1"] | None

    def is_definite(self, least: Any) -> Bool[Array, ""]:
        """Whether it is finite, positive, and not above the inverse of the least."""
        found = [jnp.diagonal(self.inner, axis1=-2, axis2=-1)]
        if self.complement is not None:
            found.append(1 / self.complement)
        within = [jnp.all((f > 0) & (f * least <= 1)) for f in found]
        return jnp.all(jnp.stack(within)) & jnp.all(jnp.isfinite(self.inner))

    @in_full_precision
    def __matmul__(self, right: Matrices) -> Matrices:
        """The product with numbers of the shapes of a layer's parameters."""
        kernel = self.inner @ right.kernel
        if self.eliminated is None or self.complement is None or right.bias is None:
            return Matrices(kernel, None)
        known = jnp.swapaxes(self.eliminated, 1, 2) @ right.kernel
        bias = (right.bias - known) / self.complement
        return Matrices(kernel - self.eliminated * bias, bias)
