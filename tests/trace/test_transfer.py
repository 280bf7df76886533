"""Which transfer function is found behind a layer, or given."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import locoprop_optax as loco
from tests.helpers import capture, regression, slow


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

    captured = capture(loss_fn)
    _, _, intermediates = (jax.jit(captured) if jit else captured)(params, x, y)
    assert intermediates.layers["params/kernel"].transfer.name == expected


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
    [
        (name, f) if f is functions[-1] else slow(name, f)
        for name, functions in ACTIVATIONS.items()
        for f in functions
    ],
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

    _, _, intermediates = capture(loss_fn)(params, x)
    assert intermediates.layers["hidden/kernel"].transfer.name == expected


def test_transfers_override_what_is_found():
    loss_fn, params, batch = regression()
    overrides = {"f*": "relu", "second/kernel": jnp.sin}
    layers = loco.layers(loss_fn, transfers=overrides)(params, batch)
    _, _, intermediates = loco.value_and_grad(loss_fn, layers)(params, batch)
    names = {path: la.transfer.name for path, la in intermediates.layers.items()}
    assert names == {"first/kernel": "relu", "second/kernel": "sin"}
    assert "given in transfers=" in str(layers)


def test_unknown_transfer_lists_the_known_ones():
    loss_fn, *_ = regression()
    with pytest.raises(ValueError, match=r"'thanh'. Known names: .*identity, .*tanh"):
        loco.layers(loss_fn, transfers={"first/kernel": "thanh"})


def test_transfer_for_no_layer():
    loss_fn, params, batch = regression()
    find = loco.layers(loss_fn, transfers={"frist/*": "tanh"})
    with pytest.raises(
        ValueError,
        match=r"'frist/\*'.*fits no layer.*'first/kernel', 'second/kernel'",
    ):
        find(params, batch)
