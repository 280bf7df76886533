"""CurveBall and its two-by-two system, against dense matrices in float64."""

from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

import locoprop_optax as loco
from locoprop_optax._quadratic.linearization import Linearization, coefficients
from tests.helpers import MLP

pytestmark = pytest.mark.usefixtures("float64")

DAMPING = 0.3


def squared(outputs):
    return 0.5 * jnp.mean(jnp.sum((outputs - 1.0) ** 2, axis=-1))


def cross_entropy(outputs):
    labels = jnp.arange(len(outputs)) % outputs.shape[-1]
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()


losses = pytest.mark.parametrize("loss_fn", [squared, cross_entropy])


def network(seed=0):
    """A model function, its parameters, and the same on vectors."""
    model = MLP(hidden=4, param_dtype=jnp.float64)
    x = jax.random.normal(jax.random.key(seed), (7, 3))
    params = model.init(jax.random.key(seed + 1), x)["params"]

    def model_fn(params):
        return model.apply({"params": params}, x)

    return model_fn, params


def dense(model_fn, loss_fn, params, damping):
    """The gradient and the damped Gauss-Newton matrix, as arrays."""
    flat, restore = ravel_pytree(params)

    def outputs(vector):
        return model_fn(restore(vector)).ravel()

    shape = model_fn(params).shape
    jacobian = jax.jacobian(outputs)(flat)
    hessian = jax.hessian(lambda o: loss_fn(o.reshape(shape)))(outputs(flat))
    gradient = jax.grad(lambda v: loss_fn(outputs(v).reshape(shape)))(flat)
    matrix = jacobian.T @ hessian @ jacobian + damping * np.eye(len(flat))
    return np.asarray(gradient), np.asarray(matrix), jacobian


def steps_of(tx, model_fn, loss_fn, start, count):
    """The parameters before each step, its updates and the state after it."""
    update = jax.jit(partial(tx.update, None, model_fn=model_fn, loss_fn=loss_fn))
    params, state = start, tx.init(start)
    for _ in range(count):
        updates, state = update(state, params)
        yield params, updates, state
        params = optax.apply_updates(params, updates)


@losses
def test_products_are_those_of_dense_matrices(loss_fn):
    model_fn, params = network()
    linear = Linearization.of(model_fn, loss_fn, params)
    gradient, matrix, jacobian = dense(model_fn, loss_fn, params, 0.0)
    flat, restore = ravel_pytree(params)
    v = np.random.default_rng(0).normal(size=flat.shape)
    pushed = linear.jvp(restore(v))
    np.testing.assert_allclose(pushed.ravel(), jacobian @ v, rtol=1e-10, atol=1e-12)
    product = ravel_pytree(linear.vjp(linear.hvp(pushed)))[0]
    np.testing.assert_allclose(product, matrix @ v, rtol=1e-9, atol=1e-12)
    found = ravel_pytree(linear.vjp(linear.loss_gradient))[0]
    np.testing.assert_allclose(found, gradient, rtol=1e-9, atol=1e-12)


@losses
def test_no_step_in_the_plane_is_better(loss_fn):
    """Against the dense quadratic, minimized over the plane by brute force."""
    model_fn, start = network()
    tx = loco.curveball(damping=DAMPING, damping_decay=1.0)
    previous = None
    for params, updates, state in steps_of(tx, model_fn, loss_fn, start, 6):
        gradient, matrix, _ = dense(model_fn, loss_fn, params, DAMPING)
        z = np.zeros_like(gradient) if previous is None else previous
        direction = gradient + matrix @ z
        plane = np.stack([direction, z], 1) if z.any() else direction[:, None]
        best = (
            plane
            @ np.linalg.lstsq(
                plane.T @ matrix @ plane, -plane.T @ gradient, rcond=None
            )[0]
        )

        def change(step, gradient=gradient, matrix=matrix):
            return gradient @ step + 0.5 * step @ matrix @ step

        previous = np.asarray(ravel_pytree(updates)[0])
        assert change(best) < 0
        assert change(previous) - change(best) <= 1e-12 * abs(change(best))
        np.testing.assert_allclose(
            state.inner_state.velocity["first"]["kernel"], updates["first"]["kernel"]
        )


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([None, 0.3]),
    st.sampled_from([None, 0.7]),
)
def test_what_is_fixed_stays_and_the_rest_is_best(seed, beta, rho):
    rng = np.random.default_rng(seed)
    root, slopes = rng.normal(size=(3, 2)), rng.normal(size=2)
    matrix = root.T @ root + 0.1 * np.eye(2)
    found = coefficients(
        jnp.asarray(matrix),
        jnp.asarray(slopes),
        *(None if v is None else jnp.asarray(v) for v in (beta, rho)),
    )

    def change(beta, rho):
        step = np.array([-beta, rho])
        return step @ slopes + 0.5 * step @ matrix @ step

    best = change(*found)
    for nudge in (-1e-3, 1e-3):
        if beta is None:
            assert best <= change(found[0] + nudge, found[1]) + 1e-12
        if rho is None:
            assert best <= change(found[0], found[1] + nudge) + 1e-12
    assert beta is None or found[0] == beta
    assert rho is None or found[1] == rho


@pytest.mark.parametrize(
    ("matrix", "slopes", "expected"),
    [
        ([[4, 0], [0, 0]], [2, 0], (0.5, 0)),  # no last step
        ([[4, 8], [8, 16]], [2, 4], (0.5, 0)),  # the last step along the direction
        ([[1e-30, 0], [0, 1e30]], [1e-30, 1e30], (1, -1)),  # of very different sizes
        ([[0, 0], [0, 2]], [0, 1], (0, -0.5)),  # no direction
        ([[0, 0], [0, 0]], [1, 1], (0, 0)),  # no curvature at all
        ([[-1, 0], [0, -1]], [1, 1], (0, 0)),  # curved downwards
    ],
)
def test_singular_systems(matrix, slopes, expected):
    found = coefficients(
        jnp.asarray(matrix, float), jnp.asarray(slopes, float), None, None
    )
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_without_curvature_it_is_sgd_with_momentum():
    model_fn, start = network()

    def linear_loss(outputs):
        return jnp.mean(outputs)

    tx = loco.curveball(
        0.5, damping=0.0, step_size=0.1, momentum=0.9, damping_decay=1.0
    )
    sgd = optax.sgd(0.5 * 0.1, momentum=0.9)
    state = sgd.init(start)
    for params, updates, _ in steps_of(tx, model_fn, linear_loss, start, 5):
        gradient = jax.grad(lambda p: linear_loss(model_fn(p)))(params)
        expected, state = sgd.update(gradient, state)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-15),
            updates,
            expected,
        )


@losses
def test_gradients_may_be_passed_in(loss_fn):
    model_fn, start = network()
    tx = loco.curveball(damping=DAMPING)
    state = tx.init(start)
    update = jax.jit(partial(tx.update, model_fn=model_fn, loss_fn=loss_fn))
    for params, updates, _ in steps_of(tx, model_fn, loss_fn, start, 4):
        gradient = jax.grad(lambda p: loss_fn(model_fn(p)))(params)
        given, state = update(gradient, state, params)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-12),
            given,
            updates,
        )


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_damping_follows_the_ratio(rate):
    """Compared at steps 0, 5, ..., and with the change that the real step makes."""
    model_fn, start = network()
    tx = loco.curveball(rate, damping=DAMPING, damping_decay=0.9)
    damping = DAMPING
    for k, (params, updates, state) in enumerate(
        steps_of(tx, model_fn, cross_entropy, start, 12)
    ):
        gradient, matrix, _ = dense(model_fn, cross_entropy, params, damping)
        whole = np.asarray(ravel_pytree(updates)[0]) / rate
        model = gradient @ whole + 0.5 * whole @ matrix @ whole
        if k % 5 == 0:
            before = cross_entropy(model_fn(params))
            after = cross_entropy(model_fn(optax.apply_updates(params, updates)))
            ratio = (after - before) / (model * (2 * rate - rate**2))
            np.testing.assert_allclose(state.inner_state.ratio, ratio, rtol=1e-5)
            change = 1 / 0.9**5 if ratio < 0.5 else 1.0
            damping *= 0.9**5 if ratio > 1.5 else change
        np.testing.assert_allclose(state.inner_state.damping, damping, rtol=1e-6)
        damping = float(state.inner_state.damping)


def test_broken_batches_are_skipped_and_change_nothing():
    model_fn, params = network()
    tx = loco.curveball(damping=1.0)
    (_, updates, state), *_ = steps_of(
        tx, lambda p: model_fn(p) * jnp.nan, squared, params, 1
    )
    assert all(not np.any(u) for u in jax.tree.leaves(updates))
    chex.assert_trees_all_equal(state.inner_state, tx.init(params).inner_state)
    assert state.skipped_steps == 1
    update = jax.jit(partial(tx.update, None, model_fn=model_fn, loss_fn=squared))
    updates, state = update(state, params)
    assert state.skipped_steps == 1
    assert any(np.any(u) for u in jax.tree.leaves(updates))


@pytest.mark.parametrize("decay", [0.999, 1.0])
def test_a_step_to_where_the_loss_is_not_finite_is_skipped(decay):
    def barrier(
        outputs,
    ):  # convex where it is finite; a Newton step from 30 leads to -30
        return jnp.sum(0.1 * outputs - jnp.log(outputs))

    params = {"w": jnp.array([30.0])}
    tx = loco.curveball(damping=1e-9, damping_decay=decay, damping_range=(1e-12, 1.0))
    ((_, updates, state),) = steps_of(tx, lambda p: p["w"], barrier, params, 1)
    assert updates["w"] == 0
    assert state.skipped_steps == 1
    np.testing.assert_allclose(state.inner_state.damping, 1e-9 / decay**5, rtol=1e-6)


def test_a_predicted_rise_is_no_reason_to_skip():
    """With fixed rates and a gradient that turns, SGD with momentum goes on."""
    params = {"w": jnp.array([1.0])}
    tx = loco.curveball(
        step_size=0.01, momentum=0.9, damping=1e-3, damping_decay=0.9, adapt_every=1
    )

    @jax.jit
    def update(state, params, sign):
        functions = {"model_fn": lambda p: p["w"], "loss_fn": lambda o: sign * o.sum()}
        return tx.update(None, state, params, **functions)

    state = tx.init(params)
    for sign in [1.0] * 5 + [-1.0]:
        updates, state = update(state, params, sign)
        params = optax.apply_updates(params, updates)
    assert updates["w"] < 0, "downhill for the first sign, up for the last"
    assert state.skipped_steps == 0
    assert state.inner_state.ratio == 0
    assert state.inner_state.damping > 1e-3 * 0.9**5


def test_masked_parameters_are_an_error_that_explains():
    model_fn, params = network()
    tx = optax.masked(loco.curveball(), {"first": True, "second": False})
    functions = {"model_fn": model_fn, "loss_fn": squared}
    with pytest.raises(ValueError, match=r"optax.masked.*hides parameters.*close"):
        tx.update(params, tx.init(params), params, **functions)


@pytest.mark.parametrize(
    "make",
    [
        lambda layers: loco.curveball(),
        partial(loco.locoprop, diagnostics=True),
    ],
)
def test_the_state_can_be_donated_to_a_scan(make):
    model_fn, params = network()

    def total(params):
        return cross_entropy(model_fn(params))

    layers = loco.layers(total)(params)
    tx = optax.with_extra_args_support(make(layers))

    def step(carry, _):
        params, state = carry
        _, grads, intermediates = loco.value_and_grad(total, layers)(params)
        extra = {"model_fn": model_fn, "loss_fn": cross_entropy}
        updates, state = tx.update(
            grads, state, params, intermediates=intermediates, **extra
        )
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda c: jax.lax.scan(step, c, length=3)[0], donate_argnums=0)
    params, _ = run((jax.tree.map(jnp.copy, params), tx.init(params)))
    assert all(bool(jnp.all(jnp.isfinite(p))) for p in jax.tree.leaves(params))


def test_outputs_of_bfloat16_are_compared_in_float32():
    model_fn, params = network()
    tx = loco.curveball(damping=0.1)

    def rounded(params):
        return model_fn(params).astype(jnp.bfloat16)

    seen = [s.inner_state.ratio for *_, s in steps_of(tx, rounded, squared, params, 3)]
    assert abs(seen[0] - 1) < 0.2


def test_damping_stays_in_its_range():
    model_fn, params = network()
    tx = loco.curveball(damping=1.0, damping_decay=0.1, damping_range=(0.5, 2.0))

    def barrier(outputs):  # infinite but at the start, so that all steps are refused
        start = jax.lax.stop_gradient(model_fn(params))
        moved = jnp.any(jnp.abs(outputs - start) > 1e-9)
        return squared(outputs) + jnp.where(moved, jnp.inf, 0.0)

    for _, _, state in steps_of(tx, model_fn, barrier, params, 7):
        assert state.inner_state.damping <= 2.0
    assert state.inner_state.damping == 2.0


def test_bfloat16_parameters_are_summed_in_float32():
    model = MLP(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (7, 3), jnp.bfloat16)
    params = model.init(jax.random.key(1), x)["params"]
    tx = loco.curveball(damping=0.1)

    def loss_fn(outputs):
        return squared(outputs.astype(jnp.float32))

    def model_fn(params):
        return model.apply({"params": params}, x)

    states = [s for *_, s in steps_of(tx, model_fn, loss_fn, params, 30)]
    assert {z.dtype for z in jax.tree.leaves(states[-1].inner_state.velocity)} == {
        jnp.dtype("float32")
    }
    *_, (_, updates, _) = steps_of(tx, model_fn, loss_fn, params, 1)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}
    assert states[-1].inner_state.value < 0.5 * states[0].inner_state.value


def test_outputs_may_be_a_tree_and_nothing_retraces():
    model_fn, params = network()
    traces = []

    def two(params):
        outputs = model_fn(params)
        return {"a": outputs[:, :1], "b": (outputs[:, 1:],)}

    def loss_fn(outputs):
        return squared(outputs["a"]) + cross_entropy(outputs["b"][0])

    tx = loco.curveball(damping=0.1)

    @jax.jit
    def step(params, state):
        traces.append(None)
        updates, state = tx.update(None, state, params, model_fn=two, loss_fn=loss_fn)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    start = loss_fn(two(params))
    for _ in range(40):
        params, state = step(params, state)
    assert len(traces) == 1
    assert loss_fn(two(params)) < 0.5 * start


def test_locoprop_without_a_learning_rate():
    model_fn, params = network()

    def total(params):
        return cross_entropy(model_fn(params))

    layers = loco.layers(total)(params)
    tx = optax.chain(loco.scale_by_locoprop(layers), loco.scale_by_quadratic_model())

    @jax.jit
    def step(params, state):
        loss, grads, intermediates = loco.value_and_grad(total, layers)(params)
        updates, state = tx.update(
            grads,
            state,
            params,
            intermediates=intermediates,
            model_fn=model_fn,
            loss_fn=cross_entropy,
        )
        return optax.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    for _ in range(40):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.1 * losses[0]


class Regularized(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(6)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))


def test_linen_model_and_loss():
    model, x = Regularized(), jax.random.normal(jax.random.key(0), (8, 4))
    variables = model.init(jax.random.key(1), x, train=False)
    params, stats = variables["params"], variables["batch_stats"]
    functions = loco.linen.model_and_loss(
        model.apply,
        squared,
        x,
        collections={"batch_stats": stats},
        mutable=["batch_stats"],
        rngs={"dropout": jax.random.key(2)},
        train=True,
    )
    expected, changed = model.apply(
        variables,
        x,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": jax.random.key(2)},
    )
    for _ in range(2):
        np.testing.assert_array_equal(functions.model_fn(params), expected)
    jax.tree.map(np.testing.assert_array_equal, functions.mutated(params), changed)
    tx = loco.curveball()
    update = partial(
        tx.update, None, model_fn=functions.model_fn, loss_fn=functions.loss_fn
    )
    updates, _ = jax.jit(update)(tx.init(params), params)
    after = functions.model_fn(optax.apply_updates(params, updates))
    assert squared(after) < squared(expected)


class NNXModel(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.second(self.dropout(self.norm(self.first(x))))


def test_nnx_model_and_loss_in_a_training_step():
    model, x = NNXModel(nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (8, 4))
    optimizer = nnx.Optimizer(model, loco.curveball(damping=0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        functions = loco.nnx.model_and_loss(model, squared, x)
        params = nnx.state(model, nnx.Param)

        def total(params):
            return functions.loss_fn(functions.model_fn(params))

        loss, grads = jax.value_and_grad(total)(params)
        changed = functions.mutated(params)
        optimizer.update(
            model, grads, model_fn=functions.model_fn, loss_fn=functions.loss_fn
        )
        nnx.update(model, changed)
        return loss

    losses = [float(step(model, optimizer, x)) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]
    assert not np.allclose(model.norm.mean[...], 0)
    assert model.dropout.rngs.count[...] == 20


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"damping": -1.0}, "damping must not be negative, got -1.0"),
        ({"damping_decay": 1.5}, r"damping_decay must be in \(0, 1\], got 1.5"),
        ({"adapt_every": 0}, "adapt_every must be at least 1, got 0"),
        ({"trusted": (1.5, 0.5)}, "trusted must be two numbers"),
        ({"damping_range": (-1.0, 1.0)}, "damping_range must be two numbers"),
    ],
)
@pytest.mark.parametrize("make", [loco.curveball, loco.scale_by_quadratic_model])
def test_bad_numbers(make, options, match):
    with pytest.raises(ValueError, match=match):
        make(**options)


@pytest.mark.parametrize("missing", ["params", "model_fn", "loss_fn"])
def test_missing_arguments(missing):
    model_fn, params = network()
    tx = loco.curveball()
    given = {"params": params, "model_fn": model_fn, "loss_fn": squared}
    del given[missing]
    what = "`params`" if missing == "params" else f".*`{missing}`.*model_and_loss"
    with pytest.raises(TypeError, match=f"update needs {what}"):
        tx.update(None, tx.init(params), **given)
