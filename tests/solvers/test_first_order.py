import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import locoprop_optax as loco
from tests.helpers import random_layer, regression, solved


@pytest.mark.usefixtures("float64")
def test_first_order_by_hand():
    params, layer = random_layer(0, 6, 4, 3, "tanh")
    num_steps, rate, floor = 6, 0.02, 0.4
    tx = loco.scale_by_locoprop(
        target=loco.targets.gradient_descent(0.5),
        regularizer=loco.regularizers.squared_l2(0.3),
        solver=loco.solvers.first_order(
            lambda r: optax.sgd(r, momentum=0.9), num_steps, floor, learning_rate=rate
        ),
    )
    x = jnp.c_[layer.inputs, jnp.ones(6)]
    theta = start = jnp.vstack([params["kernel"], params["bias"]])
    goal = jnp.tanh(x @ start) - 0.5 * layer.cotangents
    velocity = 0
    for k in range(num_steps):
        gradient = x.T @ (jnp.tanh(x @ theta) - goal) + 0.3 * (theta - start)
        velocity = 0.9 * velocity + gradient
        theta = theta - rate * max(1 - k / num_steps, floor) * velocity
    found = solved(tx, params, layer)
    np.testing.assert_allclose(found["kernel"], (start - theta)[:-1], rtol=1e-9)
    np.testing.assert_allclose(found["bias"], (start - theta)[-1], rtol=1e-9)


def test_the_two_forms_of_an_optimizer_differ_in_what_momentum_holds():
    params, layer = random_layer(0, 6, 4, 3, "tanh")
    made = [
        loco.solvers.first_order(
            lambda r: optax.rmsprop(r, momentum=0.9), 5, learning_rate=0.01
        ),
        loco.solvers.first_order(optax.rmsprop(0.01, momentum=0.9), 5),
    ]
    first, second = (
        solved(loco.scale_by_locoprop(solver=solver), params, layer)["kernel"]
        for solver in made
    )
    assert not np.allclose(first, second, rtol=1e-2)
    plain = [
        loco.solvers.first_order(optax.adam, 5, learning_rate=0.01),
        loco.solvers.first_order(optax.adam(0.01), 5),
    ]
    first, second = (
        solved(loco.scale_by_locoprop(solver=solver), params, layer)["kernel"]
        for solver in plain
    )
    np.testing.assert_allclose(first, second, rtol=1e-5)


@pytest.mark.parametrize("reset", [False, True])
def test_state_lives_on_unless_reset(reset):
    loss_fn, params, batch = regression()
    tx = loco.scale_by_locoprop(
        solver=loco.solvers.first_order(optax.adam(0.01), 3, reset=reset)
    )
    state = tx.init(params)
    _, grads, intermediates = loco.linen.value_and_grad(loss_fn)(params, batch)
    first, new_state = tx.update(grads, state, params, intermediates=intermediates)
    later, _ = tx.update(
        grads,
        new_state._replace(target=state.target, count=state.count),
        params,
        intermediates=intermediates,
    )
    same = jax.tree.map(lambda a, b: bool(jnp.allclose(a, b)), first, later)
    assert all(jax.tree.leaves(same)) == reset


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"num_steps": 0}, ValueError, "local steps.* at least 1, got 0"),
        ({"num_steps": 2.0}, TypeError, "Python int, got 2.0"),
        ({"decay_floor": 1.5}, ValueError, r"decay_floor must be in \[0, 1\]"),
        ({"learning_rate": 0.1}, TypeError, "goes with a function"),
        ({"optimizer": optax.sgd}, TypeError, "needs `learning_rate=`"),
    ],
)
def test_first_order_errors(options, error, match):
    options = {"optimizer": optax.sgd(0.1), **options}
    with pytest.raises(error, match=match):
        loco.solvers.first_order(**options)
