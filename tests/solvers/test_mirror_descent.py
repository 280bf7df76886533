from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import locoprop_optax as loco
from tests.helpers import (
    local_steps,
    random_layer,
    random_layers,
    regression,
    solved,
    train_step,
)


@pytest.mark.usefixtures("float64")
@given(random_layers, st.integers(1, 5), st.floats(5.0, 50.0))
def test_several_steps_by_hand(drawn, num_steps, strength):
    """In the geometry of the signed entropy, on the matching loss."""
    params, layer = random_layer(**drawn)
    make = partial(
        loco.scale_by_locoprop,
        target=loco.targets.gradient_descent(0.5),
        regularizer=loco.regularizers.signed_entropy(strength, scale=0.5),
        solver=loco.solvers.mirror_descent(num_steps),
    )
    f, x = layer.transfer.function, np.asarray(layer.inputs)
    goal = f(layer.preactivations) - 0.5 * layer.cotangents
    theta = dict(params)
    for _ in range(num_steps):
        a = x @ theta["kernel"] + theta.get("bias", 0.0)
        residual = np.asarray(f(a) - goal)
        gradient = {"kernel": x.T @ residual, "bias": residual.sum(0)}
        theta = {
            n: 0.5 * np.sinh(np.arcsinh(p / 0.5) - gradient[n] / strength)
            for n, p in theta.items()
        }
    for name, update in solved(make, params, layer).items():
        expected = params[name] - theta[name]
        np.testing.assert_allclose(update, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.usefixtures("float64")
@given(random_layers, st.floats(1.0, 9.0))
def test_with_the_squared_distance_it_is_gradient_descent(drawn, strength):
    params, layer = random_layer(**drawn)
    for regularizer in (
        loco.regularizers.squared_l2(strength),
        loco.regularizers.bregman(strength, loco.losses.as_transfer("identity")),
    ):
        make = partial(
            loco.scale_by_locoprop,
            target=loco.targets.gradient_descent(0.5),
            regularizer=regularizer,
            solver=loco.solvers.mirror_descent(),
        )
        for name, update in solved(make, params, layer).items():
            expected = 0.5 * layer.gradient[name] / strength
            np.testing.assert_allclose(update, expected, rtol=1e-6, atol=1e-12)


def test_exponentiated_gradient_keeps_weights_positive_while_it_trains():
    loss_fn, params, batch = regression()
    params = jax.tree.map(lambda p: jnp.abs(p) + 0.1, params)
    layers = loco.layers(loss_fn)(params, batch)
    tx = local_steps(
        layers,
        1.0,
        target=loco.targets.gradient_descent(1.0),
        regularizer=loco.regularizers.relative_entropy(20.0),
        solver=loco.solvers.mirror_descent(3),
    )
    step, state = jax.jit(train_step(loss_fn, layers, tx)), tx.init(params)
    start = loss_fn(params, batch)
    for _ in range(40):
        params, state, loss = step(params, state, batch)
    assert loss < 0.9 * start
    assert all(bool(jnp.all(p > 0)) for p in jax.tree.leaves(params))


def test_needs_a_geometry():
    params, layer = random_layer(0, 6, 4, 3)
    solver = loco.solvers.mirror_descent()
    with pytest.raises(ValueError, match="'layer/kernel': mirror_descent needs a reg"):
        solved(partial(loco.scale_by_locoprop, solver=solver), params, layer)
    softplus = loco.regularizers.bregman(1.0, loco.losses.as_transfer("softplus"))
    make = partial(loco.scale_by_locoprop, solver=solver, regularizer=softplus)
    with pytest.raises(ValueError, match="the inverse of 'softplus'"):
        solved(make, params, layer)
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        loco.solvers.mirror_descent(0)
