import jax
import jax.numpy as jnp
import numpy as np
import pytest

from locoprop_optax._problems.inverse import inverse


@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 200])
def test_inverse(size):
    with jax.enable_x64(True):
        x = np.random.default_rng(size).normal(size=(size + 3, size))
        matrix = jnp.asarray(x.T @ x + 0.1 * np.eye(size))
        found = jax.jit(inverse)(matrix)
        np.testing.assert_allclose(found @ matrix, np.eye(size), atol=1e-9)
        np.testing.assert_allclose(found, found.T, rtol=1e-12, atol=1e-12)


def test_inverse_of_a_batch():
    x = np.random.default_rng(0).normal(size=(3, 90, 70))
    matrices = jnp.asarray(np.einsum("bni,bnj->bij", x, x), jnp.float32)
    found = jax.vmap(inverse)(matrices)
    for one, matrix in zip(found, matrices, strict=True):
        np.testing.assert_allclose(one @ matrix, np.eye(70), atol=1e-3)


def test_what_is_inverted_now_and_then_is_not_turned_around():
    def refreshed(average, known, rows, is_due):
        def anew():
            moved = 0.8 * average + rows.T @ rows
            return moved, inverse(moved + jnp.eye(64))

        return jax.lax.cond(is_due, anew, lambda: (average, known))

    square, rows = jnp.ones((64, 64)), jnp.ones((100, 64))
    program = jax.jit(refreshed).lower(square, square, rows, True).compile().as_text()
    (line,) = [line for line in program.splitlines() if " conditional(" in line]
    assert "{0,1}" not in line.split(" conditional(")[0], line
