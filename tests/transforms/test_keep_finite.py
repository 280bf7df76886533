"""Faults in the data leave the weights finite, and are counted."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import locoprop_optax as loco
from tests.helpers import MLP, regression, train_step

OPTIMIZERS = {
    "locoprop": loco.locoprop,
    "locoprop_m": functools.partial(loco.locoprop_m, learning_rate=1e-4),
    "locoprop_s": functools.partial(loco.locoprop_s, learning_rate=1e-4),
}


class Normed(nn.Module):
    """Layers with a norm between them."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.LayerNorm()(nn.Dense(6)(x)))
        return nn.Dense(3)(x)


@functools.cache
def stepper(name, rows=8, model=None):
    loss_fn, params, batch = regression(model or Normed(), batch=rows)
    layers = loco.layers(loss_fn)(params, batch)
    tx = OPTIMIZERS[name](layers)
    step = jax.jit(train_step(loss_fn, layers, tx))
    return step, params, tx.init(params), batch


def skipped(state):
    return int(optax.tree.get(state, "skipped_steps"))


def assert_finite(tree):
    for leaf in jax.tree.leaves(tree):
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", ["inputs", "targets"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_bad_number_in_a_batch_skips_the_step(name, part, bad):
    step, params, state, (x, y) = stepper(name)
    params, state, _ = step(params, state, (x, y))
    hole = jnp.zeros((8, 3)).at[1, 2].set(bad)
    broken = (x.at[:, :3].add(hole), y) if part == "inputs" else (x, y + hole)
    kept, after, _ = step(params, state, broken)
    chex.assert_trees_all_equal(kept, params)
    chex.assert_trees_all_equal(after.inner_state, state.inner_state)
    assert skipped(after) == skipped(state) + 1
    moved, resumed, _ = step(kept, after, (x, y))
    expected, _, _ = step(params, state, (x, y))
    chex.assert_trees_all_equal(moved, expected)
    assert skipped(resumed) == 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_bad_number_that_the_loss_does_not_see_skips_the_step(name):
    """A masked example: the loss is finite, the gradient of the layers is not."""
    model = MLP()
    x = jax.random.normal(jax.random.key(0), (8, 4))
    params = model.init(jax.random.key(1), x)["params"]

    def loss_fn(params, batch):
        outputs = model.apply({"params": params}, batch[0])
        outputs = jnp.where(batch[1], outputs, 0.0)
        return jnp.mean(jnp.sum((outputs - 1.0) ** 2, axis=-1))

    everything = jnp.ones((8, 1), bool)
    layers = loco.layers(loss_fn)(params, (x, everything))
    tx = OPTIMIZERS[name](layers)
    step = jax.jit(train_step(loss_fn, layers, tx))
    params, state, _ = step(params, tx.init(params), (x, everything))
    hidden = (x.at[3, 1].set(jnp.inf), everything.at[3].set(False))
    kept, after, loss = step(params, state, hidden)
    assert np.isfinite(loss)
    chex.assert_trees_all_equal(kept, params)
    chex.assert_trees_all_equal(after.inner_state, state.inner_state)
    assert skipped(after) == 1


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "inputs",
    [
        lambda x: jnp.zeros_like(x),
        lambda x: jnp.ones_like(x),
        lambda x: x.at[:, 1:].set(x[:, :1]),
        lambda x: 1e8 * x,
        lambda x: 1e-8 * x,
    ],
    ids=["zeros", "constant", "rank one", "large", "small"],
)
def test_degenerate_inputs_train_on(name, inputs):
    step, params, state, (x, y) = stepper(name)
    batch, losses = (inputs(x), y), []
    for _ in range(15):
        params, state, loss = step(params, state, batch)
        losses.append(float(loss))
        assert_finite(params)
    assert skipped(state) == 0
    assert min(losses[1:]) < losses[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_batch_of_one(name):
    step, params, state, batch = stepper(name, rows=1)
    first = None
    for _ in range(5):
        params, state, loss = step(params, state, batch)
        first = loss if first is None else first
    assert_finite(params)
    assert loss < first


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_dead_units_stay_where_they_are(name):
    step, params, state, batch = stepper(name)
    norm = params["LayerNorm_0"]
    dead = {**params, "LayerNorm_0": {**norm, "bias": norm["bias"] - 100.0}}
    moved, state, _ = step(dead, state, batch)
    assert_finite(moved)
    assert skipped(state) == 0
    chex.assert_trees_all_equal(moved["Dense_0"], dead["Dense_0"])


@pytest.mark.parametrize("name", ["locoprop", "locoprop_m"])
def test_a_hundred_thousand_steps(name):
    loss_fn, params, batch = regression(MLP(hidden=2), batch=4)
    layers = loco.layers(loss_fn)(params, batch)
    tx = OPTIMIZERS[name](layers)
    capture = loco.value_and_grad(loss_fn, layers)

    def body(carry, _):
        params, state = carry
        _, grads, intermediates = capture(params, batch)
        updates, state = tx.update(grads, state, params, intermediates=intermediates)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(body, carry, length=100_000)[0])
    before = loss_fn(params, batch)
    params, state = run((params, tx.init(params)))
    assert_finite((params, state))
    assert loss_fn(params, batch) < 0.5 * before
    assert skipped(state) == 0


def test_counters_stop_at_their_end():
    step, params, state, batch = stepper("locoprop")
    last = np.iinfo(np.int32).max

    def to_the_end(leaf):
        return jnp.full_like(leaf, last) if leaf.dtype == jnp.int32 else leaf

    _, state, _ = step(params, jax.tree.map(to_the_end, state), batch)
    for leaf in jax.tree.leaves(state):
        if leaf.dtype == jnp.int32:
            assert leaf == last
    _, state, _ = step(params, state, (batch[0] * np.nan, batch[1]))
    assert skipped(state) == last


def test_a_target_outside_the_range_of_its_transfer_function():
    loss_fn, params, batch = regression(MLP())
    layers = loco.layers(loss_fn)(params, batch)
    tx = loco.keep_finite(
        optax.chain(
            loco.scale_by_locoprop(
                layers,
                target=loco.targets.gradient_descent(3.0),
                solver=loco.solvers.majorized_newton(20, 0.1),
            ),
            optax.scale(-0.1),
        )
    )
    capture, state = loco.value_and_grad(loss_fn, layers), tx.init(params)
    for _ in range(20):
        _, grads, intermediates = capture(params, batch)
        updates, state = tx.update(grads, state, params, intermediates=intermediates)
        params = optax.apply_updates(params, updates)
    assert_finite(params)
    assert skipped(state) == 0


def test_infinities_that_a_state_begins_with_are_no_fault():
    tx = loco.keep_finite(
        optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())
    )
    params = jnp.ones(2)
    state = tx.init(params)
    assert any(np.isinf(leaf).any() for leaf in jax.tree.leaves(state))
    updates, state = tx.update(jnp.ones(2), state, params, value=1.0)
    assert (updates < 0).all()
    assert skipped(state) == 0


def test_a_step_that_overflows_is_skipped():
    tx = loco.keep_finite(optax.sgd(1.0))
    params = jnp.full(2, 3e38)
    updates, state = tx.update(-params, tx.init(params), params)
    np.testing.assert_array_equal(updates, 0)
    assert skipped(state) == 1


def test_params_are_needed():
    tx = loco.keep_finite(optax.sgd(1.0))
    with pytest.raises(TypeError, match="`params`"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
