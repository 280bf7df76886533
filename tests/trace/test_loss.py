"""The curvature of a loss that is known by its trace alone."""

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
from locoprop_optax._layers import layers_of

import locoprop_optax as loco
from locoprop_optax._quadratic.linearization import Linearization
from tests.helpers import MLP, regression

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
    capture = loco.linen.value_and_grad(lambda p: cost(model_fn(p)), curvature=True)
    return capture(params)


def change_of(params, seed=4):
    flat, unravel = ravel_pytree(params)
    return unravel(jax.random.normal(jax.random.key(seed), flat.shape, flat.dtype))


@pytest.mark.parametrize("cost", LOSSES)
def test_products_are_those_of_a_model_and_a_loss_by_hand(cost):
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), PARAMS)
        loss, grads, intermediates = captured(cost, params)
        curvature = intermediates.curvature
        assert curvature is not None
        by_hand = Linearization.of(model_fn, cost, params)
        found = curvature.at(params)
        change = change_of(params)
        (pushed,) = found.push(change).values()
        np.testing.assert_allclose(pushed, by_hand.push(change), rtol=1e-9)
        (curved,) = found.curve(found.push(change)).values()
        expected = by_hand.curve(by_hand.push(change))
        np.testing.assert_allclose(curved, expected, rtol=1e-9, atol=1e-12)
        pulled = found.pull(found.curve(found.push(change)))
        np.testing.assert_allclose(
            ravel_pytree(pulled)[0],
            ravel_pytree(by_hand.pull(expected))[0],
            rtol=1e-9,
            atol=1e-12,
        )
        np.testing.assert_allclose(found.value, loss)
        reached = cost(model_fn(optax.apply_updates(params, change)))
        for linear in (found, by_hand):
            np.testing.assert_allclose(linear.after(change), reached, rtol=1e-9)
        np.testing.assert_allclose(
            ravel_pytree(found.gradient)[0], ravel_pytree(grads)[0]
        )


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

    capture = loco.linen.value_and_grad(loss_fn, curvature=True)
    _, _, intermediates = jax.jit(capture)(params)
    (layer,) = intermediates.layers.values()
    sampled = layer.sampled_cotangents.reshape(repeated, 12, 3)
    outputs = jnp.broadcast_to(row, (12, 3))
    hessian = jax.hessian(lambda outputs: cost(outputs))(outputs)
    weight = {every_entry: 2 / 36}.get(cost, 1 / 12)
    for number in (0, 5, 11):
        moment = sampled[:, number].T @ sampled[:, number] / repeated
        share = WEIGHTS[number] * weight if cost is weighted else weight
        block = hessian[number, :, number]
        np.testing.assert_allclose(moment, share * block, atol=0.06 * weight**2)


def test_penalties_are_in_the_gradient_and_in_the_curvature():
    def penalized(params):
        return binary(model_fn(params)) + 0.1 * optax.tree.norm(params, squared=True)

    plain = captured(binary)[2].curvature
    capture = loco.linen.value_and_grad(penalized, curvature=True)
    loss, grads, intermediates = capture(PARAMS)
    found = intermediates.curvature
    change = layers_of(change_of(PARAMS))
    np.testing.assert_allclose(loss, found.value, rtol=1e-6)
    reached = penalized(optax.apply_updates(PARAMS, change_of(PARAMS)))
    np.testing.assert_allclose(found.after(change), reached, rtol=1e-5)
    for path, leaves in layers_of(grads).items():
        for name, leaf in leaves.items():
            np.testing.assert_allclose(found.gradient[path][name], leaf)
    pushed, expected = found.push(change), plain.push(change)
    curved = found.curve(pushed)
    close = partial(np.testing.assert_allclose, rtol=1e-5)
    jax.tree.map(close, pushed[0], expected)
    jax.tree.map(close, curved[0], plain.curve(expected))
    for path, leaves in pushed[1].items():
        jax.tree.map(close, leaves, dict(change[path]))
        jax.tree.map(lambda c, d: close(c, 0.2 * d), curved[1][path], leaves)


def test_hidden_parameters_stay_where_they_are():
    curvature = captured(classes)[2].curvature
    assert curvature is not None
    change = change_of(PARAMS)
    hidden = change | {"Dense_1": optax.MaskedNode()}
    still = change | {"Dense_1": jax.tree.map(jnp.zeros_like, PARAMS["Dense_1"])}
    reached = classes(model_fn(optax.apply_updates(PARAMS, still)))
    linear = curvature.at(PARAMS | {"Dense_1": optax.MaskedNode()})
    np.testing.assert_allclose(linear.after(hidden), reached, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_loss_of_a_bad_batch_is_known_without_jit_too(bad):
    broken = X.at[0, 0].set(bad)
    capture = loco.linen.value_and_grad(
        lambda p: jnp.mean((model_fn(p, broken) - broken[:, :3]) ** 2), curvature=True
    )
    assert not np.isfinite(capture(PARAMS)[2].curvature.value)


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

    capture = loco.linen.value_and_grad(
        lambda p: cost(model.apply({"params": p}, X)), curvature=True
    )
    curvature = capture(params)[2].curvature
    by_hand = Linearization.of(lambda p: model.apply({"params": p}, X), cost, params)
    change = change_of(params)
    found = curvature.at(params)
    for ours, theirs in zip(
        found.curve(found.push(change)).values(),
        by_hand.curve(by_hand.push(change)),
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
    capture = loco.linen.value_and_grad(lambda p: binary(apply(p)), curvature=True)
    _, _, intermediates = jax.jit(capture)(params)
    change = change_of(params)
    (pushed,) = intermediates.curvature.at(params).push(change).values()
    expected = jax.jvp(apply, (params,), (change,))[1]
    np.testing.assert_allclose(pushed, expected, rtol=1e-4, atol=1e-5)
    stack = intermediates.layers["stack/Dense_0"]
    assert stack.sampled_cotangents.shape == stack.cotangents.shape == (3, 12, 5)


def test_the_joined_curvature_is_that_of_the_large_batch():
    model = nn.Dense(3)
    params = model.init(jax.random.key(0), X)["params"]

    def loss_fn(params, x, labels):
        outputs = model.apply({"params": params}, x)
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
        return jnp.mean(losses)

    capture = loco.linen.value_and_grad(loss_fn, curvature=True)
    whole = capture(params, X, CLASSES)[2].curvature
    halves = [
        capture(params, X[part], CLASSES[part])[2]
        for part in np.split(np.arange(12), 2)
    ]
    joined = loco.join_intermediates(*halves).curvature
    change = change_of(params)
    products = []
    for curvature in (whole, joined):
        linear = curvature.at(params)
        product = linear.pull(linear.curve(linear.push(change)))
        scalars = (linear.value, linear.after(change))
        products.append(ravel_pytree((product, linear.gradient, scalars))[0])
    np.testing.assert_allclose(products[0], products[1], rtol=1e-5, atol=1e-7)


def test_a_part_of_the_batch_gives_curvature_and_the_whole_gives_gradients():
    def loss_fn(params, count):
        outputs = model_fn(params, X[:count])
        losses = optax.softmax_cross_entropy_with_integer_labels(
            outputs, CLASSES[:count]
        )
        return jnp.mean(losses)

    _, grads, whole = loco.linen.value_and_grad(loss_fn)(PARAMS, 12)
    _, _, part = loco.linen.value_and_grad(loss_fn, curvature=True)(PARAMS, 4)
    both = loco.add_curvature(whole, part)
    for path, layer in both.layers.items():
        assert layer.cotangents is whole.layers[path].cotangents
        assert layer.sampled_cotangents is part.layers[path].sampled_cotangents
        for name, leaf in layer.gradient.items():
            np.testing.assert_allclose(both.curvature.gradient[path][name], leaf)
            np.testing.assert_allclose(grads[path][name], leaf)
    change = layers_of(change_of(PARAMS))
    (pushed,) = both.curvature.push(change).values()
    assert pushed.shape == (4, 3)
    with pytest.raises(ValueError, match="no curvature"):
        loco.add_curvature(whole, whole)


def test_signs_are_those_of_the_batch():
    model = nn.Dense(3)
    params = model.init(jax.random.key(0), X)["params"]

    @jax.jit
    def signs(x):
        loss_fn = lambda p: squared(model.apply({"params": p}, x))  # noqa: E731
        _, _, found = loco.linen.value_and_grad(loss_fn, curvature=True)(params)
        (layer,) = found.layers.values()
        return jnp.sign(layer.sampled_cotangents)

    assert jnp.array_equal(signs(X), signs(X))
    assert 0.2 < jnp.mean(signs(X) == signs(X.at[0, 0].add(1.0))) < 0.8


@pytest.mark.parametrize(
    "after", [jnp.tanh, nn.standardize, lambda outputs: outputs - outputs.mean()]
)
def test_another_loss_is_refused_with_its_layers(after):
    capture = loco.linen.value_and_grad(
        lambda p: every_entry(after(model_fn(p))), curvature=True
    )
    with pytest.raises(ValueError, match="on 'Dense_0', 'Dense_1'; linen"):
        capture(PARAMS)


def test_a_layer_that_bypasses_the_last_is_refused():
    def loss_fn(params):
        outputs, state = MODEL.apply(
            {"params": params}, X, rngs=RNGS, capture_intermediates=True
        )
        (hidden,) = state["intermediates"]["Dense_0"]["__call__"]
        return squared(outputs) + jnp.mean(hidden**2)

    capture = loco.linen.value_and_grad(loss_fn, curvature=True)
    with pytest.raises(ValueError, match="another way on 'Dense_0'"):
        capture(PARAMS)


def test_locoprop_takes_the_same_step_as_with_functions():
    model = nn.Sequential([nn.Dense(6), jnp.tanh, nn.Dense(3)])
    params = model.init(jax.random.key(0), X)["params"]
    apply = lambda p: model.apply({"params": p}, X)  # noqa: E731
    capture = loco.linen.value_and_grad(lambda p: classes(apply(p)), curvature=True)
    tx = loco.locoprop()
    by_hand = optax.chain(
        loco.scale_by_locoprop(
            target=loco.targets.natural_gradient(1.0, damping=0.75),
            solver=loco.solvers.majorized_newton(1, damping=0.3),
        ),
        loco.scale_by_quadratic_model(damping=0.0, damping_decay=1.0),
    )
    states, losses = [tx.init(params), by_hand.init(params)], []
    for _ in range(4):
        loss, grads, intermediates = capture(params)
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
    tx = loco.locoprop(fallback=optax.sgd(0.1), weight_decay=1e-3)
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(1)
        loss_fn = lambda p: classes(model_fn(p))  # noqa: E731
        capture = loco.linen.value_and_grad(loss_fn, curvature=True)
        loss, grads, intermediates = capture(params)
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
    capture = loco.linen.value_and_grad(
        lambda p: squared(model.apply({"params": p}, X)), curvature=True
    )
    _, grads, intermediates = capture(params)
    plain, decayed = (
        tx.update(grads, tx.init(params), params, intermediates=intermediates)[0]
        for tx in (loco.locoprop(0.5), loco.locoprop(0.5, weight_decay=0.2))
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
    optimizer = nnx.Optimizer(model, loco.locoprop(), wrt=nnx.Param)
    capture = loco.nnx.value_and_grad(lambda model: classes(model(X)), curvature=True)

    @nnx.jit
    def step(model, optimizer):
        loss, grads, intermediates = capture(model)
        optimizer.update(model, grads, intermediates=intermediates)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(16)]
    assert losses[-1] < 0.3 * losses[0]
    assert float(jnp.abs(model.norm.mean[...]).max()) > 0


def test_without_curvature_locoprop_says_how_to_get_it():
    capture = loco.linen.value_and_grad(lambda p: classes(model_fn(p)))
    _, grads, intermediates = capture(PARAMS)
    tx = loco.locoprop()
    with pytest.raises(TypeError, match=r"value_and_grad\(loss_fn, curvature=True\)"):
        tx.update(grads, tx.init(PARAMS), PARAMS, intermediates=intermediates)


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
    capture = loco.linen.value_and_grad(
        lambda p: binary(lifted.apply({"params": p}, X)), curvature=True
    )
    layers = jax.jit(capture)(params)[2].layers
    assert not np.allclose(
        layers["last"].sampled_cotangents, layers["last"].cotangents, atol=1e-3
    )
    back = layers["last"].sampled_cotangents @ params["last"]["kernel"].T
    expected = back * (1 - jnp.tanh(layers["first"].preactivations) ** 2)
    np.testing.assert_allclose(
        layers["first"].sampled_cotangents, expected, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_locoprop_keeps_dtypes_and_takes_injected_rates(dtype):
    with jax.enable_x64(dtype == "float64"):
        loss_fn, params, batch = regression(MLP(dtype=dtype, param_dtype=dtype))
        tx = optax.inject_hyperparams(loco.locoprop)(learning_rate=0.5)
        state = tx.init(params)
        capture = loco.linen.value_and_grad(loss_fn, curvature=True)
        before, grads, intermediates = capture(params, batch)
        extra = {"intermediates": intermediates}
        updates, new_state = tx.update(grads, state, params, **extra)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
        assert loss_fn(optax.apply_updates(params, updates), batch) < before
