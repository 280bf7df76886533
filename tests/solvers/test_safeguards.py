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


@pytest.mark.parametrize("share", [1e-3, 1e3])
def test_limited_steps(share):
    params, layer = random_layer(0, 6, 4, 3, "tanh")
    newton = loco.solvers.majorized_newton()
    free = solved(partial(loco.scale_by_locoprop, solver=newton), params, layer)
    solver = loco.solvers.limited(newton, share)
    found = solved(partial(loco.scale_by_locoprop, solver=solver), params, layer)
    ratio = optax.tree.norm(found) / optax.tree.norm(free)
    for name, u in free.items():
        np.testing.assert_allclose(found[name], ratio * u, rtol=1e-4)
    if share < 1:
        relative = optax.tree.norm(found) / optax.tree.norm(params)
        np.testing.assert_allclose(relative, share, rtol=1e-4)
    else:
        np.testing.assert_allclose(ratio, 1.0, rtol=1e-6)


def test_limited_measures_a_layer_of_zeros_by_what_it_is_to_become():
    params, layer = random_layer(0, 6, 4, 3)
    params = jax.tree.map(jnp.zeros_like, params)
    solver = loco.solvers.limited(loco.solvers.majorized_newton(), 1e-3)
    found = solved(partial(loco.scale_by_locoprop, solver=solver), params, layer)
    np.testing.assert_allclose(optax.tree.norm(found), 1e-3 * 3**0.5, rtol=1e-5)
    with pytest.raises(ValueError, match="max_relative_step must be positive"):
        loco.solvers.limited(solver, 0.0)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("after", [False, True])
@given(drawn=random_layers, rate=st.floats(0.01, 50.0))
def test_line_searched_steps_never_raise_the_objective(after, drawn, rate):
    params, layer = random_layer(**drawn)
    loss = loco.losses.squared_loss(True) if after else loco.losses.matching_loss()
    options = {"loss": loss, "regularizer": loco.regularizers.squared_l2(0.1)}
    problem = problem_of(params, layer, gamma=0.5, **options)
    wild = loco.solvers.first_order(optax.sgd(rate), 2, decay_floor=1.0)
    searched, free = (
        partial(
            loco.scale_by_locoprop,
            target=loco.targets.gradient_descent(0.5),
            solver=solver,
            **options,
        )
        for solver in (loco.solvers.line_searched(wild, 4), wild)
    )
    step = {n: -u for n, u in solved(searched, params, layer).items()}
    whole = {n: -u for n, u in solved(free, params, layer).items()}
    values = [
        problem.value({n: length * w for n, w in whole.items()})
        for length in (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 0)
    ]
    np.testing.assert_allclose(problem.value(step), np.nanmin(values), rtol=1e-9)


def test_a_step_that_is_not_finite_becomes_none():
    params, layer = random_layer(0, 6, 4, 3)
    wild = loco.solvers.first_order(optax.sgd(100.0), 40, decay_floor=1.0)
    make = partial(
        loco.scale_by_locoprop,
        loss=loco.losses.squared_loss(),
        target=loco.targets.gradient_descent(10.0),
        solver=loco.solvers.line_searched(wild),
    )
    for update in solved(make, params, layer).values():
        np.testing.assert_array_equal(update, 0)


def test_line_search_needs_a_value():
    params, layer = random_layer(0, 6, 4, 3)
    make = partial(
        loco.scale_by_locoprop,
        loss=loco.losses.matching_loss(jnp.sin),
        solver=loco.solvers.line_searched(
            loco.solvers.first_order(optax.sgd(0.1), 2), 3
        ),
    )
    with pytest.raises(ValueError, match=r"Layer 'layer/kernel': .*'sin' has no value"):
        solved(make, params, layer)
