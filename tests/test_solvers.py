import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import locoprop_optax as loco
from tests.helpers import problem_of, random_layer, regression, solved


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


@pytest.mark.usefixtures("float64")
def test_damping_is_relative_to_the_mean_eigenvalue():
    params, layer = random_layer(0, 6, 4, 3, "sigmoid", bias=False)
    problem = problem_of(params, layer, gamma=0.5)
    tx = loco.scale_by_locoprop(
        target=loco.targets.gradient_descent(0.5),
        solver=loco.solvers.majorized_newton(num_steps=1, damping=0.2),
    )
    gram = layer.inputs.T @ layer.inputs
    bound = 0.25 * np.mean(np.linalg.eigvalsh(gram))
    hessian = 0.25 * gram + 0.2 * bound * jnp.eye(4)
    expected = jnp.linalg.solve(hessian, problem.gradient_at_start()["kernel"])
    np.testing.assert_allclose(solved(tx, params, layer)["kernel"], expected, rtol=1e-9)


def test_majorized_newton_needs_a_bound():
    params, layer = random_layer(0, 6, 4, 3)
    tx = loco.scale_by_locoprop(loss=loco.losses.matching_loss(jnp.sin))
    with pytest.raises(
        ValueError, match=r"bound on the curvature of .*'sin'.*identity"
    ):
        solved(tx, params, layer)


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


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"num_steps": 0}, ValueError, "at least 1, got 0"),
        ({"damping": -0.1}, ValueError, "damping must not be negative, got -0.1"),
    ],
)
def test_majorized_newton_errors(options, error, match):
    with pytest.raises(error, match=match):
        loco.solvers.majorized_newton(**options)


@pytest.mark.usefixtures("float64")
def test_exact_is_foof():
    params, layer = random_layer(0, 6, 4, 3, "tanh")
    tx = loco.scale_by_locoprop(
        loss=loco.losses.squared_loss(),
        target=loco.targets.gradient_descent(0.7),
        solver=loco.solvers.exact(damping=0.2),
    )
    x = np.c_[layer.inputs, np.ones(6)]
    gram = x.T @ x
    damped = gram + 0.2 * np.trace(gram) / 5 * np.eye(5)
    expected = 0.7 * np.linalg.solve(damped, x.T @ layer.cotangents)
    found = solved(tx, params, layer)
    np.testing.assert_allclose(found["kernel"], expected[:-1], rtol=1e-9)
    np.testing.assert_allclose(found["bias"], expected[-1], rtol=1e-9)


def test_exact_solves_the_squared_loss_only():
    params, layer = random_layer(0, 6, 4, 3, "tanh")
    tx = loco.scale_by_locoprop(solver=loco.solvers.exact(0.1))
    with pytest.raises(ValueError, match=r"exact solves the squared loss, not .*tanh"):
        solved(tx, params, layer)


@pytest.mark.parametrize("share", [1e-3, 1e3])
def test_limited_steps(share):
    params, layer = random_layer(0, 6, 4, 3, "tanh")
    newton = loco.solvers.majorized_newton()
    free = solved(loco.scale_by_locoprop(solver=newton), params, layer)
    solver = loco.solvers.limited(newton, share)
    found = solved(loco.scale_by_locoprop(solver=solver), params, layer)
    ratio = optax.tree.norm(found) / optax.tree.norm(free)
    for name, u in free.items():
        np.testing.assert_allclose(found[name], ratio * u, rtol=1e-4)
    if share < 1:
        relative = optax.tree.norm(found) / optax.tree.norm(params)
        np.testing.assert_allclose(relative, share, rtol=1e-4)
    else:
        np.testing.assert_allclose(ratio, 1.0, rtol=1e-6)


def test_limited_leaves_a_layer_of_zeros_free():
    params, layer = random_layer(0, 6, 4, 3)
    params = jax.tree.map(jnp.zeros_like, params)
    solver = loco.solvers.limited(loco.solvers.majorized_newton(), 0.1)
    found = solved(loco.scale_by_locoprop(solver=solver), params, layer)
    assert float(optax.tree.norm(found)) > 0
    with pytest.raises(ValueError, match="max_relative_step must be positive"):
        loco.solvers.limited(solver, 0.0)
