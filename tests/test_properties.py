"""What Optax asks of its optimizers, asked of those that need intermediates."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import locoprop_optax as loco
from tests.helpers import MLP, local_steps, regression, slow

OPTIMIZERS = {
    "newton": lambda layers, learning_rate=0.1: local_steps(layers, learning_rate),
    "locoprop_m": lambda layers, learning_rate=1e-3: loco.locoprop_m(
        layers, learning_rate
    ),
    "locoprop_s": lambda layers, learning_rate=1e-3: loco.locoprop_s(
        layers, learning_rate
    ),
    "natural": lambda layers, learning_rate=0.1: local_steps(
        layers,
        learning_rate,
        loss=loco.losses.squared_loss(),
        target=loco.targets.natural_gradient(0.1),
        solver=loco.solvers.exact(0.1, ema=0.9),
    ),
    "conjugate": lambda layers, learning_rate=0.1: local_steps(
        layers,
        learning_rate,
        target=loco.targets.normalized(0.05),
        solver=loco.solvers.conjugate_gradient(3),
    ),
}
optimizers = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def capture(loss_fn, layers, params, batch):
    _, grads, intermediates = loco.value_and_grad(loss_fn, layers)(params, batch)
    return grads, intermediates


@optimizers
def test_accepts_unknown_extra_arguments(make):
    loss_fn, params, batch = regression()
    layers = loco.layers(loss_fn)(params, batch)
    grads, intermediates = capture(loss_fn, layers, params, batch)
    tx = make(layers)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    results = [
        tx.update(grads, tx.init(params), params, intermediates=intermediates, **more)[
            0
        ]
        for more in ({}, {"value": 1.0, "not_known_to_it": object()})
    ]
    jax.tree.map(np.testing.assert_array_equal, *results)


@optimizers
def test_traces_once(make):
    loss_fn, params, batch = regression()
    layers = loco.layers(loss_fn)(params, batch)
    tx, traces = make(layers), []

    @jax.jit
    def step(params, state):
        traces.append(None)
        grads, intermediates = capture(loss_fn, layers, params, batch)
        updates, state = tx.update(grads, state, params, intermediates=intermediates)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(4):
        params, state = step(params, state)
    assert len(traces) == 1


LINEAR = nn.Dense(3, use_bias=False)
CONVEX = {
    "parabola": lambda out, y: 0.5 * jnp.mean(jnp.sum((out - y) ** 2, -1)),
    "logistic": lambda out, y: jnp.mean(
        jnp.sum(optax.sigmoid_binary_cross_entropy(out, jax.nn.sigmoid(y)), -1)
    ),
    "poisson": lambda out, y: jnp.mean(
        jnp.sum(jax.nn.softplus(out) - jax.nn.sigmoid(y) * out, -1)
    ),
}


@optimizers
@pytest.mark.parametrize("loss", CONVEX.values(), ids=CONVEX)
def test_converges_on_a_convex_problem_under_scan(make, loss):
    x = jax.random.normal(jax.random.key(0), (16, 4))
    solution = jax.random.normal(jax.random.key(1), (4, 3))
    params = LINEAR.init(jax.random.key(2), x)

    def loss_fn(params, batch):
        return loss(LINEAR.apply(params, batch), x @ solution)

    layers = loco.layers(loss_fn)(params, x)
    tx = make(layers, optax.linear_schedule(1.0 if make in FAST else 3e-3, 0.0, 400))

    def step(carry, _):
        params, state = carry
        grads, intermediates = capture(loss_fn, layers, params, x)
        updates, state = tx.update(grads, state, params, intermediates=intermediates)
        return (optax.apply_updates(params, updates), state), None

    scanned = jax.jit(lambda carry: jax.lax.scan(step, carry, length=400)[0])
    params, _ = scanned((params, tx.init(params)))
    np.testing.assert_allclose(params["params"]["kernel"], solution, atol=0.06)


FAST = [OPTIMIZERS[name] for name in ("newton", "natural", "conjugate")]


@optimizers
def test_injected_hyperparameters_change_nothing(make):
    loss_fn, params, batch = regression()
    layers = loco.layers(loss_fn)(params, batch)
    injected = optax.inject_hyperparams(make)(layers, learning_rate=0.01)
    results = []
    for tx in (make(layers, 0.01), injected):
        state, moved = tx.init(params), params
        for _ in range(3):
            grads, intermediates = capture(loss_fn, layers, moved, batch)
            updates, state = tx.update(grads, state, moved, intermediates=intermediates)
            moved = optax.apply_updates(moved, updates)
        results.append(moved)
    for first, second in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-6)


@optimizers
@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float64", slow("float16"), slow("float32")]
)
def test_dtypes_of_updates_and_state(make, dtype):
    with jax.enable_x64(dtype == "float64"):
        model = MLP(dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))
        loss_fn, params, batch = regression(model)
        batch = jax.tree.map(lambda b: b.astype(dtype), batch)
        layers = loco.layers(loss_fn)(params, batch)
        grads, intermediates = capture(loss_fn, layers, params, batch)
        tx = make(layers)
        state = tx.init(params)
        like = jax.tree.map(lambda leaf: (jnp.shape(leaf), leaf.dtype), state)
        for _ in range(2):
            updates, state = tx.update(
                grads, state, params, intermediates=intermediates
            )
        assert like == jax.tree.map(lambda leaf: (jnp.shape(leaf), leaf.dtype), state)
        assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
        assert all(bool(jnp.all(jnp.isfinite(u))) for u in jax.tree.leaves(updates))


@optimizers
def test_learning_rate_takes_a_schedule(make):
    loss_fn, params, batch = regression()
    layers = loco.layers(loss_fn)(params, batch)
    grads, intermediates = capture(loss_fn, layers, params, batch)
    schedule = optax.piecewise_constant_schedule(0.01, {1: 0.0})
    tx = make(layers, schedule)
    state = tx.init(params)
    sizes = []
    for _ in range(2):
        updates, state = tx.update(grads, state, params, intermediates=intermediates)
        sizes.append(float(optax.tree.norm(updates)))
    assert sizes[0] > 0
    if make in FAST:
        assert sizes[1] == 0
    else:  # the momentum of RMSProp holds steps that are already scaled, and decays
        constant = make(layers, 0.01)
        state = constant.init(params)
        for _ in range(2):
            updates, state = constant.update(
                grads, state, params, intermediates=intermediates
            )
        assert sizes[1] < 0.9 * float(optax.tree.norm(updates))
