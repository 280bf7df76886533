import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import locoprop_optax as loco
from tests.helpers import MLP, regression


def test_loss_and_gradients_equal_jax():
    loss_fn, params, batch = regression()
    expected = jax.jit(jax.value_and_grad(loss_fn))(params, batch)
    loss, grads, _ = jax.jit(loco.linen.value_and_grad(loss_fn))(params, batch)
    for found, wanted in zip(
        jax.tree.leaves((loss, grads)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_max_ulp(found, wanted, maxulp=4)
    assert jax.tree.structure(grads) == jax.tree.structure(params)


def test_intermediates_by_hand():
    loss_fn, params, (x, y) = regression()
    _, grads, intermediates = loco.linen.value_and_grad(loss_fn)(params, (x, y))
    first, second = (intermediates.layers[name] for name in ("first", "second"))
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

    (loss, aux), _, intermediates = loco.linen.value_and_grad(with_aux, has_aux=True)(
        params, batch
    )
    assert loss == loss_fn(params, batch)
    assert aux["count"].shape == (3,)
    assert set(intermediates.layers) == {"first", "second"}


def test_static_arguments_pass_through():
    model = MLP()

    def loss_fn(params, x, *, train, scale):
        assert train is True
        return jnp.sum(scale(model.apply({"params": params}, x)))

    x = jnp.ones((2, 4))
    params = model.init(jax.random.key(0), x)["params"]
    loss, *_ = loco.linen.value_and_grad(loss_fn)(params, x, train=True, scale=abs)
    assert loss > 0


def test_penalty_over_all_leaves_keeps_its_value_and_gradient():
    loss_fn, params, batch = regression()

    def penalized(params, batch):
        return loss_fn(params, batch) + sum(
            jnp.sum(p**2) for p in jax.tree.leaves(params)
        )

    expected = jax.value_and_grad(penalized)(params, batch)
    loss, grads, intermediates = loco.linen.value_and_grad(penalized)(params, batch)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), grads, expected[1]
    )
    _, _, plain = loco.linen.value_and_grad(loss_fn)(params, batch)
    np.testing.assert_allclose(
        intermediates.layers["first"].cotangents, plain.layers["first"].cotangents
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
    _, _, intermediates = loco.linen.value_and_grad(loss_fn)(variables, x)
    assert set(intermediates.layers) == {"params/first", "params/second"}
    assert intermediates.layers["params/first"].transfer.name == "tanh"


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

    _, _, intermediates = loco.linen.value_and_grad(loss_fn)(params, x)
    assert set(intermediates.layers) == {
        f"{model}/{layer}"
        for model in ("encoder", "decoder")
        for layer in ("first", "second")
    }


def final_losses():
    def by_hand_sigmoid(a, y):
        p = jax.nn.sigmoid(a)
        return -jnp.mean(y * jnp.log(p) + (1 - y) * jnp.log(1 - p))

    def by_hand_softmax(a, y):
        return -jnp.mean(jnp.sum(y * jax.nn.log_softmax(a), axis=-1))

    def integer_labels(a, y):
        labels = jnp.argmax(y, axis=-1)
        return optax.softmax_cross_entropy_with_integer_labels(a, labels).mean()

    def stable_sigmoid(a, y):
        terms = jnp.maximum(a, 0) - a * y + jnp.log1p(jnp.exp(-jnp.abs(a)))
        return jnp.mean(terms)

    def one_hot_softmax(a, y):
        one_hot = jax.nn.one_hot(jnp.argmax(y, axis=-1), y.shape[-1])
        return -jnp.sum(jax.nn.log_softmax(a) * one_hot) / len(a)

    return {
        "sigmoid": [
            lambda a, y: optax.sigmoid_binary_cross_entropy(a, y).sum(-1).mean(),
            by_hand_sigmoid,
            stable_sigmoid,
            lambda a, y: jnp.mean(jax.nn.softplus(a) - a * y),
        ],
        "softmax": [
            lambda a, y: optax.softmax_cross_entropy(a, y).mean(),
            by_hand_softmax,
            integer_labels,
            one_hot_softmax,
        ],
        "identity": [
            lambda a, y: jnp.mean((a - y) ** 2),
            lambda a, y: optax.l2_loss(a, y).sum(),
            lambda a, y: jnp.mean(jnp.sin(a) * y),
            lambda a, y: jnp.sum(a),
        ],
        "tanh": [lambda a, y: jnp.mean((jnp.tanh(a) - y) ** 2)],
    }


@pytest.mark.parametrize(
    ("expected", "loss"),
    [(name, loss) for name, losses in final_losses().items() for loss in losses],
)
@pytest.mark.parametrize("jit", [False, True])
def test_transfer_of_the_last_layer(expected, loss, jit):
    model = nn.Dense(3)
    x = jax.random.normal(jax.random.key(0), (4, 2))
    y = jax.nn.softmax(jax.random.normal(jax.random.key(1), (4, 3)))
    params = model.init(jax.random.key(2), x)

    def loss_fn(params, x, y):
        return loss(model.apply(params, x), y)

    capture = loco.linen.value_and_grad(loss_fn)
    _, _, intermediates = (jax.jit(capture) if jit else capture)(params, x, y)
    assert intermediates.layers["params"].transfer.name == expected


ACTIVATIONS = {
    "relu": [
        nn.relu,
        jax.jit(nn.relu),
        lambda a: jnp.maximum(a, 0),
        lambda a: jnp.where(a > 0, a, 0.0),
        lambda a: a * (a > 0),
        lambda a: nn.relu(a.reshape(2, 2, 3)).reshape(4, 3),
        lambda a: nn.relu(a.astype(jnp.bfloat16)).astype(jnp.float32),
        jax.checkpoint(nn.relu),
        lambda a: nn.relu(a) * jnp.arange(3),
    ],
    "leaky_relu": [nn.leaky_relu, lambda a: jnp.maximum(a, 0.01 * a)],
    "leaky_relu(0.3)": [lambda a: nn.leaky_relu(a, 0.3)],
    "softplus": [nn.softplus, lambda a: jnp.log(1 + jnp.exp(a))],
    "elu": [nn.elu],
    "elu(0.5)": [lambda a: nn.elu(a, 0.5)],
    "selu": [nn.selu],
    "gelu": [lambda a: nn.gelu(a, approximate=False)],
    "gelu_tanh": [nn.gelu],
    "silu": [nn.silu, lambda a: a * nn.sigmoid(a)],
    "hard_tanh": [nn.hard_tanh, lambda a: jnp.clip(a, -1, 1)],
    "softsign": [nn.soft_sign],
    "relu6": [nn.relu6],
    "arctan": [jnp.arctan],
    "exp": [jnp.exp],
    "tanh": [nn.tanh, lambda a: 2 * nn.sigmoid(2 * a) - 1],
    "sigmoid": [nn.sigmoid, lambda a: 1 / (1 + jnp.exp(-a))],
    "identity": [
        lambda a: a + nn.relu(a),
        lambda a: a / jnp.std(a, axis=-1, keepdims=True),
        lambda a: nn.tanh(a) + nn.relu(a),
        lambda a: jnp.sin(a),
        lambda a: nn.tanh(a * jnp.arange(3)),
        lambda a: a,
    ],
}


@pytest.mark.parametrize(
    ("expected", "activation"),
    [(name, f) for name, functions in ACTIVATIONS.items() for f in functions],
)
def test_transfer_of_a_hidden_layer(expected, activation):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name="out")(activation(nn.Dense(3, name="hidden")(x)))

    model, x = Model(), jnp.ones((4, 2))
    params = model.init(jax.random.key(0), x)["params"]

    def loss_fn(params, x):
        return jnp.sum(model.apply({"params": params}, x) ** 2)

    _, _, intermediates = loco.linen.value_and_grad(loss_fn)(params, x)
    assert intermediates.layers["hidden"].transfer.name == expected


def test_transfers_override_what_is_found():
    loss_fn, params, batch = regression()
    overrides = {"f*": "relu", "second": jnp.sin}
    capture = loco.linen.value_and_grad(loss_fn, transfers=overrides)
    _, _, intermediates = capture(params, batch)
    names = {path: la.transfer.name for path, la in intermediates.layers.items()}
    assert names == {"first": "relu", "second": "sin"}
    shown = loco.linen.tabulate(loss_fn, transfers=overrides)(params, batch)
    assert "given in transfers=" in shown


def test_excluded_layers_are_not_captured_and_shown_so():
    loss_fn, params, batch = regression()
    capture = loco.linen.value_and_grad(loss_fn, exclude="first")
    assert set(capture(params, batch)[2].layers) == {"second"}
    shown = loco.linen.tabulate(loss_fn, exclude="first")(params, batch)
    assert shown.splitlines()[1].split() == ["first", "excluded"]


def test_unknown_transfer_lists_the_known_ones():
    loss_fn, *_ = regression()
    with pytest.raises(ValueError, match=r"'thanh'. Known names: .*identity, .*tanh"):
        loco.linen.value_and_grad(loss_fn, transfers={"first": "thanh"})


def test_transfer_for_no_layer():
    loss_fn, params, batch = regression()
    capture = loco.linen.value_and_grad(loss_fn, transfers={"frist": "tanh"})
    with pytest.raises(
        ValueError, match=r"'frist'.*fits no captured layer.*'first', 'second'"
    ):
        capture(params, batch)


def test_integer_inputs():
    loss_fn, params, (x, y) = regression()
    with pytest.raises(ValueError, match=r"'first': its inputs have dtype int32"):
        loco.linen.value_and_grad(loss_fn)(params, (x.astype(int), y))


def test_parameters_broadcast_across_a_vmap():
    model = MLP()
    x = jnp.ones((5, 4))
    params = model.init(jax.random.key(0), x)["params"]

    def loss_fn(params, x):
        return jnp.sum(jax.vmap(lambda row: model.apply({"params": params}, row))(x))

    with pytest.raises(ValueError, match=r"'first'.*broadcast across a vmap.*exclude="):
        loco.linen.value_and_grad(loss_fn)(params, x)
