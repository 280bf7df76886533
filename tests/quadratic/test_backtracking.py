"""How much of a step is taken."""

from functools import cache, partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import locoprop_optax as loco
from locoprop_optax._quadratic.backtracking import (
    LEAST,
    ROUNDING,
    backtrack,
    first_share,
    in_doubt,
)
from tests.helpers import regression, train_step


def chosen(change, *, share=1.0, looks=True, halves=True, value=0.0):
    share, change = backtrack(
        change,
        jnp.asarray(share),
        jnp.asarray(value),
        looks=jnp.asarray(looks),
        halves=halves,
    )
    return float(share), float(change)


@given(st.floats(0.1, 1.0), st.floats(0.0, 50.0))
def test_it_is_halved_until_the_loss_does_not_rise(first, bend):
    """The loss changes by -a + bend a²."""
    share, change = chosen(lambda a: -a + bend * a**2, share=first)
    first, bend = np.float32(first), np.float32(bend)
    expected = first
    while -expected + bend * expected**2 > 0 and expected > LEAST:
        expected = max(expected / 2, np.float32(LEAST))
    np.testing.assert_allclose(share, expected)
    np.testing.assert_allclose(change, -share + bend * share**2, rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_not_finite_counts_as_a_rise():
    share, change = chosen(lambda a: jnp.where(a > 0.2, jnp.nan, -a))
    assert (share, change) == (0.125, -0.125)


def test_a_rise_that_rounding_can_cause_is_let_pass():
    for rise, whole in ((0.5, True), (2.0, False)):
        share, _ = chosen(lambda a, rise=rise: rise * ROUNDING * a, value=1.0)
        assert (share == 1.0) == whole


def test_halving_ends():
    share, change = chosen(lambda a: 1.0 + 0 * a)
    assert (share, change) == (LEAST, 1.0)


def test_without_halving_the_change_alone_is_computed():
    assert chosen(lambda a: 3 * a, share=0.5, halves=False) == (0.5, 1.5)


@pytest.mark.parametrize("looks", [True, False])
def test_without_looking_nothing_is_computed(looks):
    seen = []

    def change(share):
        jax.debug.callback(lambda share: seen.append(float(share)), share)
        return 3 * share

    chosen(change, looks=looks, halves=False)
    jax.effects_barrier()
    assert seen == ([1.0] if looks else [])


def test_the_share_grows_to_the_whole():
    shares = [jnp.asarray(0.3)]
    for _ in range(4):
        shares.append(first_share(shares[-1]))
    np.testing.assert_allclose(shares, [0.3, 0.45, 0.675, 1.0, 1.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("share", "value", "slope", "expected"),
    [
        (0.9, 1.0, -0.5, True),
        (1.0, 2.1, -0.5, True),
        (1.0, 1.0, -1.1, True),
        (1.0, 1e-9, -1e-8, True),
        (1.0, 1.9, -1.8, False),
        (1.0, 0.0, 0.0, False),
    ],
    ids=["short", "risen", "more than all", "of almost none", "none", "no loss"],
)
def test_when_a_step_is_in_doubt(share, value, slope, expected):
    last = jnp.asarray(1.0)
    assert in_doubt(*map(jnp.asarray, (share, value)), last, slope) == expected


class DeepAutoencoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (64, 64, 32, 32, 8, 32, 32, 64, 64):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(64)(x)


def autoencoder_loss(params, x):
    logits = DeepAutoencoder().apply(params, x)
    return jnp.mean(jnp.sum(optax.sigmoid_binary_cross_entropy(logits, x), axis=-1))


def deep_autoencoder(seed):
    """Parameters and a batch of waves with four directions."""
    keys = jax.random.split(jax.random.key(seed))
    codes = jax.random.normal(keys[0], (128, 4))
    x = jax.nn.sigmoid(3 * jnp.sin(codes @ jax.random.normal(keys[1], (4, 64))))
    return DeepAutoencoder().init(jax.random.key(seed + 1), x), x


@cache
def autoencoder_step():
    layers = loco.layers(autoencoder_loss)(*deep_autoencoder(0))
    tx = loco.locoprop(layers)
    return tx, jax.jit(train_step(autoencoder_loss, layers, tx))


@pytest.mark.parametrize("seed", [0, 2])
def test_locoprop_does_not_diverge_where_its_model_does_not_hold(seed):
    """Whole steps lead to a loss of millions, then to none that is finite."""
    params, x = deep_autoencoder(seed)
    tx, step = autoencoder_step()
    state, losses, shares = tx.init(params), [], []
    for _ in range(20):
        params, state, loss = step(params, state, x)
        losses.append(float(loss))
        shares.append(float(optax.tree.get(state, "share")))
    assert max(losses) < 1.02 * losses[0]
    assert losses[-1] < 0.8 * losses[0]
    assert shares[-1] == 1


def test_a_linear_model_is_solved_in_whole_steps():
    """Each goes half of the way, since the model promises all of the loss."""
    x = jax.random.normal(jax.random.key(0), (32, 4))
    y = x @ jnp.ones((4, 2))
    model = nn.Dense(2, kernel_init=nn.initializers.zeros)
    params = model.init(jax.random.key(1), x)

    def loss_fn(params, batch):
        return jnp.mean((model.apply(params, batch[0]) - batch[1]) ** 2)

    layers = loco.layers(loss_fn)(params, (x, y))
    tx = loco.locoprop(layers, trust_region=loco.TrustRegion(max_relative_step=10.0))
    step, state = jax.jit(train_step(loss_fn, layers, tx)), tx.init(params)
    losses = [loss_fn(params, (x, y))]
    for _ in range(12):
        params, state, _ = step(params, state, (x, y))
        assert optax.tree.get(state, "share") == 1
        losses.append(loss_fn(params, (x, y)))
    assert losses[-1] < 1e-3 * losses[0]


def test_a_batch_that_is_not_finite_leaves_the_share():
    loss_fn, params, (x, y) = regression()
    tx = loco.scale_by_quadratic_model(damping=0.0, damping_decay=1.0)
    state = optax.tree.set(tx.init(params), share=jnp.asarray(0.3))
    layers = loco.layers(loss_fn)(params, (x, y))
    step = jax.jit(train_step(loss_fn, layers, tx))
    moved, state, _ = step(params, state, (x.at[0, 0].set(jnp.nan), y))
    chex.assert_trees_all_equal(moved, params)
    assert state.skipped_steps == 1
    np.testing.assert_allclose(state.inner_state.share, 0.3)


def test_damping_grows_after_a_step_that_was_shortened():
    """Though the loss falls after what is left of it; all is in the intermediates."""
    params, x = deep_autoencoder(0)
    layers = loco.layers(autoencoder_loss)(params, x)
    tx = optax.chain(
        loco.scale_by_locoprop(
            layers,
            target=loco.targets.natural_gradient(1.0, damping=0.5),
            solver=loco.solvers.majorized_newton(1, damping=0.3),
        ),
        loco.scale_by_quadratic_model(
            damping=0.01,
            damping_decay=0.5,
            adapt_every=1,
            trust_region=loco.TrustRegion(max_relative_step=10.0),
        ),
    )
    step = jax.jit(train_step(autoencoder_loss, layers, tx))
    state = tx.init(params)
    seen = []
    for _ in range(2):
        params, state, _ = step(params, state, x)
        seen.append(state[-1].inner_state)
    whole, half = seen
    assert (whole.share, half.share) == (1.0, 0.5)
    assert half.ratio > 0.25
    np.testing.assert_allclose([whole.damping, half.damping], [0.005, 0.01])


def test_a_rate_of_zero_and_an_ensemble_keep_whole_steps():
    loss_fn, params, batch = regression()
    layers = loco.layers(loss_fn)(params, batch)
    tx = loco.locoprop(layers, lambda count: jnp.where(count < 3, 0.1, 0.0))
    step = jax.jit(jax.vmap(train_step(loss_fn, layers, tx), (0, 0, None)))
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params)
    state = jax.vmap(tx.init)(both)
    for _ in range(7):
        before = both
        both, state, loss = step(both, state, batch)
        np.testing.assert_allclose(loss[0], loss[1], rtol=1e-5)
    chex.assert_trees_all_equal(before, both)
    np.testing.assert_array_equal(optax.tree.get(state, "share"), [1.0, 1.0])


def test_noise_of_bfloat16_does_not_stop_training():
    """What seems a rise at convergence is rounding, and other targets come."""
    layer = partial(nn.Dense, dtype=jnp.bfloat16)
    model = nn.Sequential([layer(8), nn.tanh, layer(2)])
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (32, 4))
    first, second = (jax.random.normal(key, (32, 2)) for key in keys[1:3])
    params = model.init(keys[3], x)

    def loss_fn(params, batch):
        outputs = model.apply(params, batch[0]).astype(jnp.float32)
        return jnp.mean((outputs - batch[1]) ** 2)

    layers = loco.layers(loss_fn)(params, (x, first))
    tx = loco.locoprop(layers)
    step, state = jax.jit(train_step(loss_fn, layers, tx)), tx.init(params)
    for _ in range(60):
        params, state, _ = step(params, state, (x, first))
    start = loss_fn(params, (x, second))
    for _ in range(25):
        params, state, loss = step(params, state, (x, second))
    assert loss < 0.5 * start
