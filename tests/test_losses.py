import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import locoprop_optax as loco
from tests.helpers import TRANSFERS

pytestmark = pytest.mark.usefixtures("float64")


def having(part):
    """The names of the transfer functions of which a part is known."""
    known = loco.losses.known_transfers()
    return [name for name in TRANSFERS if getattr(known[name], part) is not None]


rows = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 4), st.integers(1, 5)),
    elements=st.floats(-8, 8),
)


@pytest.mark.parametrize("name", having("potential"))
@given(a=rows)
def test_potential_has_the_transfer_as_its_gradient(name, a):
    transfer, h = loco.losses.as_transfer(name), 1e-4
    for at in np.ndindex(a.shape):
        ahead, behind = a.copy(), a.copy()
        ahead[at] += h
        behind[at] -= h
        rise = jnp.sum(transfer.potential(ahead)) - jnp.sum(transfer.potential(behind))
        expected = transfer.function(a)[at]
        np.testing.assert_allclose(rise / (2 * h), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", having("conjugate"))
@given(a=rows, seed=st.integers(0, 99))
def test_matching_loss_is_a_divergence(name, a, seed):
    transfer = loco.losses.as_transfer(name)
    loss = loco.losses.matching_loss()(transfer)
    b = np.random.default_rng(seed).normal(size=a.shape)
    assert loss.value(a, loss.output(b)) >= -1e-9
    np.testing.assert_allclose(loss.value(a, loss.output(a)), 0, atol=1e-9)
    gradient = jax.grad(loss.value)(jnp.asarray(a), loss.output(b))
    np.testing.assert_allclose(gradient, loss.gradient(a, loss.output(b)), atol=1e-9)


@pytest.mark.parametrize("name", having("derivative_bound"))
@given(a=rows)
def test_derivative_bound(name, a):
    transfer = loco.losses.as_transfer(name)
    for row in a:
        jacobian = np.asarray(jax.jacobian(transfer.function)(jnp.asarray(row)))
        assert np.linalg.norm(jacobian, 2) <= transfer.derivative_bound + 1e-9


def test_targets_out_of_range_change_the_value_by_a_constant():
    loss = loco.losses.matching_loss("tanh")(loco.losses.IDENTITY)
    points, target = jnp.linspace(-2, 2, 5), jnp.full(5, 1.02)
    assert np.all(np.isfinite([loss.value(a, target[0]) for a in points]))
    gradient = jax.grad(loss.value)(points, target)
    np.testing.assert_allclose(gradient, jnp.tanh(points) - 1.02, rtol=1e-12)


def test_squared_loss_ignores_the_transfer():
    loss = loco.losses.squared_loss()(loco.losses.as_transfer("relu"))
    a, t = jnp.array([-3.0, 1.0]), jnp.array([1.0, 1.0])
    assert loss.value(a, t) == 8.0
    assert loss.curvature == 1.0


def test_callable_has_a_gradient_but_no_value():
    loss = loco.losses.matching_loss(jnp.sin)(loco.losses.IDENTITY)
    a, t = jnp.array([0.5]), jnp.array([0.1])
    np.testing.assert_allclose(loss.gradient(a, t), jnp.sin(0.5) - 0.1)
    assert loss.curvature is None
    with pytest.raises(ValueError, match="'sin' has no value"):
        loss.value(a, t)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'tahn'.*.*identity, .*relu.*tanh"):
        loco.losses.matching_loss("tahn")
