"""Losses of Linen models, and their training state."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import locoprop_optax as loco
from tests.helpers import MLP, capture, local_steps, regression


def test_loss_and_gradients_equal_jax():
    loss_fn, params, batch = regression()
    expected = jax.jit(jax.value_and_grad(loss_fn))(params, batch)
    layers = loco.layers(loss_fn)(params, batch)
    loss, grads, _ = jax.jit(loco.value_and_grad(loss_fn, layers))(params, batch)
    for found, wanted in zip(
        jax.tree.leaves((loss, grads)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_max_ulp(found, wanted, maxulp=4)
    assert jax.tree.structure(grads) == jax.tree.structure(params)


def test_intermediates_by_hand():
    loss_fn, params, (x, y) = regression()
    _, grads, intermediates = capture(loss_fn)(params, (x, y))
    first, second = (intermediates.layers[f"{n}/kernel"] for n in ("first", "second"))
    a1 = x @ params["first"]["kernel"] + params["first"]["bias"]
    a2 = jnp.tanh(a1) @ params["second"]["kernel"] + params["second"]["bias"]
    g2 = 2 * (a2 - y) / len(x)
    g1 = (g2 @ params["second"]["kernel"].T) * (1 - jnp.tanh(a1) ** 2)
    for layer, expected in ((first, (x, a1, g1)), (second, (jnp.tanh(a1), a2, g2))):
        found = (layer.inputs, layer.preactivations, layer.cotangents)
        for array, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(array, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(first.gradient["kernel"], grads["first"]["kernel"])
    assert (first.transfer.name, second.transfer.name) == ("tanh", "identity")


def test_has_aux():
    loss_fn, params, batch = regression()

    def with_aux(params, batch):
        return loss_fn(params, batch), {"count": jnp.ones(3)}

    layers = loco.layers(with_aux, has_aux=True)(params, batch)
    differentiate = loco.value_and_grad(with_aux, layers, has_aux=True)
    (loss, aux), _, intermediates = differentiate(params, batch)
    assert loss == loss_fn(params, batch)
    assert aux["count"].shape == (3,)
    assert set(intermediates.layers) == {"first/kernel", "second/kernel"}


def test_static_arguments_pass_through():
    model = MLP()

    def loss_fn(params, x, *, train, scale):
        assert train is True
        return jnp.sum(scale(model.apply({"params": params}, x)))

    x = jnp.ones((2, 4))
    params = model.init(jax.random.key(0), x)["params"]
    loss, *_ = capture(loss_fn)(params, x, train=True, scale=abs)
    assert loss > 0


def test_penalty_over_all_leaves_keeps_its_value_and_gradient():
    loss_fn, params, batch = regression()

    def penalized(params, batch):
        return loss_fn(params, batch) + sum(
            jnp.sum(p**2) for p in jax.tree.leaves(params)
        )

    expected = jax.value_and_grad(penalized)(params, batch)
    loss, grads, intermediates = capture(penalized)(params, batch)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), grads, expected[1]
    )
    _, _, plain = capture(loss_fn)(params, batch)
    np.testing.assert_allclose(
        intermediates.layers["first/kernel"].cotangents,
        plain.layers["first/kernel"].cotangents,
    )


def test_apply_that_was_jitted_and_called_before():
    model = MLP()
    x = jnp.ones((2, 4))
    variables = model.init(jax.random.key(0), x)
    apply = jax.jit(model.apply)
    apply(variables, x)

    def loss_fn(variables, x):
        return jnp.sum(apply(variables, x) ** 2)

    jax.jit(jax.grad(loss_fn))(variables, x)
    _, _, intermediates = capture(loss_fn)(variables, x)
    assert set(intermediates.layers) == {
        "params/first/kernel",
        "params/second/kernel",
    }
    assert intermediates.layers["params/first/kernel"].transfer.name == "tanh"


def test_several_models_in_one_loss():
    encoder, decoder = MLP(out=2), MLP(out=4)
    x = jnp.ones((3, 4))
    params = {
        "encoder": encoder.init(jax.random.key(0), x)["params"],
        "decoder": decoder.init(jax.random.key(1), x[:, :2])["params"],
    }

    def loss_fn(params, x):
        code = encoder.apply({"params": params["encoder"]}, x)
        return jnp.sum((decoder.apply({"params": params["decoder"]}, code) - x) ** 2)

    _, _, intermediates = capture(loss_fn)(params, x)
    assert set(intermediates.layers) == {
        f"{model}/{layer}/kernel"
        for model in ("encoder", "decoder")
        for layer in ("first", "second")
    }


def test_excluded_layers_are_not_captured_and_shown_so():
    loss_fn, params, batch = regression()
    layers = loco.layers(loss_fn, exclude="first/*")(params, batch)
    _, _, intermediates = loco.value_and_grad(loss_fn, layers)(params, batch)
    assert set(intermediates.layers) == {"second/kernel"}
    shown = [line.split() for line in str(layers).splitlines()]
    assert ["first/kernel", "excluded"] in shown
    assert ["first/bias", "excluded"] in shown


def test_integer_inputs_are_recorded_as_the_layer_takes_them():
    loss_fn, params, (x, y) = regression()
    whole = (10 * x).astype(int)
    _, grads, intermediates = capture(loss_fn)(params, (whole, y))
    np.testing.assert_array_equal(
        intermediates.layers["first/kernel"].inputs, whole.astype(jnp.float32)
    )
    expected = jax.grad(loss_fn)(params, (whole, y))
    chex.assert_trees_all_close(grads, expected, rtol=1e-6)


def test_a_model_of_one_example_under_vmap():
    model = MLP()
    x = jax.random.normal(jax.random.key(0), (5, 4))
    params = model.init(jax.random.key(1), x)["params"]

    def loss_fn(params, x):
        return jnp.sum(model.apply({"params": params}, x) ** 2)

    def one_by_one(params, x):
        return jnp.sum(jax.vmap(loss_fn, (None, 0))(params, x))

    _, grads, intermediates = capture(one_by_one)(params, x)
    _, expected, together = capture(loss_fn)(params, x)
    chex.assert_trees_all_close(grads, expected, rtol=1e-5)
    chex.assert_trees_all_close(intermediates.layers, together.layers, rtol=1e-5)


def test_train_state_takes_intermediates():
    loss_fn, params, batch = regression()
    layers = loco.layers(loss_fn)(params, batch)
    capture = loco.value_and_grad(loss_fn, layers)
    state = loco.linen.TrainState.create(
        apply_fn=None,
        params=params,
        tx=local_steps(layers),
    )

    @jax.jit
    def step(state, batch):
        loss, grads, intermediates = capture(state.params, batch)
        return state.apply_gradients(grads=grads, intermediates=intermediates), loss

    first = None
    for _ in range(20):
        state, loss = step(state, batch)
        first = loss if first is None else first
    assert int(state.step) == 20
    assert loss < first
    grads = jax.grad(loss_fn)(params, batch)
    with pytest.raises(TypeError, match="needs `intermediates=`"):
        state.apply_gradients(grads=grads)


def test_train_state_of_another_optimizer():
    loss_fn, params, batch = regression()
    state = loco.linen.TrainState.create(
        apply_fn=None, params=params, tx=optax.sgd(0.1)
    )
    grads = jax.grad(loss_fn)(params, batch)
    assert int(state.apply_gradients(grads=grads).step) == 1
