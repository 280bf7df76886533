from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import locoprop_optax as loco
from tests.helpers import layers_for, local_steps, regression, train_step, update_of


class Normed(nn.Module):
    """A model with a norm."""

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(name="norm")(nn.Dense(5, name="first")(x))
        return nn.Dense(3, name="second")(nn.relu(x))


@pytest.mark.parametrize(
    "make",
    [
        loco.locoprop,
        partial(loco.locoprop_m, learning_rate=1e-3),
        partial(loco.locoprop_s, learning_rate=1e-3),
    ],
)
def test_training_lowers_the_loss(make):
    loss_fn, params, batch = regression(Normed(), batch=32)
    layers = loco.layers(loss_fn)(params, batch)
    tx = make(layers)
    step, state = jax.jit(train_step(loss_fn, layers, tx)), tx.init(params)
    before = loss_fn(params, batch)
    for _ in range(50):
        params, state, loss = step(params, state, batch)
    assert loss < 0.7 * before


def test_other_parameters_go_to_the_fallback():
    loss_fn, params, batch = regression(Normed())
    grads = jax.grad(loss_fn)(params, batch)
    make = partial(loco.locoprop, fallback=optax.sgd(0.5))
    updates = update_of(make, loss_fn, params, batch, exclude="norm/*")
    chex.assert_trees_all_close(
        updates["norm"], jax.tree.map(lambda g: -0.5 * g, grads["norm"]), rtol=1e-5
    )
    updates = update_of(make, loss_fn, params, batch, exclude="first/*")
    chex.assert_trees_all_close(
        updates["first"], jax.tree.map(lambda g: -0.5 * g, grads["first"]), rtol=1e-5
    )


def test_a_model_of_tables_alone_is_the_fallbacks():
    params, rows = {"table": jnp.ones((5, 3))}, jnp.array([0, 1, 2])

    def loss_fn(params, rows):
        return jnp.mean((params["table"][rows] - 2.0) ** 2)

    layers = loco.layers(loss_fn)(params, rows)
    tx = loco.locoprop(layers, fallback=optax.sgd(0.5))
    _, grads, intermediates = loco.value_and_grad(loss_fn, layers)(params, rows)
    updates, _ = tx.update(grads, tx.init(params), params, intermediates=intermediates)
    np.testing.assert_allclose(updates["table"], -0.5 * grads["table"])


def test_fallback_of_the_reference_is_its_one_local_step():
    loss_fn, params, batch = regression(Normed())
    grads = jax.grad(loss_fn)(params, batch)
    make = partial(loco.locoprop_m, learning_rate=1e-2, num_local_steps=1)
    one_step = update_of(make, loss_fn, params, batch)
    optimizer = optax.rmsprop(
        1e-2, decay=0.9, eps=1e-5, initial_scale=1.0, momentum=0.999
    )
    scaled = jax.tree.map(lambda g: 10.0 * g, grads)
    expected, _ = optimizer.update(scaled, optimizer.init(params))
    chex.assert_trees_all_close(one_step, expected, rtol=1e-3, atol=1e-7)


def test_injected_hyperparameters_equal_plain_ones():
    loss_fn, params, batch = regression()

    layers = loco.layers(loss_fn)(params, batch)

    def make(learning_rate, gamma, damping):
        return local_steps(
            layers,
            learning_rate,
            target=loco.targets.normalized(gamma),
            solver=loco.solvers.majorized_newton(damping=damping),
        )

    injected = optax.inject_hyperparams(make)(0.2, 0.1, 0.3)
    chex.assert_trees_all_close(
        update_of(lambda _: injected, loss_fn, params, batch),
        update_of(lambda _: make(0.2, 0.1, 0.3), loss_fn, params, batch),
        rtol=1e-6,
    )
    state = injected.init(params)
    assert set(state.hyperparams) == {"learning_rate", "gamma", "damping"}


def test_injecting_a_count_says_what_to_do():
    loss_fn, params, batch = regression()
    layers = loco.layers(loss_fn)(params, batch)
    injected = optax.inject_hyperparams(loco.locoprop_m)(layers, 1e-3)
    with pytest.raises(TypeError, match=r"number of local steps.*`static_args`"):
        injected.init(params)
    static = optax.inject_hyperparams(
        loco.locoprop_m, static_args=("num_local_steps", "decay_floor")
    )(layers, 1e-3)
    plain = loco.locoprop_m(layers, 1e-3)
    chex.assert_trees_all_close(
        update_of(lambda _: static, loss_fn, params, batch),
        update_of(lambda _: plain, loss_fn, params, batch),
        rtol=1e-5,
    )


def test_state_maps_like_any_optax_state():
    loss_fn, params, batch = regression()
    layers = loco.layers(loss_fn)(params, batch)
    for tx in (loco.locoprop(layers), loco.locoprop_m(layers, 1e-3)):
        state = tx.init(params)
        with pytest.raises(TypeError, match=r"let jax.jit\(tx.init\) shard it"):
            optax.tree.map_params(tx, lambda leaf: leaf + 1, state)


@pytest.mark.parametrize("make", [loco.locoprop_m, loco.locoprop_s])
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"activation_learning_rate": 0.0}, "γ.* must be positive, got 0.0"),
        ({"num_local_steps": 0}, "local steps.* at least 1, got 0"),
    ],
)
def test_reference_errors(make, options, match):
    layers = layers_for({"a": {"kernel": jnp.ones((4, 3))}})
    with pytest.raises(ValueError, match=match):
        make(layers, 1e-5, **options)


def test_bfloat16_parameters_keep_small_steps():
    params = {"a": {"kernel": jnp.full((4, 3), 100.0, jnp.bfloat16)}}
    x = jnp.eye(4, dtype=jnp.bfloat16)
    layer = loco.LayerIntermediates(
        x,
        x @ params["a"]["kernel"],
        jnp.full((4, 3), 1e-3, jnp.bfloat16),
        {"kernel": jnp.full((4, 3), 1e-3, jnp.bfloat16)},
    )
    tx = loco.scale_by_locoprop(
        layers_for(params),
        target=loco.targets.gradient_descent(1.0),
        solver=loco.solvers.first_order(optax.sgd(0.1), 5, decay_floor=1.0),
    )
    intermediates = loco.Intermediates({"a/kernel": layer})
    updates, _ = tx.update(params, tx.init(params), params, intermediates=intermediates)
    expected = 1e-3 * (1 - 0.9**5)
    np.testing.assert_allclose(updates["a"]["kernel"], expected, rtol=1e-2)
