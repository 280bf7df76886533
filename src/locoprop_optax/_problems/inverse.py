"""The inverse of a positive definite matrix."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax.lax.linalg import cholesky
from jax.scipy.linalg import cho_solve
from jaxtyping import Array, Float

P = ParamSpec("P")
T = TypeVar("T")


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
    r"""Inverts a symmetric positive definite matrix.

    With :math:`H = L L^\top`, it solves :math:`L L^\top X = I`.

    Args:
      matrix: symmetric and positive definite.

    Returns:
      Its inverse; not finite where the matrix is not positive definite.
    """
    # LAPACK and cuSOLVER read columns. Those of the transpose are the rows here, so
    # that XLA does not turn around what the matrix is made of.
    factor = cholesky(matrix.T, symmetrize_input=False)
    eye = jnp.eye(matrix.shape[0], dtype=matrix.dtype)
    found = cho_solve((factor, True), eye)
    return 0.5 * (found + found.T)  # as rows again, and symmetric to the last bit
