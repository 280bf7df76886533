from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import locoprop_optax as loco
from tests.helpers import (
    layers_for,
    problem_of,
    random_layer,
    regression,
    train_step,
)


def updated(make, params, layer):
    tree = {"layer": params}
    tx = make(layers_for(tree))
    intermediates = loco.Intermediates({"layer/kernel": layer})
    grads = {"layer": dict(layer.gradient)}
    return tx.update(grads, tx.init(tree), tree, intermediates=intermediates)


@pytest.mark.usefixtures("float64")
def test_numbers_of_one_layer():
    params, layer = random_layer(0, 6, 4, 3, "tanh")
    make = partial(
        loco.scale_by_locoprop,
        target=loco.targets.gradient_descent(0.1),
        diagnostics=True,
    )
    updates, state = updated(make, params, layer)
    problem = problem_of(params, layer, gamma=0.1)
    step = jax.tree.map(jnp.negative, updates["layer"])
    found = loco.diagnostics_of(state)["layer/kernel"]
    np.testing.assert_allclose(
        found.objective_before, problem.value(problem.no_step()), rtol=1e-5
    )
    np.testing.assert_allclose(found.objective_after, problem.value(step), rtol=1e-5)
    relative = optax.tree.norm(step) / optax.tree.norm(params)
    np.testing.assert_allclose(found.relative_update, relative, rtol=1e-5)
    flat = np.mean(1 - np.tanh(layer.preactivations) ** 2 < 0.01)
    np.testing.assert_allclose(found.saturated, flat, rtol=1e-5)
    assert flat > 0


@pytest.mark.parametrize(
    "make", [loco.locoprop, partial(loco.locoprop_m, learning_rate=1e-3)]
)
def test_off_by_default_and_without_effect_on_updates(make):
    loss_fn, params, batch = regression()
    layers, results = loco.layers(loss_fn)(params, batch), []
    for diagnostics in (False, True):
        tx = make(layers, diagnostics=diagnostics)
        # Not jitted: XLA rounds two programs apart.
        step, state = train_step(loss_fn, layers, tx), tx.init(params)
        structure = jax.tree.structure(state)
        after, state, _ = step(params, state, batch)
        assert jax.tree.structure(state) == structure
        results.append(after)
    jax.tree.map(np.testing.assert_array_equal, *results)
    found = loco.diagnostics_of(state)
    assert set(found) == {"first/kernel", "second/kernel"}
    assert all(d.objective_after < d.objective_before for d in found.values())
    with pytest.raises(ValueError, match=r"holds no diagnostics.*diagnostics=True"):
        loco.diagnostics_of(make(layers).init(params))


def test_in_the_state_of_an_nnx_optimizer():
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.tanh)

    def loss_fn(model, x):
        return jnp.mean((model(x) - 0.5) ** 2)

    layers = loco.nnx.layers(loss_fn)(model, jnp.eye(3))
    tx = loco.scale_by_locoprop(layers, diagnostics=True)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    capture = loco.nnx.value_and_grad(loss_fn, layers)
    _, grads, intermediates = capture(model, jnp.eye(3))
    optimizer.update(model, grads, intermediates=intermediates)
    found = loco.diagnostics_of(optimizer.opt_state)
    assert list(found) == ["layers/0/kernel"]
    (layer,) = found.values()
    assert layer.objective_after < layer.objective_before


def test_stacks_give_means_and_softmax_counts_rows():
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            def block(layer, x, _):
                return nn.sigmoid(layer(x)), None

            scan = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
            )
            x, _ = scan(nn.Dense(4, name="stack"), x, None)
            return 50 * nn.Dense(2, name="head")(x)

    model, x = Stack(), jnp.ones((5, 4))
    labels = jnp.zeros(5, int)

    def loss_fn(params, x):
        logits = model.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    params = model.init(jax.random.key(0), x)["params"]
    layers = loco.layers(loss_fn, transfers={"head/kernel": "softmax"})(params, x)
    _, grads, intermediates = loco.value_and_grad(loss_fn, layers)(params, x)
    tx = loco.scale_by_locoprop(layers, diagnostics=True)
    _, state = tx.update(grads, tx.init(params), params, intermediates=intermediates)
    found = loco.diagnostics_of(state)
    assert all(number.shape == () for d in found.values() for number in d)
    logits = intermediates.layers["head/kernel"].preactivations
    expected = np.mean(np.max(jax.nn.softmax(logits), -1) > 0.99)
    np.testing.assert_allclose(found["head/kernel"].saturated, expected)


def test_a_loss_without_a_value_shows_nan():
    params, layer = random_layer(0, 6, 4, 3)
    make = partial(
        loco.scale_by_locoprop,
        loss=loco.losses.matching_loss(jnp.sin),
        solver=loco.solvers.first_order(optax.sgd(0.01), 2),
        diagnostics=True,
    )
    _, state = updated(make, params, layer)
    found = loco.diagnostics_of(state)["layer/kernel"]
    assert np.isnan(found.objective_before)
    assert found.relative_update > 0
