"""The mathematics of LocoProp, proved in float64 (identities 1 to 5 of the docs)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import locoprop_optax as loco
from tests.helpers import problem_of, random_layer, random_layers, solved

pytestmark = pytest.mark.usefixtures("float64")

LOSSES = {"S": loco.losses.squared_loss(), "M": loco.losses.matching_loss()}
losses = st.sampled_from(["S", "M"])
strengths = st.floats(0.05, 5.0)


def augmented(params, layer):
    """The inputs with a column of ones if there is a bias."""
    x = np.asarray(layer.inputs)
    return np.c_[x, np.ones(len(x))] if "bias" in params else x


def as_matrix(step):
    rows = [np.asarray(step["kernel"])]
    return np.vstack([*rows, step["bias"]] if "bias" in step else rows)


@given(random_layers, losses, strengths)
def test_first_gradient_is_gamma_times_backprop(drawn, loss, gamma):
    params, layer = random_layer(**drawn)
    problem = problem_of(params, layer, gamma=gamma, loss=LOSSES[loss])
    expected = {name: gamma * g for name, g in layer.gradient.items()}
    known = problem.gradient_at_start()
    computed = problem.gradient(problem.no_step())
    of_the_value = jax.grad(problem.value)(problem.no_step())
    for name, gradient in expected.items():
        for found in (known, computed, of_the_value):
            np.testing.assert_allclose(found[name], gradient, rtol=1e-9, atol=1e-9)


@given(random_layers, losses, strengths)
def test_one_local_step_is_backprop(drawn, loss, gamma):
    params, layer = random_layer(**drawn)
    make = partial(
        loco.scale_by_locoprop,
        loss=LOSSES[loss],
        target=loco.targets.gradient_descent(gamma),
        solver=loco.solvers.first_order(optax.sgd(0.3), num_steps=1),
    )
    for name, update in solved(make, params, layer).items():
        expected = 0.3 * gamma * layer.gradient[name]
        np.testing.assert_allclose(update, expected, rtol=1e-12, atol=1e-14)


@given(random_layers, strengths, strengths)
def test_exact_squared_loss_is_the_natural_gradient_of_the_inputs(drawn, gamma, lam):
    params, layer = random_layer(**drawn)
    make = partial(
        loco.scale_by_locoprop,
        loss=loco.losses.squared_loss(),
        target=loco.targets.gradient_descent(gamma),
        regularizer=loco.regularizers.squared_l2(lam),
        solver=loco.solvers.majorized_newton(num_steps=1, damping=0.0),
    )
    x, g = augmented(params, layer), np.asarray(layer.cotangents)
    expected = gamma * np.linalg.solve(x.T @ x + lam * np.eye(x.shape[1]), x.T @ g)
    found = as_matrix(solved(make, params, layer))
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9)


@given(random_layers, strengths, st.integers(1, 12))
def test_gradient_steps_on_the_squared_loss(drawn, gamma, num_steps):
    params, layer = random_layer(**drawn)
    x, g = augmented(params, layer), np.asarray(layer.cotangents)
    eta = 0.5 / np.linalg.norm(x, 2) ** 2
    make = partial(
        loco.scale_by_locoprop,
        loss=loco.losses.squared_loss(),
        target=loco.targets.gradient_descent(gamma),
        solver=loco.solvers.first_order(optax.sgd(eta), num_steps, decay_floor=1.0),
    )
    gram = x.T @ x
    remaining = np.linalg.matrix_power(np.eye(len(gram)) - eta * gram, num_steps)
    pseudo_inverse = np.linalg.pinv(gram, rcond=1e-12, hermitian=True)
    expected = gamma * (np.eye(len(gram)) - remaining) @ pseudo_inverse @ x.T @ g
    found = as_matrix(solved(make, params, layer))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)


@given(random_layers, st.floats(0.01, 0.3), st.floats(0.5, 5.0))
def test_exact_matching_loss_is_stationary(drawn, gamma, lam):
    params, layer = random_layer(**drawn)
    make = partial(
        loco.scale_by_locoprop,
        target=loco.targets.gradient_descent(gamma),
        regularizer=loco.regularizers.squared_l2(lam),
        solver=loco.solvers.majorized_newton(num_steps=3000, damping=0.0),
    )
    step = -as_matrix(solved(make, params, layer))
    x, g = augmented(params, layer), np.asarray(layer.cotangents)
    f = layer.transfer.function
    target = f(layer.preactivations) - gamma * g
    residual = np.asarray(f(layer.preactivations + x @ step) - target)
    np.testing.assert_allclose(x.T @ residual + lam * step, 0, atol=1e-7)


@given(random_layers, losses, strengths, st.floats(0, 1))
def test_local_problems_are_convex(drawn, loss, gamma, share):
    params, layer = random_layer(**drawn)
    problem = problem_of(params, layer, gamma=gamma, loss=LOSSES[loss])
    rng = np.random.default_rng(drawn["seed"])
    start, end = (
        {name: jnp.asarray(rng.normal(size=p.shape)) for name, p in params.items()}
        for _ in range(2)
    )
    between = {n: (1 - share) * start[n] + share * end[n] for n in params}
    chord = (1 - share) * problem.value(start) + share * problem.value(end)
    assert problem.value(between) <= chord + 1e-9 * (1 + abs(chord))


@given(random_layers, losses, st.floats(0.05, 50.0), st.floats(0.0, 0.5), strengths)
def test_majorized_newton_never_raises_the_objective(drawn, loss, gamma, damping, lam):
    params, layer = random_layer(**drawn)
    options = {
        "loss": LOSSES[loss],
        "regularizer": loco.regularizers.squared_l2(lam),
    }
    problem = problem_of(params, layer, gamma=gamma, **options)
    values = [problem.value(problem.no_step())]
    for num_steps in (1, 2, 5):
        make = partial(
            loco.scale_by_locoprop,
            target=loco.targets.gradient_descent(gamma),
            solver=loco.solvers.majorized_newton(num_steps, damping),
            **options,
        )
        update = solved(make, params, layer)
        values.append(problem.value({name: -u for name, u in update.items()}))
    assert all(np.diff(values) <= 1e-9 * (1 + np.abs(values[0])))
