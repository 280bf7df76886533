"""The user's Python runs once a trace, and what it calls back once a step."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import locoprop_optax as loco
from tests.helpers import counted, local_steps, regression
from tests.trace.checks import assert_close

X = jax.random.normal(jax.random.key(0), (4, 6))


def watched():
    """A loss, what its Python did, and what it called back."""
    loss_fn, params, batch = regression()
    runs, called = [], []

    def watched_loss(params, batch):
        runs.append(None)
        jax.debug.callback(lambda _: called.append(None), batch[0].sum())
        return loss_fn(params, batch)

    return watched_loss, params, batch, runs, called


def test_python_runs_once_a_trace_and_callbacks_once_a_step():
    loss_fn, params, batch, runs, called = watched()
    layers = loco.layers(loss_fn)(params, batch)
    assert (len(runs), len(called)) == (1, 0)
    tx = local_steps(layers)

    @jax.jit
    def step(params, state):
        _, grads, found = loco.value_and_grad(loss_fn, layers)(params, batch)
        updates, state = tx.update(grads, state, params, intermediates=found)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
    jax.block_until_ready(params)
    jax.effects_barrier()
    assert (len(runs), len(called)) == (2, 3)


def test_python_runs_once_without_jit():
    loss_fn, params, batch, runs, called = watched()
    layers = loco.layers(loss_fn)(params, batch)
    loco.value_and_grad(loss_fn, layers)(params, batch)
    jax.effects_barrier()
    assert (len(runs), len(called)) == (2, 1)


def test_capture_and_update_that_are_jitted_apart_are_traced_once():
    loss_fn, params, batch = regression()
    layers = loco.layers(loss_fn)(params, batch)
    tx = loco.locoprop(layers)
    capture, captures = counted(loco.value_and_grad(loss_fn, layers))

    def update(grads, state, params, intermediates):
        return tx.update(grads, state, params, intermediates=intermediates)

    update, updates = counted(update)
    state = tx.init(params)
    losses = []
    for _ in range(4):
        loss, grads, intermediates = capture(params, batch)
        step, state = update(grads, state, params, intermediates)
        params = optax.apply_updates(params, step)
        losses.append(float(loss))
    assert (len(captures), len(updates)) == (1, 1)
    assert losses == sorted(losses, reverse=True)


def test_threads_capture_nnx_models_at_once():
    def loss_fn(model, x):
        return jnp.mean(jnp.tanh(model(x)) ** 2)

    models = [nnx.Linear(6, size, rngs=nnx.Rngs(size)) for size in (2, 3, 4, 5)] * 2

    def captured(model):
        layers = loco.nnx.layers(loss_fn)(model, X)
        return loco.nnx.value_and_grad(loss_fn, layers)(model, X)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(captured, models))
    for model, (loss, grads, intermediates) in zip(models, found, strict=True):
        expected, gradient = nnx.value_and_grad(loss_fn)(model, X)
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
        assert_close(nnx.as_pure(grads), nnx.as_pure(gradient))
        (layer,) = intermediates.layers.values()
        np.testing.assert_allclose(layer.inputs, X)


def test_capture_inside_pmap():
    loss_fn, params, (x, y) = regression()
    layers = loco.layers(loss_fn)(params, (x, y))
    halves = jax.tree.map(lambda leaf: leaf.reshape(2, -1, *leaf.shape[1:]), (x, y))

    def capture(params, batch):
        loss, grads, intermediates = loco.value_and_grad(loss_fn, layers)(params, batch)
        return jax.lax.pmean((loss, grads), "data"), intermediates.layers

    copies = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), params)
    (loss, grads), records = jax.pmap(capture, "data")(copies, halves)
    expected, gradient = jax.value_and_grad(loss_fn)(params, (x, y))
    np.testing.assert_allclose(loss[0], expected, rtol=1e-6)
    assert_close(jax.tree.map(lambda g: g[0], grads), gradient)
    assert records["first/kernel"].inputs.shape == (2, 4, 4)


def test_operations_are_those_of_the_gradient():
    """The Gauss-Newton model and sampled cotangents cost nothing where unused."""
    loss_fn, params, batch = regression(batch=64)
    layers = loco.layers(loss_fn)(params, batch)
    capture = loco.value_and_grad(loss_fn, layers)

    def operations(function):
        compiled = jax.jit(function).lower(params, batch).compile()
        return compiled.cost_analysis()["flops"]

    plain = operations(jax.value_and_grad(loss_fn))
    assert operations(lambda p, b: capture(p, b)[:2]) <= 1.01 * plain
