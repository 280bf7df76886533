"""Parameters and intermediates that do not fit are told by name."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import locoprop_optax as loco
from tests.helpers import regression


def found():
    loss_fn, params, batch = regression()
    layers = loco.layers(loss_fn)(params, batch)
    _, grads, intermediates = loco.value_and_grad(loss_fn, layers)(params, batch)
    return layers, params, grads, intermediates


def test_layers_are_split_off_and_put_back():
    layers, params, grads, _ = found()
    parts = layers.split(grads)
    assert set(parts) == {"first/kernel", "second/kernel"}
    doubled = jax.tree.map(lambda leaf: 2 * leaf, parts)
    merged = layers.merge(grads, doubled)
    chex.assert_trees_all_close(merged, jax.tree.map(lambda g: 2 * g, grads))
    chex.assert_trees_all_equal(layers.merge(params, {}), params)


def test_masked_layers_are_left_out():
    layers, params, *_ = found()
    masked = params | {
        "first": jax.tree.map(lambda _: optax.MaskedNode(), params["first"])
    }
    assert set(layers.split(masked)) == {"second/kernel"}
    assert set(layers.split(params | {"first": optax.MaskedNode()})) == {
        "second/kernel"
    }


BROKEN = {
    "renamed": (
        lambda params: {"other": params["first"], "second": params["second"]},
        "'first/kernel': the parameters hold no 'first/kernel'",
    ),
    "another shape": (
        lambda params: jax.tree.map(lambda leaf: leaf[..., 1:], params),
        r"'first/kernel' has the shape \(4, 4\), expected \(4, 5\)",
    ),
    "integers": (
        lambda params: jax.tree.map(lambda leaf: leaf.astype(int), params),
        "'first/kernel' has dtype int32, expected a floating-point dtype",
    ),
    "half masked": (
        lambda params: (
            params | {"first": params["first"] | {"kernel": optax.MaskedNode()}}
        ),
        "masks it, but not its bias 'first/bias'",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_parameters_that_are_not_those_of_the_layers(name):
    layers, params, *_ = found()
    change, message = BROKEN[name]
    with pytest.raises(ValueError, match=message):
        loco.scale_by_locoprop(layers).init(change(params))


def test_something_else_than_layers():
    with pytest.raises(TypeError, match=r"locoprop_optax.layers\(loss_fn\).*got float"):
        loco.locoprop(1e-3)


def test_records_of_other_layers():
    layers, params, grads, intermediates = found()
    tx = loco.scale_by_locoprop(layers)
    first = intermediates.layers["first/kernel"]
    for records, message in (
        ({"other": first}, "'other', which is none of the optimizer's layers"),
        ({"first/kernel": first}, "no record of layer 'second/kernel'"),
    ):
        with pytest.raises(ValueError, match=message):
            tx.update(
                grads,
                tx.init(params),
                params,
                intermediates=loco.Intermediates(records),
            )


def test_the_check_finds_a_record_that_is_wrong():
    layers, params, grads, intermediates = found()
    assert loco.check_intermediates(layers, params, grads, intermediates)
    records = dict(intermediates.layers)
    first = records["first/kernel"]
    records["first/kernel"] = jax.tree.map(lambda leaf: 1.01 * leaf, first)
    broken = loco.Intermediates(records)
    with pytest.raises(ValueError, match="'first/kernel': the gradient that follows"):
        loco.check_intermediates(layers, params, grads, broken)


def test_what_rounding_leaves_of_a_gradient_is_no_error():
    x = jax.random.normal(jax.random.key(0), (64, 5))
    x = jnp.concatenate([x, -x])
    params = {"w": jnp.ones((5, 3))}

    def loss_fn(params):
        return 1e4 * jnp.sum(x @ params["w"])

    layers = loco.layers(loss_fn)(params)
    _, grads, intermediates = loco.value_and_grad(loss_fn, layers)(params)
    nudged = jax.tree.map(lambda g: g + 1e-3, grads)
    loco.check_intermediates(layers, params, nudged, intermediates)
    wrong = jax.tree.map(lambda g: g + 1e2, grads)
    with pytest.raises(ValueError, match="'w': the gradient that follows"):
        loco.check_intermediates(layers, params, wrong, intermediates)
