import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import locoprop_optax as loco
from tests.helpers import MAIN_TRANSFERS, TRANSFERS, slow

pytestmark = pytest.mark.usefixtures("float64")


def having(part):
    """The names of the transfer functions of which a part is known."""
    known = loco.losses.known_transfers()
    return [name for name in TRANSFERS if getattr(known[name], part) is not None]


def mainly(names):
    """The names, those of less usual transfer functions for `pytest -m slow`."""
    return [name if name in MAIN_TRANSFERS else slow(name) for name in names]


STABLE = [name for name in having("divergence") if name != "exp"]
SLOPED = ["elu", "selu"]  # whose targets round at the edge of their range

rows = hnp.arrays(
    np.float64,
    st.sampled_from([(1, 1), (3, 1), (2, 4)]),
    elements=st.floats(-8, 8),
)


@pytest.mark.parametrize("name", mainly(having("potential")))
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


@pytest.mark.parametrize("name", mainly(having("conjugate")))
@given(a=rows, seed=st.integers(0, 99))
def test_matching_loss_is_a_divergence(name, a, seed):
    transfer = loco.losses.as_transfer(name)
    loss = loco.losses.matching_loss()(transfer)
    b = np.random.default_rng(seed).normal(size=a.shape)
    assert loss.value(a, loss.output(b)) >= -1e-9
    np.testing.assert_allclose(loss.value(a, loss.output(a)), 0, atol=1e-9)
    gradient = jax.grad(loss.value)(jnp.asarray(a), loss.output(b))
    np.testing.assert_allclose(gradient, loss.gradient(a, loss.output(b)), atol=1e-9)


@pytest.mark.parametrize("name", mainly(having("derivative_bound")))
@given(a=rows)
def test_derivative_bound(name, a):
    transfer = loco.losses.as_transfer(name)
    for row in a:
        jacobian = np.asarray(jax.jacobian(transfer.function)(jnp.asarray(row)))
        assert np.linalg.norm(jacobian, 2) <= transfer.derivative_bound + 1e-9


def test_targets_out_of_range_change_the_value_by_a_constant():
    loss = loco.losses.matching_loss("tanh")(loco.losses.as_transfer("identity"))
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
    loss = loco.losses.matching_loss(jnp.sin)(loco.losses.as_transfer("identity"))
    a, t = jnp.array([0.5]), jnp.array([0.1])
    np.testing.assert_allclose(loss.gradient(a, t), jnp.sin(0.5) - 0.1)
    assert loss.curvature is None
    with pytest.raises(ValueError, match="'sin' has no value"):
        loss.value(a, t)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'tahn'.*.*identity, .*relu.*tanh"):
        loco.losses.matching_loss("tahn")


def test_squared_loss_after_the_activation():
    loss = loco.losses.squared_loss(after_activation=True)(
        loco.losses.as_transfer("softmax")
    )
    a, t = jnp.array([[0.5, -1.0, 2.0]]), jnp.array([[0.1, 0.2, 0.7]])
    expected = 0.5 * np.sum((jax.nn.softmax(a) - t) ** 2)
    np.testing.assert_allclose(loss.value(a, t), expected)
    np.testing.assert_allclose(loss.gradient(a, t), jax.grad(loss.value)(a, t))
    assert loss.curvature is None


def test_project_is_near_and_in_range():
    for name in having("divergence"):
        transfer = loco.losses.as_transfer(name)
        reached = transfer.function(jnp.linspace(-3, 3, 12).reshape(3, 4))
        np.testing.assert_allclose(transfer.project(reached), reached, rtol=1e-12)
    beyond = jnp.array([[-0.5, 0.5, 1.0]])
    expected = [[0, 1 / 3, 2 / 3]]
    np.testing.assert_allclose(
        loco.losses.as_transfer("softmax").project(beyond), expected
    )


@pytest.mark.parametrize("name", ["exp", *STABLE])
@given(
    size=st.floats(-4, 4),
    gap=st.floats(-4, 4),
    signs=st.tuples(st.sampled_from([-1, 1]), st.sampled_from([-1, 1])),
    near=st.booleans(),
)
def test_divergence_in_float32_is_that_of_float64(name, size, gap, signs, near):
    """At any size up to 1e4, of two points that are far apart or close together."""
    transfer = loco.losses.as_transfer(name)
    start = signs[0] * 10.0**size
    end = start * (1 + signs[1] * 10 ** (gap / 2 - 3)) if near else signs[1] * 10.0**gap
    if name == "exp":  # itself infinite in float32 above 88
        start, end = np.clip([start, end], -80, 80)
    a = jnp.asarray([start, 0.3], jnp.float32)
    t = transfer.function(jnp.asarray([end, -0.2], jnp.float32))
    loss = loco.losses.matching_loss(transfer)(transfer)
    found = loss.value(a, t)
    assert found.dtype == jnp.float32
    wide = a.astype(jnp.float64), transfer.project(t.astype(jnp.float64))
    expected = loss.value(*wide)
    # What rounding the arguments of D may change: a by dD/da, t by dD/dt = b - a.
    slack = 1e-6 * float(
        jnp.sum(jnp.abs(wide[0] * loss.gradient(*wide)))
        + jnp.sum(jnp.abs(wide[0] * wide[1]) if name in SLOPED else 0)
    )
    assert jnp.isfinite(found)
    assert found >= 0
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=slack + 1e-7)
    assert loss.value(a, transfer.function(a)) <= 1e-6 * (1 + jnp.max(jnp.abs(a)))


@pytest.mark.parametrize("name", STABLE)
@given(size=st.floats(-4, 4), sign=st.sampled_from([-1, 1]))
def test_divergence_of_bfloat16(name, size, sign):
    transfer = loco.losses.as_transfer(name)
    a = jnp.asarray([sign * 10.0**size, 0.5], jnp.bfloat16)
    loss = loco.losses.matching_loss(transfer)(transfer)
    values = [loss.value(a, transfer.project(transfer.function(b))) for b in (a, -a)]
    gradient = jax.grad(loss.value)(a, transfer.function(-a))
    assert all(v.dtype == jnp.float32 and jnp.isfinite(v) and v >= 0 for v in values)
    assert jnp.all(jnp.isfinite(gradient))


@pytest.mark.parametrize("name", STABLE)
def test_divergence_by_quadrature(name):
    """D(a, f(b)) is the integral of f(s) - f(b) from b to a, in moderate numbers."""
    transfer = loco.losses.as_transfer(name)
    if transfer.over_last_axis:
        pytest.skip("a line integral of rows; the identity above proves it")
    loss = loco.losses.matching_loss(transfer)(transfer)
    for a, b in [(0.3, 0.31), (-2.0, 1.5), (2.0, -1.0), (0.01, 0.0), (5.0, 7.0)]:
        s = jnp.linspace(b, a, 20001)
        target = transfer.function(jnp.asarray(b))
        expected = jnp.trapezoid(transfer.function(s) - target, s)
        found = loss.value(jnp.asarray(a), target)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)
