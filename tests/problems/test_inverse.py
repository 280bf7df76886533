import jax
import jax.numpy as jnp
import numpy as np
import pytest

from locoprop_optax._problems.inverse import by_cholesky, by_halves, inverse


@pytest.mark.parametrize("function", [inverse, by_halves, by_cholesky])
@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 200])
def test_inverse(function, size):
    with jax.enable_x64(True):
        x = np.random.default_rng(size).normal(size=(size + 3, size))
        matrix = jnp.asarray(x.T @ x + 0.1 * np.eye(size))
        found = jax.jit(function)(matrix)
        np.testing.assert_allclose(found @ matrix, np.eye(size), atol=1e-9)
        np.testing.assert_allclose(found, found.T, rtol=1e-12, atol=1e-12)


def test_inverse_in_float32_is_as_good_as_a_factorization():
    """On average: of one matrix, the order of rounding decides."""
    functions, errors = (by_halves, by_cholesky), []
    for seed in range(8):
        x = np.random.default_rng(seed).normal(size=(100, 300)).astype(np.float32)
        matrix = jnp.asarray(x.T @ x + 3 * np.eye(300, dtype=np.float32))
        exact = np.linalg.inv(np.asarray(matrix, np.float64))
        errors.append([np.abs(jax.jit(f)(matrix) - exact).max() for f in functions])
    ours, factorization = np.mean(errors, axis=0)
    assert ours < 5 * factorization


def test_inverse_of_a_batch():
    x = np.random.default_rng(0).normal(size=(3, 90, 70))
    matrices = jnp.asarray(np.einsum("bni,bnj->bij", x, x), jnp.float32)
    found = jax.vmap(inverse)(matrices)
    for one, matrix in zip(found, matrices, strict=True):
        np.testing.assert_allclose(one @ matrix, np.eye(70), atol=1e-3)
