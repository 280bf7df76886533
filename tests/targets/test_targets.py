from dataclasses import replace
from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import locoprop_optax as loco
from tests.helpers import (
    counted,
    kfac,
    layers_for,
    local_steps,
    random_layer,
    random_layers,
    regression,
    solved,
    train_step,
    update_of,
)

pytestmark = pytest.mark.usefixtures("float64")


def start(target, params):
    """A target's state for a layer that is a product."""
    (layer,) = layers_for({"layer": params})
    return target.init(layer, params)


def displaced(target, layer, state, count=0):
    """The displacement at a step that makes everything anew, and the state after."""
    count = jnp.asarray(count)
    state = target.refresh(layer, None, state, count)
    return target.displace(layer, None, state, count), state


@given(random_layers, st.floats(0.01, 20))
def test_gradient_descent_is_gamma_times_the_cotangents(drawn, gamma):
    params, layer = random_layer(**drawn)
    target = loco.targets.gradient_descent(gamma)
    state = start(target, params)
    displacement, _ = displaced(target, layer, state)
    np.testing.assert_allclose(displacement.outputs, gamma * layer.cotangents)
    np.testing.assert_allclose(
        displacement.gradient["kernel"], gamma * layer.gradient["kernel"]
    )


def test_normalized_follows_its_formula_over_batches():
    gamma, decay, moment = 0.05, 0.9, 0.0
    target = loco.targets.normalized(gamma, decay)
    params, _ = random_layer(0, 6, 4, 3)
    state = start(target, params)
    for k in range(4):
        n = 6 + k
        _, layer = random_layer(k, n, 4, 3)
        displacement, state = displaced(target, layer, state, k)
        per_example = n * np.asarray(layer.cotangents)
        moment = decay * moment + (1 - decay) * np.mean(per_example**2)
        scale = gamma / np.sqrt(moment / (1 - decay ** (k + 1)))
        np.testing.assert_allclose(displacement.outputs, scale * per_example)
        np.testing.assert_allclose(
            displacement.gradient["bias"], scale * per_example.sum(0)
        )


def test_normalized_takes_as_many_rows_as_a_large_image_has():
    params, layer = random_layer(0, 50_000, 2, 1)
    target = loco.targets.normalized(0.05)
    displacement, _ = displaced(target, layer, start(target, params))
    rms = np.sqrt(np.mean(np.asarray(layer.cotangents) ** 2))
    np.testing.assert_allclose(displacement.outputs, 0.05 * layer.cotangents / rms)


def test_normalized_by_unit():
    params, layer = random_layer(0, 6, 4, 3)
    target = loco.targets.normalized(0.05, by_unit=True)
    state = start(target, params)
    displacement, state = displaced(target, layer, state)
    rms = np.sqrt(np.mean(np.asarray(layer.cotangents) ** 2, axis=0))
    np.testing.assert_allclose(displacement.outputs, 0.05 * layer.cotangents / rms)
    assert displacement.gradient is None, "to be computed"
    assert state.total.shape == (3,)


@given(random_layers, st.floats(1e-6, 1e6))
def test_normalized_does_not_see_the_scale_of_the_loss(drawn, scale):
    params, layer = random_layer(**drawn)
    target = loco.targets.normalized(0.1)
    moved = [
        target.displace(
            loco.LayerIntermediates(
                layer.inputs, layer.preactivations, s * layer.cotangents, {}
            ),
            None,
            start(target, params),
            jnp.zeros((), int),
        ).outputs
        for s in (1.0, scale)
    ]
    np.testing.assert_allclose(*moved, rtol=1e-9)


def test_normalized_leaves_a_layer_without_gradient_where_it_is():
    params, layer = random_layer(0, 6, 4, 3)
    silent = loco.LayerIntermediates(
        layer.inputs, layer.preactivations, 0 * layer.cotangents, {}
    )
    target = loco.targets.normalized(0.1)
    displacement, _ = displaced(target, silent, start(target, params))
    np.testing.assert_array_equal(displacement.outputs, 0)


@pytest.mark.parametrize(
    "make", [loco.targets.gradient_descent, loco.targets.normalized]
)
@pytest.mark.parametrize("gamma", [0.0, -1.0])
def test_gamma_must_be_positive(make, gamma):
    with pytest.raises(ValueError, match=f"γ.* must be positive, got {gamma}"):
        make(gamma)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decay_must_be_a_share(decay):
    with pytest.raises(ValueError, match="decay must be in"):
        loco.targets.normalized(0.1, decay)


def second_moment(cotangents):
    per_example = len(cotangents) * np.asarray(cotangents)
    return per_example.T @ per_example / len(per_example)


def test_natural_gradient_follows_its_formula_over_batches():
    gamma, damping, decay, average = 0.5, 0.2, 0.7, 0.0
    target = loco.targets.natural_gradient(gamma, damping, decay)
    params, _ = random_layer(0, 6, 4, 3)
    state = start(target, params)
    for k in range(3):
        _, layer = random_layer(k, 6 + k, 4, 3)
        displacement, state = displaced(target, layer, state, k)
        average = decay * average + (1 - decay) * second_moment(layer.cotangents)
        metric = average / (1 - decay ** (k + 1))
        metric = metric + damping * np.trace(metric) / 3 * np.eye(3)
        expected = gamma * (6 + k) * layer.cotangents @ np.linalg.inv(metric)
        np.testing.assert_allclose(displacement.outputs, expected, rtol=1e-7)
        np.testing.assert_allclose(
            displacement.gradient["kernel"], layer.inputs.T @ expected, rtol=1e-7
        )
        np.testing.assert_allclose(
            displacement.gradient["bias"], expected.sum(0), rtol=1e-7
        )


def moment_of_examples(cotangents, inputs):
    """That of the positions, and what their sums have above its trace."""
    sums, each = cotangents.sum(1), np.concatenate(cotangents)
    sums, each = sums.T @ sums, each.T @ each
    positions = cotangents.shape[1]
    kappa = np.sum(inputs.mean(1) ** 2) / np.mean(np.sum(inputs**2, 2).sum(0))
    s = np.trace(sums) / np.trace(each)
    r = kappa * s + (1 - kappa) * (1 - s / positions)
    return each + max(0, r - 1) / s * sums


@pytest.mark.parametrize("is_sampled", [False, True])
def test_natural_gradient_of_a_convolution_sums_positions(is_sampled):
    """With the inputs of Grosse and Martens, for a loss that is a mean over images."""

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            options = {"use_bias": False, "param_dtype": jnp.float64, "name": "conv"}
            x = nn.Conv(3, (3,), **options)(x)
            return jnp.sum(jnp.tanh(x), axis=(1, 2))

    n, positions = 6, 5
    x = jax.random.normal(jax.random.key(0), (n, positions, 2))
    y = jax.random.normal(jax.random.key(1), (n,))
    params = Network().init(jax.random.key(2), x)["params"]

    def loss_fn(params):
        return jnp.mean((Network().apply({"params": params}, x) - y) ** 2)

    layers = loco.layers(loss_fn)(params)
    _, grads, intermediates = loco.value_and_grad(loss_fn, layers)(params)
    if not is_sampled:  # the true labels' cotangents stand for them
        intermediates = loco.Intermediates(intermediates.layers)
    tx = loco.scale_by_locoprop(
        layers,
        loss=loco.losses.squared_loss(),
        target=loco.targets.natural_gradient(1.0, damping=0.2, decay=0.0),
        solver=loco.solvers.exact(damping=0.1),
    )
    updates, _ = tx.update(grads, tx.init(params), params, intermediates=intermediates)
    padded = np.pad(x, ((0, 0), (1, 1), (0, 0)))
    patches = np.stack([padded[:, i : i + positions] for i in range(3)], axis=2)
    patches = patches.reshape(n * positions, 6)
    layer = intermediates.sampled().layers["conv/kernel"]
    seen = layer.sampled_cotangents if is_sampled else layer.cotangents
    own = n ** (0.5 if is_sampled else 1.0) * np.asarray(seen).reshape(n, -1, 3)
    omega = patches.T @ patches / n
    gamma = moment_of_examples(own, np.asarray(x)) / (n * positions)
    omega = omega + 0.1 * np.trace(omega) / 6 * np.eye(6)
    gamma = gamma + 0.2 * np.trace(gamma) / 3 * np.eye(3)
    gradient = np.asarray(grads["conv"]["kernel"]).reshape(6, 3)
    expected = np.linalg.solve(omega, gradient) @ np.linalg.inv(gamma)
    found = np.asarray(updates["conv"]["kernel"]).reshape(6, 3)
    np.testing.assert_allclose(found, expected, rtol=1e-7)


class Bias(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + self.param("bias", nn.initializers.zeros, x.shape[-1:])


class Positions(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + self.param("positions", nn.initializers.zeros, x.shape[-2:])


@pytest.mark.parametrize(
    ("model", "share"),
    [
        (nn.Dense(3), 1.0),
        (nn.Conv(3, (1,)), 1.0),
        (Bias(), 1.0),
        (Positions(), 0.25),
        (nn.Embed(7, 3), 0.25),
    ],
)
def test_positions_that_share_a_layer_add_up(model, share):
    """By as much as the inputs are alike: here, if at all, they are equal."""
    embeds = isinstance(model, nn.Embed)
    x = jnp.ones((5, 4), jnp.int32) if embeds else jnp.ones((5, 4, 3))
    params = model.init(jax.random.key(0), x)
    drawn = np.random.default_rng(0).normal(size=(5, 1, 3)) * np.ones((5, 4, 3))

    def loss_fn(params):
        return jnp.sum(drawn * model.apply(params, x))

    layers = loco.layers(loss_fn)(params)
    _, _, intermediates = loco.value_and_grad(loss_fn, layers)(params)
    target = loco.targets.natural_gradient(1.0, decay=0.0)
    gradient = drawn[:, 0]  # of an example, at each of its four positions
    for found in layers:
        layer = intermediates.layers[found.path]
        layer = replace(layer, sampled_cotangents=jnp.asarray(drawn))
        state = target.init(found, layer.gradient)
        moment = target.refresh(layer, None, state, 0).second_moment.value()
        expected = share * 16 * gradient.T @ gradient
        np.testing.assert_allclose(moment, expected, rtol=1e-6)


@pytest.mark.parametrize("likeness", [0.0, 0.4, 1.0])
def test_the_trace_of_a_natural_target_is_that_of_the_fisher_matrix(likeness):
    """With inputs and cotangents that are independent, over many examples."""
    rng = np.random.default_rng(0)
    n, positions, inputs, units = 4000, 6, 5, 3

    def drawn(size, share):
        mean = rng.normal(size=(n, 1, size))
        return share * mean + (1 - share) * rng.normal(size=(n, positions, size))

    x, g = drawn(inputs, likeness), drawn(units, 0.7)
    layer = loco.LayerIntermediates(
        inputs=jnp.asarray(x),
        preactivations=jnp.zeros(g.shape),
        cotangents=jnp.asarray(g),
        gradient={"kernel": jnp.zeros((inputs, units))},
        sampled_cotangents=jnp.asarray(g),
    )
    target = loco.targets.natural_gradient(1.0, decay=0.0)
    state = start(target, {"kernel": layer.gradient["kernel"]})
    moment = target.refresh(layer, None, state, 0).second_moment.value()
    of_factors = np.mean(np.sum(x**2, axis=-1)) * np.trace(moment)
    fisher = np.sum(np.einsum("npi,npu->niu", x, g) ** 2)
    np.testing.assert_allclose(of_factors, fisher, rtol=0.05)


@pytest.mark.parametrize(
    ("model", "is_known"),
    [
        (nn.Dense(6), True),
        (nn.DenseGeneral((2, 6)), True),
        (nn.Conv(6, (3,)), True),
        (nn.Conv(6, (3,), feature_group_count=2), False),
        (nn.ConvTranspose(6, (3,)), True),
        (nn.ConvTranspose(6, (3,), transpose_kernel=True), True),
        (nn.Einsum((6, 6, 6), "bpi,bio->bpo"), True),
        (nn.Einsum((6, 6), "bpi,oi->bpo"), True),
        (nn.Einsum((5, 6), "bpi,pi->bpi"), True),
    ],
)
def test_the_gradient_of_a_natural_target_is_that_of_its_displacement(model, is_known):
    model = model.clone(param_dtype=jnp.float64)
    x = jax.random.normal(jax.random.key(0), (6, 5, 6))
    params = model.init(jax.random.key(1), x)["params"]

    def loss_fn(params):
        return jnp.mean(jnp.sin(model.apply({"params": params}, x)))

    layers = loco.layers(loss_fn)(params)
    _, _, intermediates = loco.value_and_grad(loss_fn, layers)(params)
    (layer,), (own,) = intermediates.layers.values(), layers.split(params).values()
    (described,) = layers
    target = loco.targets.natural_gradient(0.5)

    def displace(layer, state):
        return displaced(target, layer, state)[0]

    for _ in range(layer.stack_dims):
        displace = jax.vmap(displace)
    displacement = displace(layer, target.init(described, own))
    assert (displacement.gradient is not None) == is_known
    if is_known:
        expected = replace(layer, cotangents=displacement.outputs).pull_back(own)
        chex.assert_trees_all_close(displacement.gradient, expected, rtol=1e-9)


@pytest.mark.parametrize(
    "target",
    [
        loco.targets.natural_gradient(0.5),
        loco.targets.normalized(0.05, by_unit=True),
    ],
)
def test_targets_of_a_convolution_that_computes_in_bfloat16(target):
    model, x = nn.Conv(4, (3,), dtype=jnp.bfloat16), jnp.ones((2, 8, 3))
    params = model.init(jax.random.key(0), x)

    def loss_fn(params):
        return jnp.mean(model.apply(params, x).astype(jnp.float32) ** 2)

    layers = loco.layers(loss_fn)(params)
    _, grads, intermediates = loco.value_and_grad(loss_fn, layers)(params)
    tx = loco.scale_by_locoprop(layers, target=target)
    updates, _ = tx.update(grads, tx.init(params), params, intermediates=intermediates)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype("float32")}
    assert all(bool(jnp.all(jnp.isfinite(u))) for u in jax.tree.leaves(updates))


def test_natural_gradient_without_any_gradient_stays():
    params, layer = random_layer(0, 6, 4, 3)
    silent = replace(layer, cotangents=0 * layer.cotangents)
    target = loco.targets.natural_gradient(1.0)
    state = start(target, params)
    displacement, _ = displaced(target, silent, state)
    np.testing.assert_array_equal(displacement.outputs, 0)


def test_natural_gradient_has_the_gauss_newton_matrix_of_the_output():
    """With labels that move the output along each axis, the estimate is exact."""
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(3, 2)))
    head = jnp.asarray(rng.normal(size=(2, 4)))
    x, y = jnp.asarray(rng.normal(size=(5, 3))), jnp.asarray(rng.normal(size=(5, 4)))

    def network(a):
        return jnp.tanh(a) @ head

    def loss(a, y):
        return 0.5 * jnp.mean(jnp.sum((network(a) - y) ** 2, -1))

    a = x @ kernel
    many = jnp.repeat(a, 4, axis=0)
    labels = network(many) + 2.0 * jnp.tile(jnp.eye(4), (5, 1))  # sqrt(4) unit axes
    layer = loco.LayerIntermediates(
        inputs=x,
        preactivations=a,
        cotangents=jax.grad(loss)(a, y),
        gradient={"kernel": x.T @ jax.grad(loss)(a, y)},
        sampled_cotangents=20**0.5 * jax.grad(loss)(many, labels),
    )
    target = loco.targets.natural_gradient(1.0, damping=0.0)
    state = start(target, {"kernel": kernel})
    displacement, _ = displaced(target, layer, state)
    jacobians = jax.vmap(jax.jacobian(network))(a)
    matrix = jnp.mean(jnp.swapaxes(jacobians, 1, 2) @ jacobians, axis=0)
    expected = 5 * layer.cotangents @ jnp.linalg.inv(matrix)
    np.testing.assert_allclose(displacement.outputs, expected, rtol=1e-9)


def test_rows_that_are_no_examples_make_the_step_no_shorter():
    """Only one row of an example is not zero, so that the block is exact."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 5, 3)), rng.normal(size=6)
    x[:, 1:] = 0.0
    params = {"w": jnp.zeros((3, 1))}

    def loss_fn(params):
        return 0.5 * jnp.mean(((x @ params["w"]).sum((1, 2)) - y) ** 2)

    updates = update_of(kfac, loss_fn, params)
    expected = np.linalg.lstsq(x[:, 0], y)[0]
    np.testing.assert_allclose(-updates["w"][:, 0], expected, rtol=1e-9)


@pytest.mark.parametrize(
    "target",
    [
        loco.targets.natural_gradient(0.5),
        loco.targets.normalized(0.05, by_unit=True),
    ],
)
def test_targets_train_a_model_with_a_steady_state(target):
    loss_fn, params, batch = regression()
    layers = loco.layers(loss_fn)(params, batch)
    tx = local_steps(layers, target=target)
    step, traces = counted(train_step(loss_fn, layers, tx))
    state = tx.init(params)
    structure = jax.tree.map(jnp.shape, state)
    start = loss_fn(params, batch)
    for _ in range(30):
        params, state, loss = step(params, state, batch)
    assert jax.tree.map(jnp.shape, state) == structure
    assert len(traces) == 1
    assert loss < 0.7 * start


@pytest.mark.parametrize("size", [1e-12, 1e-18, 1e-25])
def test_damping_does_not_vanish_with_the_cotangents(size):
    """Their second moment underflows in float32; the step stays finite."""
    params, layer = random_layer(0, n=6, d_in=3, d_out=4)
    params, layer = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (params, layer))
    tiny = replace(
        layer,
        cotangents=size * layer.cotangents,
        gradient=jax.tree.map(lambda g: size * g, dict(layer.gradient)),
    )
    make = partial(
        loco.scale_by_locoprop,
        target=loco.targets.natural_gradient(1.0, damping=0.5),
        solver=loco.solvers.majorized_newton(1, 0.3),
    )
    step = solved(make, params, tiny)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(step))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(step))
