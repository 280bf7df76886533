"""Losses of NNX modules: their state is changed once, and as it would be."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import locoprop_optax as loco
from tests.helpers import counted

X = jax.random.normal(jax.random.key(0), (4, 6))


def test_random_counts_advance_once():
    model = nnx.Sequential(
        nnx.Linear(6, 6, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1))
    )

    def loss_fn(model, x):
        return jnp.sum(model(x) ** 2)

    layers = loco.nnx.layers(loss_fn)(model, X)
    counts = [int(model.layers[1].rngs.count[...])]
    for _ in range(3):
        loco.nnx.value_and_grad(loss_fn, layers)(model, X)
        counts.append(int(model.layers[1].rngs.count[...]))
    assert counts == [0, 1, 2, 3]


def test_has_aux_and_exclude():
    model = nnx.Sequential(
        nnx.Linear(6, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 2, rngs=nnx.Rngs(1))
    )

    def loss_fn(model, x):
        out = model(x)
        return jnp.sum(out**2), out

    layers = loco.nnx.layers(loss_fn, has_aux=True, exclude="layers/0/*")(model, X)
    capture = loco.nnx.value_and_grad(loss_fn, layers, has_aux=True)
    (loss, out), _, intermediates = capture(model, X)
    np.testing.assert_allclose(loss, jnp.sum(out**2), rtol=1e-6)
    assert set(intermediates.layers) == {"layers/1/kernel"}
    assert "excluded" in str(layers)


def test_arguments_that_hold_state():
    class Teacher(nnx.Module):
        def __init__(self):
            self.norm = nnx.BatchNorm(6, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.norm(x)

    def loss_fn(model, teacher, x, rngs):
        noise = jax.random.normal(rngs.noise(), x.shape)
        return jnp.mean((model(x + noise) - teacher(x)) ** 2)

    def ours(loss_fn):
        def run(*args):
            layers = loco.nnx.layers(loss_fn)(*args)
            return loco.nnx.value_and_grad(loss_fn, layers)(*args)

        return run

    results = []
    for value_and_grad in (nnx.value_and_grad, ours):
        model, teacher = nnx.Linear(6, 6, rngs=nnx.Rngs(1)), Teacher()
        rngs = nnx.Rngs(noise=2)
        loss, grads, *_ = value_and_grad(loss_fn)(model, teacher, X, rngs)
        states = nnx.state(teacher), nnx.state(rngs, nnx.RngCount)
        results.append((loss, nnx.as_pure(grads), *map(nnx.as_pure, states)))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


class Tripled(nnx.Linear):
    def __call__(self, x):
        return 3 * super().__call__(x)


def test_subclasses_are_what_they_do():
    model = nnx.Sequential(
        Tripled(6, 6, rngs=nnx.Rngs(0)), nnx.Linear(6, 2, rngs=nnx.Rngs(1))
    )
    calls = nnx.Linear.__call__, Tripled.__call__
    layers = loco.nnx.layers(lambda m, x: jnp.sum(m(x) ** 2))(model, X)
    assert [layer.path for layer in layers] == ["layers/0/kernel", "layers/1/kernel"]
    assert calls == (nnx.Linear.__call__, Tripled.__call__)
    assert set(vars(model)) == {"layers", "_pytree__state", "_pytree__nodes"}


def test_a_training_step_is_traced_once():
    model = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)), nnx.tanh)

    def loss_fn(model, x):
        return jnp.mean((model(x) - 0.5) ** 2)

    layers = loco.nnx.layers(loss_fn)(model, X)
    optimizer = nnx.Optimizer(model, loco.locoprop(layers), wrt=nnx.Param)
    graphdef, state = nnx.split((model, optimizer))

    def step(state, x):
        model, optimizer = nnx.merge(graphdef, state)
        loss, grads, intermediates = loco.nnx.value_and_grad(loss_fn, layers)(model, x)
        optimizer.update(model, grads, intermediates=intermediates)
        return nnx.state((model, optimizer)), loss

    jitted, traces = counted(step)
    losses = []
    for _ in range(5):
        state, loss = jitted(state, X)
        losses.append(float(loss))
    assert len(traces) == 1
    assert losses[-1] < losses[0]
