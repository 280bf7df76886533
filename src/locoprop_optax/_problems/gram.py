r"""The curvature of a squared loss in a layer's parameters, and its inverse."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from locoprop_optax._problems.inverse import in_full_precision, inverse
from locoprop_optax._records.linear_maps import Factor, LayerParams, LinearMap, Lookup


def gram_of(
    linear_map: LinearMap, params: LayerParams, inputs: Array
) -> Gram | DiagonalGram:
    """The Gram matrices of a layer's design, in the dtype of its parameters."""
    dtype = jnp.result_type(*params.values())
    if isinstance(linear_map, Lookup | Factor):
        entries = linear_map.squares(params, inputs).astype(dtype)
        rows = inputs.size / (entries.size if linear_map.summed else 1)
        return DiagonalGram(entries[..., None] / rows, jnp.asarray(rows, dtype))
    return Gram.of(linear_map.design(params, inputs).astype(dtype))


class Gram(NamedTuple):
    r"""The Gram matrices of a layer's design, one for each of its groups.

    They are means over the rows, since those are averaged over batches.

    Attributes:
      inner: :math:`x^\top x / n`.
      rows: n; None for an average.
    """

    inner: Float[Array, "g d d"]
    rows: Any

    @classmethod
    def of(cls, design: Float[Array, "g n d"]) -> Gram:
        """The Gram matrices of a design."""
        rows = design.shape[1]
        inner = jnp.einsum("gni,gnj->gij", design, design) / rows
        return cls(inner, jnp.asarray(rows, design.dtype))

    def mean_eigenvalue(self) -> Float[Array, "g 1 1"]:
        """Of a row: the trace over the size."""
        trace = jnp.trace(self.inner, axis1=-2, axis2=-1)
        return trace[:, None, None] / self.inner.shape[-1]

    def __matmul__(self, matrix: Float[Array, "g d o"]) -> Float[Array, "g d o"]:
        r"""The product of :math:`x^\top x` with a layer's parameters."""
        return self.rows * (self.inner @ matrix)

    @in_full_precision
    def inverse(
        self, bound: Any, diagonal: Float[Array, "g 1 1"]
    ) -> tuple[Inverse, Bool[Array, ""]]:
        r"""The inverse of :math:`c\, x^\top x / n + D`, c the bound.

        Where rounding leaves nothing definite, the multiple of the identity that lies
        above, the trace, stands for the matrix.

        Returns:
          The inverse, and whether it is that of the matrix.
        """
        groups, size, _ = self.inner.shape
        eye = jnp.eye(size, dtype=self.inner.dtype)
        eps = jnp.finfo(self.inner.dtype).eps
        mean = bound * self.mean_eigenvalue()
        scale = mean + diagonal  # so that the squares of the inverse do not overflow
        found = jax.vmap(inverse)((bound * self.inner + diagonal * eye) / scale)
        definite = jnp.sum(jnp.square(found)) * eps**2 <= groups * size
        above = eye / (size * mean + diagonal)
        return Inverse(jnp.where(definite, found / scale, above)), definite


class Inverse(NamedTuple):
    """The inverse of a symmetric matrix, one for each group.

    Attributes:
      matrix: as it is.
    """

    matrix: Float[Array, "g d d"]

    @in_full_precision
    def __matmul__(self, right: Float[Array, "g d o"]) -> Float[Array, "g d o"]:
        """The product with numbers of the shapes of a layer's parameters."""
        return self.matrix @ right


class DiagonalGram(NamedTuple):
    r"""The Gram matrix of a design that makes it diagonal.

    Attributes:
      inner: the entries of :math:`x^\top x / n`.
      rows: n; None for an average.
    """

    inner: Float[Array, "1 d 1"]
    rows: Any

    def mean_eigenvalue(self) -> Float[Array, "1 1 1"]:
        """Of a row: the mean of the entries."""
        return jnp.mean(self.inner, axis=1, keepdims=True)

    def __matmul__(self, matrix: Float[Array, "1 d o"]) -> Float[Array, "1 d o"]:
        """The product with a layer's parameters."""
        return self.rows * self.inner * matrix

    def inverse(
        self, bound: Any, diagonal: Float[Array, "1 1 1"]
    ) -> tuple[DiagonalInverse, Bool[Array, ""]]:
        r"""The inverse of :math:`c\, x^\top x / n + D`; zero where there is nothing."""
        entries = bound * self.inner + diagonal
        largest = jnp.maximum(entries, jnp.finfo(entries.dtype).tiny)
        found = DiagonalInverse(jnp.where(entries > 0, 1 / largest, 0.0))
        return found, jnp.asarray(True)


class DiagonalInverse(NamedTuple):
    """The inverse of a diagonal matrix.

    Attributes:
      entries: its diagonal.
    """

    entries: Float[Array, "1 d 1"]

    def __matmul__(self, right: Float[Array, "1 d o"]) -> Float[Array, "1 d o"]:
        """The product with numbers of the shapes of a layer's parameters."""
        return self.entries * right
