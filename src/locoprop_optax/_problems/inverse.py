"""The inverse of a positive definite matrix."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax.lax.linalg import cholesky, triangular_solve
from jaxtyping import Array, Float

P = ParamSpec("P")
T = TypeVar("T")
_LEAF = 64
_PIVOTS = 4


def in_full_precision(function: Callable[P, T]) -> Callable[P, T]:
    """Keeps a function's products from being rounded, whatever the device's default.

    The entries of an inverse cancel in products, so that few bits are not enough.
    """

    @wraps(function)
    def in_full(*args: P.args, **kwargs: P.kwargs) -> T:
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return in_full


@in_full_precision
def inverse(matrix: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """Inverts a symmetric positive definite matrix in the way its device does fast.

    Args:
      matrix: symmetric and positive definite.

    Returns:
      Its inverse; not finite where the matrix is not positive definite.
    """
    return jax.lax.platform_dependent(matrix, cpu=by_halves, default=by_cholesky)


def by_cholesky(matrix: Float[Array, "d d"]) -> Float[Array, "d d"]:
    r"""With :math:`H = L L^\top`, the product :math:`L^{-\top} L^{-1}`."""
    factor = cholesky(matrix, symmetrize_input=False)
    eye = jnp.eye(matrix.shape[0], dtype=matrix.dtype)
    root = triangular_solve(factor, eye, left_side=True, lower=True)
    return root.T @ root


def by_halves(matrix: Float[Array, "d d"]) -> Float[Array, "d d"]:
    r"""By the Schur complement :math:`S = C - B^\top A^{-1} B`, nearly all products.

    .. math::
      \begin{pmatrix} A & B \\ B^\top & C \end{pmatrix}^{-1} =
      \begin{pmatrix}
        A^{-1} + A^{-1} B S^{-1} B^\top A^{-1} & -A^{-1} B S^{-1} \\
        -S^{-1} B^\top A^{-1} & S^{-1}
      \end{pmatrix}

    On a CPU a factorization would contend with the products of other layers for the
    same cores.
    """
    size = matrix.shape[0]
    if size <= _LEAF:
        return _by_sweeps(matrix)
    half = -(-size // (2 * _LEAF)) * _LEAF
    a_inverse = by_halves(matrix[:half, :half])
    b, c = matrix[:half, half:], matrix[half:, half:]
    a_inverse_b = a_inverse @ b
    s_inverse = by_halves(c - b.T @ a_inverse_b)
    side = a_inverse_b @ s_inverse
    corner = a_inverse + side @ a_inverse_b.T
    return jnp.block([[corner, -side], [-side.T, s_inverse]])


def _by_sweeps(matrix: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """Sweeps a few rows and columns after another (Goodnight 1979)."""
    size = matrix.shape[0]
    missing = -size % _PIVOTS
    ones = jnp.pad(jnp.zeros(size, matrix.dtype), (0, missing), constant_values=1)
    matrix = jnp.pad(matrix, (0, missing)) + jnp.diag(ones)

    def sweep(k, swept):
        at = k * _PIVOTS
        columns = jax.lax.dynamic_slice_in_dim(swept, at, _PIVOTS, axis=1)
        pivots = jax.lax.dynamic_slice_in_dim(columns, at, _PIVOTS)
        minus_eye = -jnp.eye(_PIVOTS, dtype=swept.dtype)
        others = jax.lax.dynamic_update_slice_in_dim(columns, minus_eye, at, axis=0)
        edge = others @ _small_inverse(pivots)
        swept = swept - edge @ columns.T
        swept = jax.lax.dynamic_update_slice_in_dim(swept, edge, at, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(swept, edge.T, at, axis=0)

    swept = jax.lax.fori_loop(0, matrix.shape[0] // _PIVOTS, sweep, matrix)
    return -swept[:size, :size]


def _small_inverse(matrix: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """Sweeps one row and column after another."""
    index = jnp.arange(matrix.shape[0])
    for k in range(matrix.shape[0]):
        column = matrix[:, k]
        here = index == k
        edge = jnp.where(here, -1, column) / column[k]
        inner = matrix - jnp.outer(column, column) / column[k]
        inner = jnp.where(here[None, :], edge[:, None], inner)
        matrix = jnp.where(here[:, None], edge[None, :], inner)
    return -matrix
