"""Lookups, elementwise factors and summands are layers, whatever their form."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import locoprop_optax as loco
from tests.helpers import kfac, update_of
from tests.trace.checks import assert_captured

X = jax.random.normal(jax.random.key(0), (6, 5))
IMAGES = jax.random.normal(jax.random.key(1), (2, 3, 4, 5))
INDICES = jnp.asarray([[0, 3, 3], [1, 0, 6]])


def drawn(*shape):
    return jax.random.normal(jax.random.key(2), shape)


def of_table(look_up):
    return lambda p: jnp.sum(jnp.sin(look_up(p["w"])))


LOOKUPS = {
    "take": (of_table(lambda w: jnp.take(w, INDICES, axis=0)), (7, 5), (6, 7, 5)),
    "index": (of_table(lambda w: w[INDICES]), (7, 5), (6, 7, 5)),
    "other axis": (of_table(lambda w: w[:, INDICES]), (5, 7), (6, 7, 5)),
    "clips": (
        of_table(lambda w: jnp.take(w, INDICES + 3, axis=0, mode="clip")),
        (7, 5),
        (6, 7, 5),
    ),
    "drops": (
        of_table(lambda w: w.at[INDICES + 3].get(mode="fill", fill_value=0)),
        (7, 5),
        (6, 7, 5),
    ),
    "rows of matrices": (of_table(lambda w: w[INDICES]), (7, 2, 3), (6, 7, 6)),
    "numbers": (of_table(lambda w: w[INDICES]), (7,), (6, 7, 1)),
    "examples by vmap": (
        of_table(lambda w: jax.vmap(lambda i: w[i])(INDICES)),
        (7, 5),
        (6, 7, 5),
    ),
    "embedding": (
        lambda p: jnp.sum(
            jnp.sin(nn.Embed(7, 5).apply({"params": {"embedding": p["w"]}}, INDICES))
        ),
        (7, 5),
        (6, 7, 5),
    ),
}
ADDED = {
    "to all rows": (lambda p: jnp.sum(jnp.sin(X + p["w"])), (5,), (6, 1, 5)),
    "one number": (lambda p: jnp.sum(jnp.sin(X + p["w"])), (), (30, 1, 1)),
    "positions": (lambda p: jnp.sum(jnp.sin(IMAGES + p["w"])), (4, 5), (24, 4, 5)),
    "with axes of one": (
        lambda p: jnp.sum(jnp.sin(IMAGES + p["w"])),
        (1, 3, 1, 5),
        (24, 3, 5),
    ),
    "channels first": (
        lambda p: jnp.sum(jnp.sin(IMAGES + p["w"])),
        (3, 1, 1),
        (40, 1, 3),
    ),
    "reshaped": (
        lambda p: jnp.sum(jnp.sin(IMAGES + p["w"].reshape(4, 5))),
        (20,),
        (24, 4, 5),
    ),
    "the first rows": (
        lambda p: jnp.sum(jnp.sin(IMAGES + p["w"][:4])),
        (9, 5),
        (4, 9, 5),
    ),
    "every other": (
        lambda p: jnp.sum(jnp.sin(IMAGES + p["w"][1::2, :5])),
        (8, 7),
        (20, 56, 1),
    ),
}
FACTORS = {
    "of all rows": (lambda p: jnp.sum(jnp.sin(X * p["w"])), (5,), (6, 1, 5)),
    "one number": (lambda p: jnp.sum(jnp.sin(X * p["w"])), (), (30, 1, 1)),
    "before a number": (
        lambda p: jnp.sum(jnp.sin(p["w"] * jax.lax.rsqrt(1 + X[:, :1] ** 2))),
        (5,),
        (6, 1, 5),
    ),
    "of positions": (
        lambda p: jnp.sum(jnp.sin(IMAGES * p["w"])),
        (1, 3, 1, 5),
        (8, 1, 15),
    ),
}
CASES = {
    **{f"lookup, {name}": ("lookup", *case) for name, case in LOOKUPS.items()},
    **{f"summand, {name}": ("summand", *case) for name, case in ADDED.items()},
    **{f"factor, {name}": ("factor", *case) for name, case in FACTORS.items()},
}


@pytest.mark.parametrize("name", CASES)
def test_diagonal_layers(name):
    kind, loss_fn, shape, sizes = CASES[name]
    layers, _ = assert_captured(loss_fn, {"w": drawn(*shape)})
    (layer,) = layers
    assert str(layer.linear_map) == kind
    assert layer.calls == (sizes,)
    assert layers.others == ()


def normalized(x, p):
    x = x - x.mean(-1, keepdims=True)
    x = x * (p["scale"] * jax.lax.rsqrt(1e-6 + jnp.square(x).mean(-1, keepdims=True)))
    return x + p["bias"]


@pytest.mark.parametrize("axis", [0, 1])
def test_norms_in_a_scan_are_stacks(axis):
    params = {"scale": 1 + drawn(3, 5), "bias": drawn(3, 5)}
    params = jax.tree.map(lambda p: jnp.moveaxis(p, 0, axis), params)

    def loss_fn(params):
        stacked = jax.tree.map(lambda p: jnp.moveaxis(p, axis, 0), params)
        turn = lambda x, p: (jnp.sin(normalized(x, p)), None)  # noqa: E731
        return jnp.sum(jax.lax.scan(turn, X, stacked)[0])

    layers, _ = assert_captured(loss_fn, params)
    assert {layer.stack for layer in layers} == {(3,)}
    assert {str(layer.linear_map) for layer in layers} == {"factor", "summand"}


def test_norms_of_an_ensemble():
    params = {"scale": 1 + drawn(3, 5), "bias": drawn(3, 5)}

    def loss_fn(params):
        return jnp.sum(jnp.sin(jax.vmap(normalized, (None, 0))(X, params)))

    layers, _ = assert_captured(loss_fn, params)
    found = {layer.path: layer.calls[0] for layer in layers}
    assert found == {"scale": (6, 1, 15), "bias": (18, 3, 5)}


def test_a_table_that_is_also_a_kernel_is_a_product():
    def loss_fn(params):
        return jnp.sum(jnp.sin(jnp.tanh(params["w"][INDICES]) @ params["w"].T))

    layers, _ = assert_captured(loss_fn, {"w": drawn(7, 5)})
    assert [str(layer.linear_map) for layer in layers] == ["product"]


def test_a_bias_that_is_also_added_elsewhere_belongs_to_its_product():
    def loss_fn(params):
        y = X @ params["w"] + params["b"]
        return jnp.sum(jnp.sin(y) + jnp.cos(X[:, :3] + params["b"]))

    layers, _ = assert_captured(loss_fn, {"w": drawn(5, 3), "b": drawn(3)})
    assert [(layer.path, layer.bias) for layer in layers] == [("w", "b")]


def test_what_is_added_to_parameters_alone_is_no_layer():
    def loss_fn(params):
        return jnp.sum((X @ params["w"]) ** 2) + jnp.sum(
            jnp.exp(params["a"] + 2 * params["b"])
        )

    params = {"w": drawn(5, 3), "a": drawn(4), "b": drawn(4)}
    layers = loco.layers(loss_fn)(params)
    assert [layer.path for layer in layers] == ["w"]
    assert dict(layers.others) == {"a": "added", "b": "multiplied elementwise"}


def test_a_lookup_is_solved_as_the_product_with_one_hot_rows(float64):
    table, head = drawn(7, 5), drawn(5, 2)

    def update(read):
        def loss_fn(params):
            return jnp.mean((jnp.tanh(read(params["w"])) @ head) ** 2)

        make, key = partial(kfac, damping=0.1), jax.random.key(0)
        return update_of(make, loss_fn, {"w": table}, key=key)["w"]

    one_hot = jax.nn.one_hot(INDICES, 7)
    looked_up, multiplied = update(lambda w: w[INDICES]), update(lambda w: one_hot @ w)
    np.testing.assert_allclose(looked_up, multiplied, rtol=1e-9, atol=1e-12)
    assert np.abs(looked_up[jnp.asarray([2, 4, 5])]).max() == 0, "never read"


def test_a_factor_is_solved_entry_by_entry(float64):
    target = drawn(6, 5)

    def loss_fn(params):
        return 0.5 * jnp.mean(jnp.sum((X * params["w"] - target) ** 2, axis=-1))

    params = {"w": drawn(5)}
    updates = update_of(kfac, loss_fn, params)
    x, y = X.astype(float), target
    np.testing.assert_allclose(
        params["w"] - updates["w"], (x * y).sum(0) / (x**2).sum(0), rtol=1e-9
    )
