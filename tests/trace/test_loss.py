"""The Gauss-Newton model of a loss that is known by its trace alone."""

from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

import locoprop_optax as loco
from locoprop_optax._quadratic.linearization import Linearization
from locoprop_optax._trace.trace import trace
from tests.helpers import MLP, capture, regression, slow

X = jax.random.normal(jax.random.key(0), (12, 5))
CLASSES = jnp.arange(12) % 3
TARGETS = jax.random.uniform(jax.random.key(1), (12, 3))
WEIGHTS = jnp.linspace(0.0, 2.0, 12)


class Network(nn.Module):
    """Dense layers, a norm and dropout."""

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(jnp.tanh(nn.Dense(7)(x)))
        return nn.Dense(3)(nn.Dropout(0.2, deterministic=False)(nn.relu(x)))


def squared(outputs):
    return 0.5 * jnp.mean(jnp.sum((outputs - TARGETS) ** 2, axis=-1))


def every_entry(outputs):
    return jnp.mean((outputs - TARGETS) ** 2)


def binary(outputs):
    losses = optax.sigmoid_binary_cross_entropy(outputs, TARGETS)
    return jnp.mean(jnp.sum(losses, axis=-1))


def classes(outputs):
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs, CLASSES)
    return jnp.mean(losses)


def weighted(outputs):
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs, CLASSES)
    return jnp.sum(WEIGHTS * losses) / 12


LOSSES = [squared, every_entry, binary, classes, weighted]
MODEL = Network()
RNGS = {"dropout": jax.random.key(3)}
PARAMS = MODEL.init({"params": jax.random.key(2), **RNGS}, X)["params"]


def model_fn(params, x=X):
    return MODEL.apply({"params": params}, x, rngs=RNGS)


def captured(cost, params=PARAMS):
    return jax.jit(capture(lambda p: cost(model_fn(p))))(params)


def change_of(params, seed=4):
    flat, unravel = ravel_pytree(params)
    return unravel(jax.random.normal(jax.random.key(seed), flat.shape, flat.dtype))


@pytest.mark.parametrize("cost", LOSSES)
def test_products_are_those_of_a_model_and_a_loss_by_hand(cost):
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), PARAMS)
        loss, grads, intermediates = captured(cost, params)
        by_hand = Linearization.of(model_fn, cost, params)
        found = intermediates.gauss_newton.linearize(params)
        change = change_of(params)
        (pushed,) = found.jvp(change)
        np.testing.assert_allclose(pushed, by_hand.jvp(change), rtol=1e-9)
        (curved,) = found.hvp(found.jvp(change))
        expected = by_hand.hvp(by_hand.jvp(change))
        np.testing.assert_allclose(curved, expected, rtol=1e-9, atol=1e-12)
        pulled = found.vjp(found.hvp(found.jvp(change)))
        np.testing.assert_allclose(
            ravel_pytree(pulled)[0],
            ravel_pytree(by_hand.vjp(expected))[0],
            rtol=1e-9,
            atol=1e-12,
        )
        np.testing.assert_allclose(found.value, loss)
        reached = cost(model_fn(optax.apply_updates(params, change)))
        for linear in (found, by_hand):
            np.testing.assert_allclose(linear.loss_at(change), reached, rtol=1e-9)
        gradient = intermediates.gauss_newton.gradient_of(params)
        np.testing.assert_allclose(ravel_pytree(gradient)[0], ravel_pytree(grads)[0])


@pytest.mark.parametrize("cost", LOSSES)
def test_sampled_cotangents_have_the_hessian_for_second_moment(cost):
    """Over many random signs, at the outputs of one example."""
    repeated = 4096
    row = jnp.asarray([[0.5, -1.0, 2.0]])

    def cost_of(outputs):
        return cost(outputs.reshape(-1, 12, 3)[0])

    model, x = nn.Dense(3, use_bias=False), jnp.ones((12 * repeated, 1))
    params = model.init(jax.random.key(0), x)["params"] | {"kernel": row}

    def loss_fn(params):
        outputs = model.apply({"params": params}, x).reshape(repeated, 12, 3)
        return jnp.sum(jax.vmap(cost_of)(outputs))

    _, _, intermediates = jax.jit(capture(loss_fn))(params)
    (layer,) = intermediates.sampled().layers.values()
    sampled = layer.sampled_cotangents.reshape(repeated, 12, 3)
    outputs = jnp.broadcast_to(row, (12, 3))
    hessian = jax.hessian(lambda outputs: cost(outputs))(outputs)
    for number in (0, 5, 11):
        moment = sampled[:, number].T @ sampled[:, number] / repeated
        block = hessian[number, :, number]
        np.testing.assert_allclose(moment, block, atol=0.06 / 12)


def test_penalties_are_in_the_gradient_and_in_the_curvature():
    def penalized(params):
        return binary(model_fn(params)) + 0.1 * optax.tree.norm(params, squared=True)

    plain = captured(binary)[2].gauss_newton.linearize(PARAMS)
    loss, grads, intermediates = capture(penalized)(PARAMS)
    found = intermediates.gauss_newton.linearize(PARAMS)
    change = change_of(PARAMS)
    np.testing.assert_allclose(loss, found.value, rtol=1e-6)
    reached = penalized(optax.apply_updates(PARAMS, change))
    np.testing.assert_allclose(found.loss_at(change), reached, rtol=1e-5)
    close = partial(np.testing.assert_allclose, rtol=1e-5)
    jax.tree.map(close, intermediates.gauss_newton.gradient_of(PARAMS), grads)
    outputs, *penalized_params = found.jvp(change)
    (expected,) = plain.jvp(change)
    close(outputs, expected)
    curved, *penalties = found.hvp([outputs, *penalized_params])
    close(curved, *plain.hvp([expected]))
    for moved, penalty, leaf in zip(
        penalized_params, penalties, jax.tree.leaves(change), strict=True
    ):
        close(moved, leaf)
        close(penalty, 0.2 * leaf)


def test_hidden_parameters_stay_where_they_are():
    model = captured(classes)[2].gauss_newton
    change = change_of(PARAMS)
    hidden = change | {"Dense_1": optax.MaskedNode()}
    still = change | {"Dense_1": jax.tree.map(jnp.zeros_like, PARAMS["Dense_1"])}
    reached = classes(model_fn(optax.apply_updates(PARAMS, still)))
    linear = model.linearize(PARAMS | {"Dense_1": optax.MaskedNode()})
    np.testing.assert_allclose(linear.loss_at(hidden), reached, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_loss_of_a_bad_batch_is_known_without_jit_too(bad):
    broken = X.at[0, 0].set(bad)
    _, _, found = capture(
        lambda p: jnp.mean((model_fn(p, broken) - broken[:, :3]) ** 2)
    )(PARAMS)
    assert not np.isfinite(found.gauss_newton.linearize(PARAMS).value)


def test_several_last_layers_are_outputs_together():
    class TwoHeads(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jnp.tanh(nn.Dense(6)(x))
            return nn.Dense(3, name="left")(x), nn.Dense(3, name="right")(x)

    model = TwoHeads()
    params = model.init(jax.random.key(0), X)["params"]

    def cost(outputs):
        return classes(outputs[0]) + 2 * squared(outputs[1])

    _, _, intermediates = capture(lambda p: cost(model.apply({"params": p}, X)))(params)
    by_hand = Linearization.of(lambda p: model.apply({"params": p}, X), cost, params)
    change = change_of(params)
    found = intermediates.gauss_newton.linearize(params)
    for ours, theirs in zip(
        found.hvp(found.jvp(change)),
        by_hand.hvp(by_hand.jvp(change)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_it_passes_lifted_transforms():
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return jnp.tanh(nn.Dense(5)(x)), None

    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            scanned = nn.scan(Body, variable_axes={"params": 0}, length=3)
            x, _ = nn.scan(
                Body,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
            )(name="stack")(x, None)
            del scanned
            return nn.remat(nn.Dense)(3, name="last")(x)

    model = Deep()
    params = model.init(jax.random.key(0), X)["params"]
    apply = lambda p: model.apply({"params": p}, X)  # noqa: E731
    _, _, intermediates = jax.jit(capture(lambda p: binary(apply(p))))(params)
    change = change_of(params)
    (pushed,) = intermediates.gauss_newton.linearize(params).jvp(change)
    expected = jax.jvp(apply, (params,), (change,))[1]
    np.testing.assert_allclose(pushed, expected, rtol=1e-4, atol=1e-5)
    stack = intermediates.sampled().layers["stack/Dense_0/kernel"]
    assert stack.sampled_cotangents.shape == stack.cotangents.shape == (3, 12, 5)


def test_the_joined_curvature_is_that_of_the_large_batch():
    dense = nn.Dense(3)
    params = dense.init(jax.random.key(0), X)["params"]

    def loss_fn(params, x, labels):
        outputs = dense.apply({"params": params}, x)
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
        return jnp.mean(losses)

    whole = capture(loss_fn)(params, X, CLASSES)[2].gauss_newton
    halves = [
        capture(loss_fn)(params, X[part], CLASSES[part])[2]
        for part in np.split(np.arange(12), 2)
    ]
    joined = loco.join_intermediates(*halves).gauss_newton
    change = change_of(params)
    products = []
    for model in (whole, joined):
        linear = model.linearize(params)
        product = linear.vjp(linear.hvp(linear.jvp(change)))
        scalars = (model.value, linear.value, linear.loss_at(change))
        gradient = model.gradient_of(params)
        products.append(ravel_pytree((product, gradient, scalars))[0])
    np.testing.assert_allclose(products[0], products[1], rtol=1e-5, atol=1e-7)


def test_a_part_of_the_batch_gives_curvature_and_the_whole_gives_gradients():
    def loss_fn(params, count):
        outputs = model_fn(params, X[:count])
        losses = optax.softmax_cross_entropy_with_integer_labels(
            outputs, CLASSES[:count]
        )
        return jnp.mean(losses)

    _, grads, whole = capture(loss_fn)(PARAMS, 12)
    _, _, part = capture(loss_fn)(PARAMS, 4)
    both = loco.add_curvature(whole, part)
    for path, layer in both.sampled().layers.items():
        assert layer.cotangents is whole.layers[path].cotangents
        sampled = part.sampled().layers[path].sampled_cotangents
        np.testing.assert_array_equal(layer.sampled_cotangents, sampled)
    gradient = both.gauss_newton.gradient_of(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, gradient, grads)
    (pushed,) = both.gauss_newton.linearize(PARAMS).jvp(change_of(PARAMS))
    assert pushed.shape == (4, 3)
    with pytest.raises(ValueError, match="no Gauss-Newton model"):
        loco.add_curvature(whole, loco.Intermediates(part.layers))


def test_signs_are_those_of_the_batch():
    model = nn.Dense(3)
    params = model.init(jax.random.key(0), X)["params"]

    @jax.jit
    def signs(x):
        loss_fn = lambda p: squared(model.apply({"params": p}, x))  # noqa: E731
        _, _, found = capture(loss_fn)(params)
        (layer,) = found.sampled().layers.values()
        return jnp.sign(layer.sampled_cotangents)

    assert jnp.array_equal(signs(X), signs(X))
    assert 0.2 < jnp.mean(signs(X) == signs(X.at[0, 0].add(1.0))) < 0.8


def cut_of(loss_fn, params, *args):
    """Where a loss is cut, the shapes there, and the transfer functions."""
    traced, _ = trace(loss_fn, False, params, args, {})
    graph, cut = traced.graph, traced.cut()
    shapes = [graph.avals[graph.places[value]].shape for value in cut.values]
    return cut, shapes, [t and t.name for t in cut.transfers]


def soft_capped(outputs):
    return classes(30 * jnp.tanh(outputs / 30))


def smoothed(outputs):
    labels = optax.smooth_labels(jax.nn.one_hot(CLASSES, 3), 0.1)
    return jnp.mean(optax.softmax_cross_entropy(outputs, labels))


def with_z_loss(outputs):
    z = jax.nn.logsumexp(outputs, axis=-1)
    return classes(outputs) + 1e-2 * jnp.mean(z**2)


def split(outputs):
    left, right = outputs[:, :1], outputs[:, 1:]
    return jnp.mean(left**2) + jnp.mean(optax.softmax_cross_entropy(right, right * 0))


CONVEX = {
    "squared": squared,
    "temperature": lambda outputs: classes(outputs / 0.7),
    "label smoothing": smoothed,
    "z-loss": with_z_loss,
    "class weights": weighted,
    "split outputs": split,
    "huber": lambda outputs: jnp.mean(optax.huber_loss(outputs, TARGETS)),
    "log-cosh": lambda outputs: jnp.mean(optax.log_cosh(outputs, TARGETS)),
    "poisson": lambda outputs: jnp.mean(jnp.exp(outputs) - TARGETS * outputs),
    "a sum": lambda outputs: classes(outputs) + squared(outputs),
}


@pytest.mark.parametrize("name", CONVEX)
def test_convex_losses_are_cut_at_the_last_layer(name):
    cut, shapes, _ = cut_of(lambda p: CONVEX[name](model_fn(p)), PARAMS)
    assert shapes == [(12, 3)]
    assert cut.params == ()


@pytest.mark.parametrize("name", ["huber", "z-loss", slow("log-cosh"), slow("poisson")])
def test_the_curvature_of_any_convex_loss_is_its_hessian(name):
    cost = CONVEX[name]
    linear = captured(cost)[2].gauss_newton.linearize(PARAMS)
    by_hand = Linearization.of(model_fn, cost, PARAMS)
    change = change_of(PARAMS)
    (found,) = linear.hvp(linear.jvp(change))
    np.testing.assert_allclose(
        found, by_hand.hvp(by_hand.jvp(change)), rtol=1e-4, atol=1e-6
    )


def pseudo_huber(outputs):
    """Convex, and the matching loss of nothing that has a name."""
    return jnp.mean(jnp.sqrt(1 + (outputs - TARGETS) ** 2))


def test_elementwise_losses_have_their_curvature_sampled():
    """The squares of the sampled cotangents are the Hessian's diagonal."""
    (layer,) = (
        capture(lambda p: pseudo_huber(X @ p["w"]))({"w": jnp.ones((5, 3))})[2]
        .sampled()
        .layers.values()
    )
    hessian = (1 + (layer.preactivations - TARGETS) ** 2) ** -1.5
    hessian /= layer.preactivations.size
    np.testing.assert_allclose(layer.sampled_cotangents**2, hessian, rtol=1e-4)


def test_a_soft_cap_moves_the_cut_behind_it():
    cut, *outputs = cut_of(lambda p: soft_capped(model_fn(p)), PARAMS)
    assert outputs == [[(12, 3)], ["softmax"]]
    plain, *_ = cut_of(lambda p: classes(model_fn(p)), PARAMS)
    assert cut.values[0] > plain.values[0]


def test_a_fixed_temperature_is_before_the_cut_too():
    _, *outputs = cut_of(lambda p: classes(model_fn(p) / 0.7), PARAMS)
    assert outputs == [[(12, 3)], ["softmax"]]


def test_a_learned_temperature_is_before_the_cut():
    params = {"w": jnp.ones((5, 3)), "t": jnp.ones(())}

    def loss_fn(p):
        return classes(X @ p["w"] * jnp.exp(p["t"]))

    cut, *outputs = cut_of(loss_fn, params)
    assert outputs == [[(12, 3)], ["softmax"]]
    assert cut.params == ()


def test_a_bias_that_is_added_apart_is_behind_the_cut_or_before_it():
    params = {"w": jnp.ones((5, 3)), "b": jnp.zeros(())}
    _, shapes, _ = cut_of(lambda p: classes(X @ p["w"] + p["b"]), params)
    assert shapes == [(12, 3)]


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda p: -jnp.mean(jnp.exp(-((X @ p["w"]) ** 2))),
        lambda p: jnp.mean(jnp.sin(X @ p["w"])),
        lambda p: jnp.mean(
            jnp.maximum(0.9 * (TARGETS - X @ p["w"]), 0.1 * (X @ p["w"] - TARGETS))
        ),
    ],
)
def test_a_loss_that_is_nowhere_curved_upwards_has_no_curvature(loss_fn):
    params = {"w": jax.random.normal(jax.random.key(0), (5, 3))}
    cut, *_ = cut_of(loss_fn, params)
    assert cut.values == ()
    _, grads, intermediates = capture(loss_fn)(params)
    assert intermediates.sampled() is intermediates
    tx = loco.locoprop(loco.layers(loss_fn)(params), trust_region=None)
    tx.update(grads, tx.init(params), params, intermediates=intermediates)


def test_a_layer_that_bypasses_the_last_is_an_output_too():
    def loss_fn(params):
        outputs, state = MODEL.apply(
            {"params": params}, X, rngs=RNGS, capture_intermediates=True
        )
        (hidden,) = state["intermediates"]["Dense_0"]["__call__"]
        return squared(outputs) + jnp.mean(hidden**2)

    _, shapes, _ = cut_of(loss_fn, PARAMS)
    assert shapes == [(12, 7), (12, 3)]


def test_locoprop_takes_the_same_step_as_with_functions():
    model = nn.Sequential([nn.Dense(6), jnp.tanh, nn.Dense(3)])
    params = model.init(jax.random.key(0), X)["params"]
    apply = lambda p: model.apply({"params": p}, X)  # noqa: E731
    loss_fn = lambda p: classes(apply(p))  # noqa: E731
    layers = loco.layers(loss_fn)(params)
    tx = loco.locoprop(layers)
    by_hand = optax.chain(
        loco.scale_by_locoprop(
            layers,
            target=loco.targets.natural_gradient(1.0, damping=0.75, decay=0.8),
            solver=loco.solvers.majorized_newton(1, damping=0.3, ema=0.8),
            refresh_every=16,
        ),
        loco.scale_by_quadratic_model(
            damping=0.0, damping_decay=1.0, average_decay=0.9, measure_every=8
        ),
    )
    states, losses = [tx.init(params), by_hand.init(params)], []
    for _ in range(4):
        loss, grads, intermediates = loco.value_and_grad(loss_fn, layers)(params)
        losses.append(float(loss))
        extra = {"intermediates": intermediates}
        updates, states[0] = tx.update(grads, states[0], params, **extra)
        extra |= {"model_fn": apply, "loss_fn": classes}
        expected, states[1] = by_hand.update(grads, states[1], params, **extra)
        for ours, theirs in zip(
            *map(jax.tree.leaves, (updates, expected)), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=1e-5)
        params = optax.apply_updates(params, updates)
    assert losses == sorted(losses, reverse=True)


def test_locoprop_trains_what_is_more_than_layers():
    """The norm goes to the fallback; nothing retraces; the state keeps its form."""
    loss_fn = lambda p: classes(model_fn(p))  # noqa: E731
    layers = loco.layers(loss_fn, exclude="LayerNorm_0/*")(PARAMS)
    tx = loco.locoprop(layers, fallback=optax.sgd(0.1), weight_decay=1e-3)
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(1)
        loss, grads, intermediates = loco.value_and_grad(loss_fn, layers)(params)
        updates, state = tx.update(grads, state, params, intermediates=intermediates)
        return optax.apply_updates(params, updates), state, loss, grads

    params, state = PARAMS, tx.init(PARAMS)
    forms, losses = {str(jax.tree.map(jnp.shape, state))}, []
    for _ in range(16):
        before = params["LayerNorm_0"]["scale"]
        params, state, loss, grads = step(params, state)
        expected = before - 0.1 * grads["LayerNorm_0"]["scale"]
        np.testing.assert_allclose(params["LayerNorm_0"]["scale"], expected, rtol=1e-5)
        forms.add(str(jax.tree.map(jnp.shape, state)))
        losses.append(float(loss))
    assert len(traces) == len(forms) == 1
    assert losses[-1] < 0.3 * losses[0]


def test_weight_decay_is_decoupled_and_follows_the_learning_rate():
    model = nn.Dense(3)
    params = model.init(jax.random.key(0), X)["params"]
    loss_fn = lambda p: squared(model.apply({"params": p}, X))  # noqa: E731
    layers = loco.layers(loss_fn)(params)
    _, grads, intermediates = loco.value_and_grad(loss_fn, layers)(params)
    plain, decayed = (
        tx.update(grads, tx.init(params), params, intermediates=intermediates)[0]
        for tx in (
            loco.locoprop(layers, 0.5),
            loco.locoprop(layers, 0.5, weight_decay=0.2),
        )
    )
    jax.tree.map(
        lambda a, b, p: np.testing.assert_allclose(b, a - 0.1 * p, atol=1e-6),
        plain,
        decayed,
        params,
    )


def test_nnx_carries_it_too():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(5, 6, rngs=rngs)
            self.norm = nnx.BatchNorm(6, rngs=rngs)
            self.last = nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            return self.last(jnp.tanh(self.norm(self.first(x))))

    model = Model(nnx.Rngs(0))
    loss_fn = lambda model: classes(model(X))  # noqa: E731
    layers = loco.nnx.layers(loss_fn)(model)
    optimizer = nnx.Optimizer(model, loco.locoprop(layers), wrt=nnx.Param)
    capture = loco.nnx.value_and_grad(loss_fn, layers)

    @nnx.jit
    def step(model, optimizer):
        loss, grads, intermediates = capture(model)
        optimizer.update(model, grads, intermediates=intermediates)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(16)]
    assert losses[-1] < 0.3 * losses[0]
    assert float(jnp.abs(model.norm.mean[...]).max()) > 0


def test_without_a_model_of_the_loss_locoprop_says_how_to_get_it():
    loss_fn = lambda p: classes(model_fn(p))  # noqa: E731
    layers = loco.layers(loss_fn)(PARAMS)
    _, grads, intermediates = loco.value_and_grad(loss_fn, layers)(PARAMS)
    tx = loco.locoprop(layers)
    by_hand = loco.Intermediates(intermediates.layers)
    with pytest.raises(TypeError, match=r"value_and_grad\(loss_fn, layers\)"):
        tx.update(grads, tx.init(PARAMS), PARAMS, intermediates=by_hand)


@pytest.mark.parametrize("lift", [nn.jit, nn.remat, lambda module: module])
@pytest.mark.parametrize("whole", [False, True])
def test_the_pass_back_begins_at_the_last_layer_under_any_lift(lift, whole):
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense if whole else lift(nn.Dense)
            return dense(3, name="last")(jnp.tanh(nn.Dense(4, name="first")(x)))

    plain, lifted = Inner(), (lift(Inner) if whole else Inner)()
    params = plain.init(jax.random.key(0), X)["params"]
    loss_fn = lambda p: binary(lifted.apply({"params": p}, X))  # noqa: E731
    found = jax.jit(capture(loss_fn))(params)[2].sampled()
    layers = {path.removesuffix("/kernel"): la for path, la in found.layers.items()}
    assert not np.allclose(
        layers["last"].sampled_cotangents, layers["last"].cotangents, atol=1e-3
    )
    back = layers["last"].sampled_cotangents @ params["last"]["kernel"].T
    expected = back * (1 - jnp.tanh(layers["first"].preactivations) ** 2)
    np.testing.assert_allclose(
        layers["first"].sampled_cotangents, expected, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float64", slow("float16"), slow("float32")]
)
def test_locoprop_keeps_dtypes_and_takes_injected_rates(dtype):
    with jax.enable_x64(dtype == "float64"):
        loss_fn, params, batch = regression(MLP(dtype=dtype, param_dtype=dtype))
        layers = loco.layers(loss_fn)(params, batch)
        tx = optax.inject_hyperparams(loco.locoprop)(layers, learning_rate=0.5)
        state = tx.init(params)
        capture = loco.value_and_grad(loss_fn, layers)
        before, grads, intermediates = capture(params, batch)
        extra = {"intermediates": intermediates}
        updates, new_state = tx.update(grads, state, params, **extra)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
        assert loss_fn(optax.apply_updates(params, updates), batch) < before


def test_the_curvature_of_joined_parts_keeps_the_gradient_of_the_whole():
    """Found when a gradient came to be asked for by itself."""

    def loss_fn(params, x):
        return jnp.mean(model_fn(params, x) ** 2)

    _, grads, whole = capture(loss_fn)(PARAMS, X)
    joined = loco.join_intermediates(
        *(capture(loss_fn)(PARAMS, part)[2] for part in (X[:2], X[2:4]))
    )
    both = loco.add_curvature(whole, joined).gauss_newton
    jax.tree.map(np.testing.assert_array_equal, both.gradient_of(PARAMS), grads)
