"""Layers are found in whatever structure a model has, by whichever library."""

from collections import defaultdict
from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict

import locoprop_optax as loco
from tests.helpers import slow
from tests.trace.checks import assert_captured, assert_close

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (9, 4))
SEQUENCES = jax.random.normal(KEY, (3, 5, 4))
TOKENS = jax.random.randint(KEY, (3, 7), 0, 11)
IMAGES = jax.random.normal(KEY, (5, 8, 8, 3))
MLP = nn.Sequential([nn.Dense(7), nn.tanh, nn.Dense(2)])
CNN = nn.Sequential(
    [nn.Conv(4, (3, 3), strides=2), nn.relu, lambda z: z.mean((-3, -2)), nn.Dense(2)]
)


def mean_square(model, x):
    """The loss of a Linen model, and its parameters."""
    params = model.init(KEY, x)["params"]
    return lambda params: jnp.mean(model.apply({"params": params}, x) ** 2), params


def of_members(model, x):
    """The parameters of three members of an ensemble, stacked in front."""
    init = lambda key: model.init(key, x)["params"]  # noqa: E731
    return jax.vmap(init)(jax.random.split(KEY, 3))


def loss_of(model, x, params):
    return jnp.mean(model.apply({"params": params}, x) ** 2)


def paths(layers):
    return {layer.path for layer in layers}


def transfers(layers):
    return {layer.path: layer.transfer.name for layer in layers}


CELLS = [nn.GRUCell, *map(slow, (nn.LSTMCell, nn.SimpleCell, nn.MGUCell))]


@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_cells(cell):
    """A weight that a scan shares is one layer with a row for each turn."""
    loss_fn, params = mean_square(nn.RNN(cell(6)), SEQUENCES)
    layers, intermediates = assert_captured(loss_fn, params)
    kernels = [p for p in loco._records.paths.paths_of(params) if "kernel" in p]
    assert paths(layers) == set(kernels)
    assert {layer.calls[0].rows for layer in layers} == {15}
    for layer in intermediates.layers.values():
        assert layer.stack_dims == 0


def test_nnx_recurrent_cell():
    model = nnx.RNN(nnx.LSTMCell(4, 6, rngs=nnx.Rngs(0)))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss_fn(params):
        return jnp.mean(nnx.merge(graphdef, params, rest, copy=True)(SEQUENCES) ** 2)

    layers, _ = assert_captured(loss_fn, params)
    assert len(layers.layers) == 8


@pytest.mark.parametrize(("model", "x"), [(MLP, X), slow(CNN, IMAGES)])
def test_a_model_of_one_example_under_vmap(model, x):
    _, params = mean_square(model, x)

    def one(params, x):
        return jnp.mean(model.apply({"params": params}, x) ** 2)

    def mapped(params):
        return jnp.mean(jax.vmap(partial(one, params))(x))

    layers, intermediates = assert_captured(mapped, params)
    whole, expected = assert_captured(lambda params: one(params, x), params)
    assert transfers(layers) == transfers(whole)
    for path, layer in intermediates.layers.items():
        assert_close(layer.cotangents, expected.layers[path].cotangents)


@pytest.mark.parametrize(
    ("model", "x", "axis"),
    [
        (MLP, X, 1),
        slow(MLP, X, 0),
        slow(CNN, IMAGES, -1),
        slow(MLP, X, -1),
        slow(CNN, IMAGES, 0),
        slow(CNN, IMAGES, 1),
    ],
)
def test_ensembles_by_vmap_on_any_axis(model, x, axis):
    members = jax.tree.map(
        lambda p: jnp.moveaxis(p, 0, axis if p.ndim > 1 else 0), of_members(model, x)
    )
    axes = jax.tree.map(lambda p: axis if p.ndim > 1 else 0, members)

    def loss_fn(members):
        return jnp.sum(jax.vmap(partial(loss_of, model, x), in_axes=(axes,))(members))

    layers, _ = assert_captured(loss_fn, members)
    assert len([la for la in layers if not la.linear_map.is_diagonal]) == 2


class Block(nn.Module):
    policy: str | None = None

    @nn.compact
    def __call__(self, x, _=None):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2)(h, h)
        return x + nn.Dense(4)(nn.gelu(nn.Dense(8)(x))), None


@pytest.mark.parametrize(
    ("axis", "policy"),
    [
        (1, "nothing_saveable"),
        slow(0, "dots_saveable"),
        slow(0, None),
        slow(0, "nothing_saveable"),
        slow(1, None),
        slow(1, "dots_saveable"),
    ],
)
def test_stacks_on_any_axis_rematerialized_by_any_policy(axis, policy):
    saves = policy and getattr(jax.checkpoint_policies, policy)
    block = nn.remat(Block, policy=saves)
    stack = nn.scan(
        block, variable_axes={"params": axis}, split_rngs={"params": True}, length=3
    )

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return stack(name="stack")(x, None)[0]

    layers, intermediates = assert_captured(*mean_square(Model(), SEQUENCES))
    assert len(layers.layers) == 8
    assert {layer.stack for layer in layers} == {(3,)}
    assert {layer.stack_dims for layer in intermediates.layers.values()} == {1}


def test_a_tied_softmax_over_an_embedding():
    class LanguageModel(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(11, 4, name="embed")
            return embed.attend(nn.tanh(nn.Dense(4, name="dense")(embed(tokens))))

    model = LanguageModel()
    params = model.init(KEY, TOKENS)["params"]

    def loss_fn(params):
        logits = model.apply({"params": params}, TOKENS)
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS)
        return cross_entropy.mean()

    layers, intermediates = assert_captured(loss_fn, params)
    assert transfers(layers) == {"dense/kernel": "tanh", "embed/embedding": "softmax"}
    tied = intermediates.layers["embed/embedding"]
    assert tied.elsewhere is not None  # what the lookup has in the gradient
    assert float(jnp.linalg.norm(tied.elsewhere["kernel"])) > 0


def test_dense_layers_of_ones_own():
    """As in T5X, whose kernels are stored flat, and Gemma, whose weights are `w`."""

    class DenseGeneral(nn.Module):
        features: tuple[int, ...]

        @nn.compact
        def __call__(self, x):
            shape = (x.shape[-1], *self.features)
            flat = (shape[0], int(np.prod(self.features)))
            kernel = self.param("kernel", nn.initializers.lecun_normal(), flat)
            kernel = jnp.asarray(kernel, jnp.float32).reshape(shape)
            bias = self.param("bias", nn.initializers.normal(), flat[1:])
            product = jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
            return product + bias.reshape(self.features)

    class Einsum(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.lecun_normal(), (2, 3, 4))
            return jnp.einsum("bhk,hkd->bd", x, w)

    model = nn.Sequential([DenseGeneral((2, 3)), nn.tanh, Einsum()])
    layers, intermediates = assert_captured(*mean_square(model, X))
    assert transfers(layers) == {"layers_0/kernel": "tanh", "layers_2/w": "identity"}
    assert intermediates.layers["layers_0/kernel"].gradient["kernel"].shape == (4, 2, 3)
    assert layers.layers[0].bias == "layers_0/bias"


def test_plain_jax():
    params = {
        "w1": jax.random.normal(KEY, (5, 4)),
        "b1": jnp.ones(5),
        "w2": jax.random.normal(KEY, (2, 5)),
        "v": jnp.ones(2),
    }

    def one(params, x):
        hidden = jnp.tanh(params["w1"] @ x + params["b1"])
        return (params["v"] @ (params["w2"] @ hidden)) ** 2

    def loss_fn(params):
        return jnp.mean(jax.vmap(partial(one, params))(X))

    layers, _ = assert_captured(loss_fn, params)
    assert [(layer.path, layer.bias) for layer in layers] == [
        ("w1", "b1"),
        ("w2", None),
        ("v", None),
    ]


def test_low_rank_adaptation():
    model = nnx.Sequential(
        nnx.Linear(4, 6, rngs=nnx.Rngs(0)),
        nnx.tanh,
        nnx.LoRALinear(6, 3, lora_rank=2, rngs=nnx.Rngs(1)),
    )
    graphdef, params = nnx.split(model)
    layers, _ = assert_captured(
        lambda params: jnp.mean(nnx.merge(graphdef, params)(X) ** 2), params
    )
    assert len(layers.layers) == 4


def test_a_vmapped_critic():
    class Critics(nn.Module):
        @nn.compact
        def __call__(self, x):
            critic = nn.vmap(
                lambda _, x: nn.Dense(1)(nn.relu(nn.Dense(5)(x))),
                in_axes=None,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                axis_size=2,
            )
            return critic(self, x)

    layers, _ = assert_captured(*mean_square(Critics(), X))
    assert len(layers.layers) == 2


@pytest.mark.parametrize("kind", ["gradient", "laplacian", "jvp", "boundary"])
def test_networks_differentiated_in_their_inputs(kind):
    """The products of the derivatives have their share in the gradient as well."""
    _, params = mean_square(MLP, X)

    def residual(params, x):
        def u(x):
            return MLP.apply({"params": params}, x)[0]

        if kind == "gradient":
            return jnp.sum(jax.grad(u)(x) ** 2) + (u(x) - 1) ** 2
        if kind == "laplacian":
            return (jnp.trace(jax.hessian(u)(x)) + u(x)) ** 2
        if kind == "boundary":
            return jnp.trace(jax.hessian(u)(x)) ** 2 + u(x[::-1]) ** 2
        return jax.jvp(u, (x,), (jnp.ones_like(x),))[1] ** 2

    def loss_fn(params):
        return jnp.mean(jax.vmap(partial(residual, params))(X))

    layers, _ = assert_captured(loss_fn, params)
    kinds = {layer.path: str(layer.linear_map) for layer in layers}
    assert {path for path, kind in kinds.items() if kind == "product"} == {
        "layers_0/kernel",
        "layers_2/kernel",
    }
    biases = {layer.bias for layer in layers} | {*kinds}
    assert "layers_0/bias" in biases


def test_targets_computed_inside_the_loss():
    """A frozen copy, and what is behind a stopped gradient, are no rows."""
    _, params = mean_square(MLP, X)

    def loss_fn(params, frozen):
        apply = lambda p: MLP.apply({"params": p}, X)  # noqa: E731
        target = apply(frozen) + jax.lax.stop_gradient(apply(params))
        return jnp.mean((apply(params) - target) ** 2)

    layers, _ = assert_captured(loss_fn, params, params)
    assert {layer.calls for layer in layers} == {((9, 4, 7),), ((9, 7, 2),)}


def test_outputs_that_are_not_used_are_no_rows():
    class TwoHeads(nn.Module):
        @nn.compact
        def __call__(self, x):
            hidden = nn.tanh(nn.Dense(5, name="hidden")(x))
            return nn.Dense(2, name="used")(hidden), nn.Dense(3, name="idle")(hidden)

    model = TwoHeads()
    params = model.init(KEY, X)["params"]

    def loss_fn(params):
        used, _ = model.apply({"params": params}, X)
        return jnp.mean(used**2)

    layers = loco.layers(loss_fn)(params)
    assert paths(layers) == {"hidden/kernel", "used/kernel"}
    assert dict(layers.others)["idle/kernel"] == "the loss does not depend on it"


def test_aux_is_no_consumer():
    """What is returned beside the loss, logged or sown, changes no transfer."""

    class Logged(nn.Module):
        @nn.compact
        def __call__(self, x):
            a = nn.Dense(5, name="dense")(x)
            self.sow("intermediates", "a", a)
            jax.debug.callback(lambda a: None, jnp.mean(a))
            return nn.tanh(a), a

    model = Logged()
    params = model.init(KEY, X)["params"]

    def loss_fn(params):
        (out, a), sown = model.apply({"params": params}, X, mutable=["intermediates"])
        return jnp.mean(jnp.sin(out)), (a, sown)

    layers = loco.layers(loss_fn, has_aux=True)(params)
    assert transfers(layers) == {"dense/kernel": "tanh"}


CONTAINERS = {
    "FrozenDict": FrozenDict,
    "dataclass": lambda params: Params(**params),
    "defaultdict": lambda params: defaultdict(jnp.zeros, params),
    "list": lambda params: list(params.values()),
}


@chex.dataclass
class Params:
    w1: jax.Array
    w2: jax.Array


@pytest.mark.parametrize("container", CONTAINERS)
def test_parameters_in_any_container(container):
    make = CONTAINERS[container]
    params = make({"w1": jnp.ones((4, 5)), "w2": jnp.ones((5, 2))})

    def loss_fn(params):
        w1, w2 = jax.tree.leaves(params)
        return jnp.mean((jnp.tanh(X @ w1) @ w2) ** 2)

    layers, _ = assert_captured(loss_fn, params)
    assert len(layers.layers) == 2


def test_a_key_with_a_slash_beside_nested_keys():
    params = {"a/b": jnp.ones((4, 4)), "a": {"b": 2 * jnp.ones((4, 4))}}

    def loss_fn(params):
        return jnp.mean(jnp.tanh(X @ params["a/b"]) @ params["a"]["b"])

    layers, _ = assert_captured(loss_fn, params)
    assert [layer.path for layer in layers] == ["'a/b'", "a/b"]


def test_an_einsum_that_sums_positions_first():
    """Its rows are the examples, since positions are summed before the product."""
    model = nn.Einsum((4, 3), "bsd,dk->bk", use_bias=False)
    layers, intermediates = assert_captured(*mean_square(model, SEQUENCES))
    assert intermediates.layers["kernel"].inputs.shape == (3, 4)
    assert layers.layers[0].calls == ((3, 4, 3),)


def test_a_cached_inner_jit_of_fewer_batches_than_before():
    _, params = mean_square(MLP, X)
    apply = jax.jit(lambda params, x: MLP.apply({"params": params}, x))

    def loss_fn(params, *batches):
        return sum(jnp.mean(apply(params, x) ** 2) for x in batches)

    both, _ = assert_captured(loss_fn, params, X, X[::-1])
    one, _ = assert_captured(loss_fn, params, X)
    assert [len(layer.calls) for layer in both] == [2, 2]
    assert [len(layer.calls) for layer in one] == [1, 1]


def test_unbatched_convolutions_in_a_loop():
    model = nn.Conv(4, (3, 3))
    params = model.init(KEY, IMAGES)["params"]

    def loss_fn(params):
        outputs = [model.apply({"params": params}, image) for image in IMAGES]
        return jnp.mean(jnp.tanh(jnp.stack(outputs)) ** 2)

    _, intermediates = assert_captured(loss_fn, params)
    assert intermediates.layers["kernel"].inputs.shape == IMAGES.shape


def test_a_transposed_kernel_handed_to_dense():
    params = {"kernel": jax.random.normal(KEY, (7, 4))}

    def loss_fn(params):
        dense = nn.Dense(7, use_bias=False)
        turned = {"params": {"kernel": params["kernel"].T}}
        return jnp.mean(jnp.tanh(dense.apply(turned, X)) ** 2)

    _, intermediates = assert_captured(loss_fn, params)
    assert intermediates.layers["kernel"].gradient["kernel"].shape == (4, 7)


def test_a_kernel_that_is_also_looked_up_and_used_elementwise():
    params = {"w": jax.random.normal(KEY, (11, 4))}

    def loss_fn(params):
        looked_up = params["w"][TOKENS[0]]
        return jnp.mean((X @ params["w"].T) ** 2) + jnp.mean(jnp.sin(looked_up))

    _, intermediates = assert_captured(loss_fn, params)
    assert intermediates.layers["w"].penalty is not None


def test_penalties_and_other_uses_are_told_apart(float64):
    params = {"w": jax.random.normal(KEY, (11, 4), float)}

    def loss_fn(params):
        looked_up = jnp.tanh(params["w"][TOKENS])
        outputs = looked_up @ params["w"].T
        return jnp.mean(jnp.square(outputs - 1)) + 0.5 * jnp.sum(params["w"] ** 2)

    _, intermediates = assert_captured(loss_fn, params)
    tied = intermediates.layers["w"]
    np.testing.assert_allclose(tied.penalty["kernel"].T, params["w"], rtol=1e-12)
    assert np.abs(tied.elsewhere["kernel"]).max() > 1e-3


PENALTIES = {
    "a count of leaves": lambda p, q: 0.1 * len(jax.tree.leaves(p)) * p["w1"].sum(),
    "a mean of leaves": lambda p, q: sum(leaf.mean() for leaf in jax.tree.leaves(p)),
    "a norm of leaves": lambda p, q: optax.tree.norm(p),
    "another tree": lambda p, q: sum(
        jnp.sum((a - b) ** 2)
        for a, b in zip(jax.tree.leaves(p), jax.tree.leaves(q), strict=True)
    ),
}


@pytest.mark.parametrize(
    "penalty",
    [
        slow(p) if p in ("a count of leaves", "a mean of leaves") else p
        for p in PENALTIES
    ],
)
def test_penalties_over_all_leaves(penalty):
    params = {"w1": jax.random.normal(KEY, (4, 5)), "w2": jnp.ones((5, 2))}
    other = jax.tree.map(jnp.ones_like, params)

    def loss_fn(params):
        fit = jnp.mean((jnp.tanh(X @ params["w1"]) @ params["w2"]) ** 2)
        return fit + PENALTIES[penalty](params, other)

    _, intermediates = assert_captured(loss_fn, params)
    expected = jax.grad(lambda p: PENALTIES[penalty](p, other))(params)
    for path, layer in intermediates.layers.items():
        found = layer.penalty or jax.tree.map(jnp.zeros_like, layer.gradient)
        np.testing.assert_allclose(
            found["kernel"], expected[path], rtol=1e-4, atol=1e-5
        )


TRANSFERS = {
    "shifted relu": (lambda a: jnp.where(a > 0.1, a, 0.0), "identity"),
    "relu by where": (lambda a: jnp.where(a > 0, a, 0.0), "relu"),
    "clipped relu": (lambda a: jnp.clip(a, 0.0, 20.0), "relu"),
    "scaled tanh": (lambda a: 2 * jnp.tanh(a), "tanh"),
}


@pytest.mark.parametrize("name", TRANSFERS)
def test_transfers_by_value(name):
    function, expected = TRANSFERS[name]
    params = {"w": jax.random.normal(KEY, (4, 5))}
    layers = loco.layers(lambda p: jnp.sum(jnp.sin(function(X @ p["w"]))))(params)
    assert transfers(layers) == {"w": expected}


def test_dropout_between_a_layer_and_its_function():
    model = nn.Sequential(
        [nn.Dense(7), nn.Dropout(0.3, deterministic=False), nn.tanh, nn.Dense(2)]
    )
    rngs = {"params": KEY, "dropout": KEY}
    params = model.init(rngs, X)["params"]

    def loss_fn(params, key):
        outputs = model.apply({"params": params}, X, rngs={"dropout": key})
        return jnp.mean(outputs**2)

    layers, _ = assert_captured(loss_fn, params, KEY)
    assert transfers(layers)["layers_0/kernel"] == "tanh"
