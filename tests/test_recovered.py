"""The algorithms of docs/recovered.md, each against a formula of its own in float64."""

import dataclasses
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import locoprop_optax as loco
from tests.helpers import (
    DOCS,
    MLP,
    random_layer,
    regression,
    run_blocks,
    solved,
    train_step,
)
from tests.test_identities import as_matrix, augmented

pytestmark = pytest.mark.usefixtures("float64")

PAGE = (DOCS / "recovered.md").read_text()
TITLES = re.findall(r"^## (.+)$", PAGE, re.MULTILINE)
GAMMA = 0.5


def block(title, layers):
    """What the code under a heading of the page defines."""
    (section,) = re.findall(rf"^## {title}$(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    names = {"loco": loco, "optax": optax, "dataclasses": dataclasses}
    return run_blocks(section, layers=layers, **names)


def by(title):
    """The optimizer under a heading of the page, as a function of the layers."""
    return lambda layers: block(title, layers)["tx"]


@pytest.fixture(params=["relu", "tanh", "sigmoid"])
def drawn(request):
    params, layer = random_layer(3, 7, 4, 3, request.param)
    x, g = augmented(params, layer), np.asarray(layer.cotangents)
    return params, layer, x, x.T @ g


def test_every_section_of_the_page_is_proved():
    source = Path(__file__).read_text()
    assert len(TITLES) == 10
    assert all(re.search(rf'(block|by)\("{title}"', source) for title in TITLES)


def test_backprop():
    loss_fn, params, batch = regression(MLP(param_dtype=jnp.float64))
    layers = loco.layers(loss_fn)(params, batch)
    tx = optax.chain(by("BackProp")(layers), optax.scale(-1.0))
    adam = optax.adam(1e-2)
    step, state = train_step(loss_fn, layers, tx), tx.init(params)
    expected, adam_state = params, adam.init(params)
    for _ in range(4):
        params, state, _ = step(params, state, batch)
        gradient = jax.grad(loss_fn)(expected, batch)
        scaled = jax.tree.map(lambda g: GAMMA * g, gradient)
        updates, adam_state = adam.update(scaled, adam_state)
        expected = optax.apply_updates(expected, updates)
    for found, wanted in zip(*map(jax.tree.leaves, (params, expected)), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)


def test_proxprop(drawn):
    params, layer, x, gradient = drawn
    expected = GAMMA * np.linalg.solve(x.T @ x + 2.0 * np.eye(5), gradient)
    found = as_matrix(solved(by("ProxProp"), params, layer))
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_proxprop_by_conjugate_gradients(drawn):
    params, layer, x, gradient = drawn
    matrix, goal = x.T @ x + 2.0 * np.eye(5), GAMMA * gradient
    solution, residual, direction = np.zeros_like(goal), goal, goal
    for _ in range(3):
        curved = matrix @ direction
        length = np.sum(residual**2) / np.sum(direction * curved)
        solution = solution + length * direction
        smaller = residual - length * curved
        direction = smaller + np.sum(smaller**2) / np.sum(residual**2) * direction
        residual = smaller
    make = by("ProxProp by conjugate gradients")
    np.testing.assert_allclose(
        as_matrix(solved(make, params, layer)), solution, rtol=1e-8
    )


def test_foof(drawn):
    params, layer, x, gradient = drawn
    gram = x.T @ x
    damped = gram + 0.1 * np.trace(gram) / 5 * np.eye(5)
    found = as_matrix(solved(by("FOOF"), params, layer))
    np.testing.assert_allclose(found, GAMMA * np.linalg.solve(damped, gradient))


def test_kfac_of_a_model():
    """The block-diagonal form for a batch, with Fisher factors of sampled labels."""
    model = MLP(param_dtype=jnp.float64)
    loss_fn, params, (x, y) = regression(model)
    outputs = model.apply({"params": params}, x)
    noise = jax.random.normal(jax.random.key(9), outputs.shape)
    layers = loco.layers(loss_fn)(params, (x, y))
    capture = loco.value_and_grad(loss_fn, layers)
    _, grads, intermediates = capture(params, (x, y))
    _, _, sampled = capture(params, (x, outputs + noise))
    both = loco.add_sampled_cotangents(intermediates, sampled)
    tx = by("K-FAC")(layers)
    updates, _ = tx.update(grads, tx.init(params), params, intermediates=both)

    hidden = np.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
    towards = -2 * noise  # the gradient of one example's loss in the outputs
    back = towards @ params["second"]["kernel"].T * (1 - hidden**2)
    for name, inputs, cotangents in (("first", x, back), ("second", hidden, towards)):
        n, rows = len(inputs), np.c_[inputs, np.ones(len(inputs))]
        a, g = rows.T @ rows / n, cotangents.T @ cotangents / n
        a = a + 0.1 * np.trace(a) / len(a) * np.eye(len(a))
        g = g + 0.2 * np.trace(g) / len(g) * np.eye(len(g))
        gradient = as_matrix(grads[name])
        expected = GAMMA * np.linalg.solve(a, gradient) @ np.linalg.inv(g)
        np.testing.assert_allclose(as_matrix(updates[name]), expected, rtol=1e-8)


def test_exponentiated_gradient(drawn):
    params, layer, _, gradient = drawn
    positive = {name: jnp.abs(p) + 0.1 for name, p in params.items()}
    found = as_matrix(solved(by("Exponentiated gradient"), positive, layer))
    old = as_matrix(positive)
    expected = old - old * np.exp(-GAMMA * gradient / 4.0)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_signed_exponentiated_gradient(drawn):
    params, layer, _, gradient = drawn
    make = by("Signed exponentiated gradient")
    found = as_matrix(solved(make, params, layer))
    old = as_matrix(params)
    plus = (old + np.sqrt(old**2 + 0.3**2)) / 2
    minus = plus - old
    np.testing.assert_allclose(plus * minus, 0.3**2 / 4)
    factor = np.exp(-GAMMA * gradient / 4.0)
    expected = old - (plus * factor - minus / factor)
    np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_target_propagation(drawn):
    params, layer, x, _ = drawn
    f = layer.transfer.function
    goal = f(layer.preactivations + 0.3)
    theta = start = jnp.asarray(as_matrix(params))

    def loss(theta):
        return 0.5 * jnp.sum((f(x @ theta) - goal) ** 2)

    for _ in range(3):
        theta = theta - 0.1 * jax.grad(loss)(theta)
    layer = dataclasses.replace(layer, targets=goal)
    found = as_matrix(solved(by("Target propagation"), params, layer))
    np.testing.assert_allclose(found, start - theta, rtol=1e-8, atol=1e-12)


class Autoencoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        options = {"param_dtype": jnp.float64}
        code = nn.tanh(nn.Dense(3, name="encoder", **options)(x))
        return nn.Dense(x.shape[-1], name="decoder", **options)(code)


def test_difference_target_propagation_trains_an_autoencoder():
    """The encoder learns from its target alone; no gradient reaches it."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(32, 3)) @ rng.normal(size=(3, 6)) / 2)
    model = Autoencoder()
    params = model.init(jax.random.key(0), x)["params"]
    inverse = 0.5 * jnp.asarray(rng.normal(size=(6, 3)))

    def loss_fn(params, x):
        outputs = model.apply({"params": params}, x)
        return 0.5 * jnp.mean(jnp.sum((outputs - x) ** 2, axis=-1))

    def invert(inverse, outputs):
        return jnp.tanh(outputs @ inverse)

    def inverse_loss(inverse, code, outputs):
        return jnp.mean((invert(inverse, outputs) - code) ** 2)

    layers = loco.layers(loss_fn)(params, x)
    names = block("Target propagation", layers)
    tx = optax.chain(names["tx"], optax.scale(-0.1))
    state, start = tx.init(params), loss_fn(params, x)

    def targets_of(intermediates, inverse):
        code = jnp.tanh(intermediates.layers["encoder/kernel"].preactivations)
        outputs = intermediates.layers["decoder/kernel"].preactivations
        goal = outputs - 0.5 * (outputs - x)
        change = invert(inverse, goal) - invert(inverse, outputs)
        goals = {"encoder/kernel": code + change, "decoder/kernel": goal}
        return code, outputs, goals

    @jax.jit
    def step(params, state, inverse):
        _, grads, intermediates = loco.value_and_grad(loss_fn, layers)(params, x)
        code, outputs, targets = targets_of(intermediates, inverse)
        nothing = jax.tree.map(jnp.zeros_like, grads)
        updates, state = tx.update(
            nothing,
            state,
            params,
            intermediates=names["with_targets"](intermediates, targets),
        )
        inverse = inverse - 0.3 * jax.grad(inverse_loss)(inverse, code, outputs)
        return optax.apply_updates(params, updates), state, inverse

    for _ in range(300):
        moved, state, inverse = step(params, state, inverse)
        encoder_moves = not np.allclose(
            moved["encoder"]["kernel"], params["encoder"]["kernel"], atol=1e-9
        )
        params = moved
    assert encoder_moves
    assert loss_fn(params, x) < 0.02 * start  # 0.037 with a fixed encoder


@pytest.mark.parametrize("which", ["S", "M"])
def test_locoprop(which, drawn):
    params, layer, x, _ = drawn
    f = layer.transfer.function if which == "M" else lambda a: a
    goal = f(layer.preactivations) - GAMMA * layer.cotangents
    theta = start = as_matrix(params)
    moment, velocity = np.ones_like(theta), np.zeros_like(theta)
    for k in range(4):
        gradient = x.T @ (f(x @ theta) - goal)
        moment = 0.9 * moment + 0.1 * gradient**2
        rate = 1e-3 * max(1 - k / 4, 0.25)
        velocity = 0.999 * velocity + rate * gradient / np.sqrt(moment + 1e-5)
        theta = theta - velocity
    make = {"S": by("LocoProp-S"), "M": by("LocoProp-M")}[which]
    found = as_matrix(solved(make, params, layer))
    np.testing.assert_allclose(found, theta - start, rtol=1e-8)
