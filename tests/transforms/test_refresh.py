"""What is known of the curvature is made anew at its turns, and only then."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import locoprop_optax as loco
from locoprop_optax._utils.every import is_due
from tests.helpers import regression, train_step

KERNEL = {"kernel": jnp.full((3, 2), 0.1)}


def squared_error(params, batch):
    x, y = batch
    return jnp.sum((x @ params["kernel"] - y) ** 2) / len(x)


def batches(count, rows=6):
    keys = jax.random.split(jax.random.key(0), count)
    return [
        (
            jax.random.normal(key, (rows, 3)),
            jax.random.normal(jax.random.fold_in(key, 1), (rows, 2)),
        )
        for key in keys
    ]


@pytest.mark.usefixtures("float64")
def test_the_inverse_is_that_of_the_last_refresh():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), KERNEL)
    seen = batches(20)
    layers = loco.layers(squared_error)(params, seen[0])
    tx = loco.scale_by_locoprop(
        layers,
        loss=loco.losses.squared_loss(),
        target=loco.targets.gradient_descent(1.0),
        solver=loco.solvers.exact(damping=0.0),
        refresh_every=4,
    )
    capture = loco.value_and_grad(squared_error, layers)
    state, inverse = tx.init(params), None
    for count, batch in enumerate(seen):
        _, grads, intermediates = capture(params, batch)
        updates, state = tx.update(grads, state, params, intermediates=intermediates)
        if is_due(4, jnp.asarray(count)):
            inverse = np.linalg.inv(batch[0].T @ batch[0])
        expected = inverse @ grads["kernel"]
        np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-9)
    assert not is_due(4, jnp.asarray(len(seen) - 1)), "an old inverse was seen"


def counting(part, calls):
    """A target or a solver whose refreshes are counted."""

    def refresh(*args):
        jax.debug.callback(lambda: calls.append(None))
        return part.refresh(*args)

    return part._replace(refresh=refresh)


def test_nothing_of_a_refresh_runs_between_two():
    loss_fn, params, batch = regression()
    layers, calls = loco.layers(loss_fn)(params, batch), []
    tx = loco.locoprop(
        layers,
        solver=counting(loco.solvers.majorized_newton(1, 0.3, ema=0.8), calls),
        refresh_every=4,
    )
    step = jax.jit(train_step(loss_fn, layers, tx))
    state = tx.init(params)
    for _ in range(40):
        params, state, _ = step(params, state, batch)
    jax.block_until_ready(params)
    jax.effects_barrier()
    assert len(calls) == sum(bool(is_due(4, jnp.asarray(c))) for c in range(40)) == 26


def test_a_batch_that_is_skipped_leaves_the_averages_as_they_are():
    loss_fn, params, batch = regression()
    layers = loco.layers(loss_fn)(params, batch)
    tx = loco.locoprop(layers)
    step = jax.jit(train_step(loss_fn, layers, tx))
    params, state, _ = step(params, tx.init(params), batch)
    spoiled = jax.tree.map(lambda leaf: leaf.at[0, 0].set(jnp.nan), batch)
    same, kept, _ = step(params, state, spoiled)
    chex.assert_trees_all_equal(same, params)
    assert optax.tree.get(kept, "skipped_steps") == 1
    chex.assert_trees_all_equal(kept.inner_state, state.inner_state)


def test_each_step_is_a_turn_by_default():
    loss_fn, params, batch = regression()
    layers, calls = loco.layers(loss_fn)(params, batch), []
    solver = counting(loco.solvers.majorized_newton(), calls)
    tx = loco.scale_by_locoprop(layers, solver=solver)
    step, state = jax.jit(train_step(loss_fn, layers, tx)), tx.init(params)
    for _ in range(20):
        _, state, _ = step(params, state, batch)
    jax.effects_barrier()
    assert len(calls) == 20


def test_refresh_every_counts_steps():
    loss_fn, params, batch = regression()
    layers = loco.layers(loss_fn)(params, batch)
    with pytest.raises(ValueError, match="refresh_every"):
        loco.scale_by_locoprop(layers, refresh_every=0)
