from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import locoprop_optax as loco
from tests.helpers import (
    MLP,
    counted,
    local_steps,
    problem_of,
    random_layer,
    random_layers,
    regression,
    solved,
    train_step,
)


@pytest.mark.usefixtures("float64")
def test_first_order_by_hand():
    params, layer = random_layer(0, 6, 4, 3, "tanh")
    num_steps, rate, floor = 6, 0.02, 0.4
    make = partial(
        loco.scale_by_locoprop,
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
    found = solved(make, params, layer)
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
        solved(partial(loco.scale_by_locoprop, solver=solver), params, layer)["kernel"]
        for solver in made
    )
    assert not np.allclose(first, second, rtol=1e-2)
    plain = [
        loco.solvers.first_order(optax.adam, 5, learning_rate=0.01),
        loco.solvers.first_order(optax.adam(0.01), 5),
    ]
    first, second = (
        solved(partial(loco.scale_by_locoprop, solver=solver), params, layer)["kernel"]
        for solver in plain
    )
    np.testing.assert_allclose(first, second, rtol=1e-5)


@pytest.mark.parametrize("reset", [False, True])
def test_state_lives_on_unless_reset(reset):
    loss_fn, params, batch = regression()
    layers = loco.layers(loss_fn)(params, batch)
    tx = loco.scale_by_locoprop(
        layers, solver=loco.solvers.first_order(optax.adam(0.01), 3, reset=reset)
    )
    state = tx.init(params)
    _, grads, intermediates = loco.value_and_grad(loss_fn, layers)(params, batch)
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


@pytest.mark.usefixtures("float64")
@given(random_layers, st.integers(2, 8), st.sampled_from([0.0, 0.4]))
def test_the_gram_form_is_the_same(drawn, num_steps, strength):
    """Where it is chosen follows from the counts of operations."""
    params, layer = random_layer(**drawn)
    problem = problem_of(
        params,
        layer,
        loss=loco.losses.squared_loss(),
        regularizer=loco.regularizers.squared_l2(strength),
    )
    step, _ = random_layer(**{**drawn, "seed": drawn["seed"] // 2})
    by_gram = replace(problem, gram=problem.to_gram())
    for name, expected in problem.gradient(step).items():
        found = by_gram.gradient(step)[name]
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    n, d, o = drawn["n"], drawn["d_in"] + drawn["bias"], drawn["d_out"]
    assert problem.sizes() == (n, d, o)
    counted = 2 * n * d * d + num_steps * 2 * d * d * o < num_steps * 4 * n * d * o
    assert problem.prefers_gram(num_steps) == counted


def test_the_gram_form_is_only_for_the_squared_loss():
    params, layer = random_layer(0, 90, 2, 3, "tanh")
    squared = problem_of(params, layer, loss=loco.losses.squared_loss())
    assert squared.prefers_gram(9)
    assert not problem_of(params, layer).prefers_gram(9)


@pytest.mark.usefixtures("float64")
def test_each_step_has_its_own_slice_of_the_examples():
    params, layer = random_layer(0, 7, 4, 3, "tanh")
    rate = 0.05
    make = partial(
        loco.scale_by_locoprop,
        target=loco.targets.gradient_descent(0.5),
        solver=loco.solvers.first_order(
            optax.sgd(rate), num_steps=5, decay_floor=1.0, local_batch_size=3
        ),
    )
    x = np.c_[layer.inputs, np.ones(7)]
    theta = start = np.vstack([params["kernel"], params["bias"]])
    goal = np.tanh(x @ start) - 0.5 * np.asarray(layer.cotangents)
    for rows in [slice(0, 7), slice(0, 3), slice(3, 6), slice(0, 3), slice(3, 6)]:
        share = 1 if rows == slice(0, 7) else 7 / 3
        residual = np.tanh(x[rows] @ theta) - goal[rows]
        theta = theta - rate * share * x[rows].T @ residual
    found = solved(make, params, layer)
    np.testing.assert_allclose(found["kernel"], (start - theta)[:-1], rtol=1e-9)


def test_float32_stays_where_a_schedule_is_float64():
    with jax.enable_x64(True):
        loss_fn, params, batch = regression(MLP(dtype=jnp.float32))
        params, batch = jax.tree.map(lambda a: a.astype("float32"), (params, batch))
        regularizer = loco.regularizers.squared_l2(lambda c: jnp.float64(1) / (1 + c))
        layers = loco.layers(loss_fn)(params, batch)
        tx = loco.locoprop_m(
            layers, optax.cosine_onecycle_schedule(100, 1e-3), regularizer=regularizer
        )
        step, state = train_step(loss_fn, layers, tx), tx.init(params)
        like = jax.tree.map(lambda leaf: leaf.dtype, state)
        _, state, _ = step(params, state, batch)
        assert jax.tree.map(lambda leaf: leaf.dtype, state) == like


def test_slices_need_examples():
    params, layer = random_layer(0, 7, 4, 3, "tanh")
    make = partial(
        loco.scale_by_locoprop,
        solver=loco.solvers.first_order(optax.sgd(0.1), 3, local_batch_size=8),
    )
    with pytest.raises(
        ValueError, match=r"Layer 'layer/kernel': local_batch_size is 8.* 7\."
    ):
        solved(make, params, layer)


@pytest.mark.usefixtures("float64")
def test_tolerance_stops_early():
    params, layer = random_layer(0, 6, 4, 3, "tanh")

    loss = loco.losses.squared_loss()

    def update(num_steps, tolerance=None):
        make = partial(
            loco.scale_by_locoprop,
            loss=loss,
            target=loco.targets.gradient_descent(0.5),
            solver=loco.solvers.first_order(
                optax.sgd(0.05), num_steps, decay_floor=1.0, tolerance=tolerance
            ),
        )
        return solved(make, params, layer)["kernel"]

    problem = problem_of(params, layer, gamma=0.5, loss=loss)
    first = optax.tree.norm(problem.gradient_at_start())
    step, taken = problem.no_step(), 0
    while taken < 99 and optax.tree.norm(problem.gradient(step)) > 0.3 * first:
        gradient = problem.gradient(step)
        step = {name: step[name] - 0.05 * g for name, g in gradient.items()}
        taken += 1
    assert 1 < taken < 99
    np.testing.assert_allclose(update(200, 0.3), update(taken), rtol=1e-9)
    np.testing.assert_allclose(update(2, 1e-12), update(2), rtol=1e-9)
    with pytest.raises(ValueError, match="tolerance must be positive"):
        loco.solvers.first_order(optax.sgd(0.1), tolerance=0.0)


@pytest.mark.parametrize("options", [{"tolerance": 0.5}, {"local_batch_size": 2}])
def test_options_work_for_layers_solved_together(options):
    loss_fn, params, batch = regression(MLP(hidden=3), features=3)  # equal layers
    layers = loco.layers(loss_fn)(params, batch)
    tx = local_steps(
        layers,
        1.0,
        solver=loco.solvers.first_order(optax.sgd(0.02), 4, **options),
    )
    step, traces = counted(train_step(loss_fn, layers, tx))
    state = tx.init(params)
    start = loss_fn(params, batch)
    for _ in range(30):
        params, state, loss = step(params, state, batch)
    assert loss < 0.9 * start
    assert len(traces) == 1
