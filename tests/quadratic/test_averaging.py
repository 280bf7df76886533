import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from locoprop_optax._quadratic.averaging import averaged, decay_at
from locoprop_optax._quadratic.linearization import PlaneModel
from locoprop_optax._utils.average import Average

NOTHING = Average.empty(PlaneModel(jnp.zeros((2, 2)), jnp.zeros(2)))


def along_d(slope, curvature):
    """A model of which only the direction matters."""
    return PlaneModel(jnp.diag(jnp.array([curvature, 0.0])), jnp.array([slope, 0.0]))


@given(st.floats(0.1, 5), st.floats(0.1, 5), st.floats(1, 3), st.floats(1, 3))
def test_the_step_is_the_best_for_the_sum_of_the_batches(s, t, c, e):
    average = averaged(NOTHING, along_d(s, c), 0.0)
    average = averaged(average, along_d(t, e), 0.5)
    beta, _ = average.value().minimum(None, jnp.zeros(()))
    np.testing.assert_allclose(beta, (s + t) / (c + e), rtol=1e-5)


def test_without_decay_the_last_batch_decides_however_curved():
    average = averaged(NOTHING, along_d(1.0, 1.0), 0.0)
    average = averaged(average, along_d(3.0, 1e4), 0.0)
    beta, _ = average.value().minimum(None, jnp.zeros(()))
    np.testing.assert_allclose(beta, 3e-4, rtol=1e-5)


def test_one_batch_of_huge_curvature_does_not_decide_for_long():
    average = averaged(NOTHING, along_d(1.0, 1.0), 0.0)
    average = averaged(average, along_d(1.0, 1e6), 0.9)
    beta, _ = average.value().minimum(None, jnp.zeros(()))
    np.testing.assert_allclose(beta, (0.9 + 0.1 * 1e-5) / (0.9 + 0.1 * 10), rtol=1e-5)


@pytest.mark.parametrize(
    ("count", "expected"), [(0, 0.0), (3, 0.0), (7, 0.5), (15, 0.75), (10**5, 0.9)]
)
def test_the_average_reaches_back_over_a_quarter_of_all_steps(count, expected):
    assert decay_at(0.9, 4, jnp.asarray(count)) == pytest.approx(expected)
    assert decay_at(0.0, 4, jnp.asarray(count)) == 0
