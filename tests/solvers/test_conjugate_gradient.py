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
    problem_of,
    random_layer,
    random_layers,
    regression,
    solved,
    train_step,
)


@pytest.mark.usefixtures("float64")
@given(random_layers, st.floats(0.05, 2.0), st.integers(1, 3))
def test_enough_iterations_give_majorized_newton(drawn, damping, num_steps):
    params, layer = random_layer(**drawn)
    precise = {"num_steps": num_steps, "tolerance": 1e-11}
    by_cg, by_inverse = (
        solved(
            partial(
                loco.scale_by_locoprop,
                target=loco.targets.gradient_descent(0.5),
                solver=solver,
            ),
            params,
            layer,
        )
        for solver in (
            loco.solvers.conjugate_gradient(400, damping, **precise),
            loco.solvers.majorized_newton(num_steps, damping),
        )
    )
    for name, expected in by_inverse.items():
        np.testing.assert_allclose(by_cg[name], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.usefixtures("float64")
@given(random_layers, st.floats(0.05, 50.0), st.integers(1, 4))
def test_never_raises_the_objective(drawn, gamma, iterations):
    params, layer = random_layer(**drawn)
    problem = problem_of(params, layer, gamma=gamma)
    values = [problem.value(problem.no_step())]
    for num_steps in (1, 2, 4):
        make = partial(
            loco.scale_by_locoprop,
            target=loco.targets.gradient_descent(gamma),
            solver=loco.solvers.conjugate_gradient(
                iterations, 0.0, num_steps=num_steps
            ),
        )
        update = solved(make, params, layer)
        values.append(problem.value({name: -u for name, u in update.items()}))
    assert all(np.diff(values) <= 1e-9 * (1 + np.abs(values[0])))


@pytest.mark.usefixtures("float64")
def test_convolutions():
    def forward(params, x):
        kernel = params["kernel"].transpose(2, 1, 0)
        return jnp.moveaxis(jax.lax.conv(x, kernel, (1,), "SAME"), 1, -1)

    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 2, 5)))
    g = jnp.asarray(rng.normal(size=(3, 5, 4)))
    params = {"kernel": jnp.asarray(rng.normal(size=(3, 2, 4)))}

    def loss_fn(params):
        return jnp.sum(g * forward(params, x))

    layers = loco.layers(loss_fn)(params)
    _, grads, intermediates = loco.value_and_grad(loss_fn, layers)(params)
    updates = []
    for solver in (
        loco.solvers.conjugate_gradient(60, 0.2),
        loco.solvers.majorized_newton(1, 0.2),
    ):
        tx = loco.scale_by_locoprop(layers, solver=solver)
        state = tx.init(params)
        step, _ = tx.update(grads, state, params, intermediates=intermediates)
        updates.append(step["kernel"])
    by_cg, by_inverse = updates
    np.testing.assert_allclose(by_cg, by_inverse, rtol=1e-7)


def test_trains_a_model():
    loss_fn, params, batch = regression()
    layers = loco.layers(loss_fn)(params, batch)
    tx = local_steps(layers, solver=loco.solvers.conjugate_gradient(4))
    step, state = jax.jit(train_step(loss_fn, layers, tx)), tx.init(params)
    start = loss_fn(params, batch)
    for _ in range(30):
        params, state, loss = step(params, state, batch)
    assert loss < 0.6 * start


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_iterations": 0}, "num_iterations must be at least 1, got 0"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"damping": -1.0}, "damping must not be negative"),
        ({"tolerance": -1.0}, "tolerance must not be negative"),
    ],
)
def test_errors(options, match):
    with pytest.raises(ValueError, match=match):
        loco.solvers.conjugate_gradient(**options)


def test_needs_a_bound():
    params, layer = random_layer(0, 6, 4, 3)
    make = partial(
        loco.scale_by_locoprop,
        loss=loco.losses.matching_loss("exp"),
        solver=loco.solvers.conjugate_gradient(),
    )
    with pytest.raises(
        ValueError, match=r"'layer/kernel': conjugate_gradient needs .*'exp'"
    ):
        solved(make, params, layer)
