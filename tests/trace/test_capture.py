"""Capture on the models people have, in Linen and in NNX alike.

Each case is a model and a loss. For each, the gradients must be those of the untouched
model, the records must give every captured kernel's gradient, the transfer functions
must be the expected ones, and one local step must be the backprop step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import locoprop_optax as loco
from tests.helpers import slow
from tests.trace.checks import assert_captured, assert_close, assert_usable


class Case(NamedTuple):
    """A loss over parameters, and the transfer expected behind each weight."""

    loss_fn: Callable[..., Any]
    params: Any
    expected: dict[str, str]


X = jax.random.normal(jax.random.key(0), (4, 6))
IMAGE = jax.random.normal(jax.random.key(1), (3, 8, 8, 4))


def of_module(build, x=X, expected=None, rngs=None, **apply):
    """A case in Linen: a compact function as a model, the mean square as the loss."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return build(x)

    return of_model(Model(), x, expected, rngs, **apply)


def of_model(model, x=X, expected=None, rngs=None, **apply):
    variables = model.init({"params": jax.random.key(2), **(rngs or {})}, x)
    params = variables["params"]
    rest = {name: v for name, v in variables.items() if name != "params"}

    def loss_fn(params):
        out = model.apply({"params": params, **rest}, x, rngs=rngs, **apply)
        out = out[0] if "mutable" in apply else out
        return jnp.mean(jnp.sin(out) ** 2)

    return Case(loss_fn, params, expected)


def conv(*args, **options):
    return lambda: of_module(
        lambda x: nn.Dense(2, name="out")(
            nn.relu(nn.Conv(*args, name="conv", **options)(x)).mean((1, 2))
        ),
        IMAGE,
        {"conv": "relu", "out": "identity"},
    )


def conv_of_rank(rank):
    x = jax.random.normal(jax.random.key(3), (2, *[5] * rank, 3))
    return of_module(
        lambda x: nn.tanh(nn.Conv(4, (3,) * rank, name="conv")(x)), x, {"conv": "tanh"}
    )


class Block(nn.Module):
    """A residual block, as a stack scans it."""

    @nn.compact
    def __call__(self, x, _=None):
        h = nn.gelu(nn.Dense(5, name="up")(nn.LayerNorm(name="norm")(x)))
        return x + nn.Dense(6, name="down")(h), None


BLOCKS = {"stack/up": "gelu_tanh", "stack/down": "identity"}


def scanned(block=Block):
    return of_module(
        lambda x: nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )(name="stack")(x, None)[0],
        expected=BLOCKS,
    )


def scanned_twice():
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            stack = nn.scan(Block, {"params": 0}, split_rngs={"params": True}, length=2)
            return stack(name="stack")(x, None)

    return of_module(
        lambda x: nn.scan(
            nn.remat(Inner), {"params": 0}, split_rngs={"params": True}, length=3
        )(name="outer")(x, None)[0],
        expected={f"outer/{path}": name for path, name in BLOCKS.items()},
    )


def ensemble():
    members = nn.vmap(
        nn.Dense,
        in_axes=None,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        axis_size=3,
    )
    return of_module(
        lambda x: nn.tanh(members(2, name="members")(x)), expected={"members": "tanh"}
    )


def shared():
    class Shared(nn.Module):
        def setup(self):
            self.layer = nn.Dense(6)

        def __call__(self, x):
            return nn.tanh(self.layer(nn.tanh(self.layer(x))))

    return of_model(Shared(), expected={"layer": "tanh"})


def shared_with_other_functions():
    class Shared(nn.Module):
        def setup(self):
            self.layer = nn.Dense(6)

        def __call__(self, x):
            return nn.relu(self.layer(nn.tanh(self.layer(x))))

    return of_model(Shared(), expected={"layer": "identity"})


def tied():
    """An encoder whose kernel the decoder uses, transposed, by hand."""

    class Tied(nn.Module):
        @nn.compact
        def __call__(self, x):
            embed = nn.Embed(7, 6, name="embed")
            return embed.attend(nn.relu(nn.Dense(6, name="hidden")(x)))

    expected = {"hidden": "relu", "embed/embedding": "identity"}
    return of_model(Tied(), expected=expected)


def gan():
    generator, critic = nn.Dense(6), nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(1)])
    params = {
        "generator": generator.init(jax.random.key(0), X)["params"],
        "critic": critic.init(jax.random.key(1), X)["params"],
    }

    def loss_fn(params):
        fake = generator.apply({"params": params["generator"]}, X)
        on_fake = critic.apply({"params": params["critic"]}, fake)
        on_real = critic.apply({"params": params["critic"]}, X)
        return jnp.mean(nn.softplus(on_fake)) + jnp.mean(nn.softplus(-on_real))

    expected = {
        "generator": "identity",
        "critic/layers_0": "relu",
        "critic/layers_2": "sigmoid",
    }
    return Case(loss_fn, params, expected)


def conditional():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(3, name="layer")
            if self.is_initializing():
                return layer(x)
            return nn.cond(
                jnp.sum(x) > -1e9,
                lambda m, x: nn.tanh(layer(x)),
                lambda m, x: jnp.zeros((len(x), 3)),
                self,
                x,
            )

    return of_model(Model(), expected={"layer": "tanh"})


LINEN = {
    "dense without bias": lambda: of_module(
        lambda x: nn.silu(nn.Dense(3, use_bias=False, name="a")(x)),
        expected={"a": "silu"},
    ),
    "one example": lambda: of_module(
        lambda x: nn.elu(nn.Dense(3, name="a")(x)), X[0], {"a": "elu"}
    ),
    "several batch axes": lambda: of_module(
        lambda x: nn.selu(nn.Dense(3, name="a")(x)), X.reshape(2, 2, 6), {"a": "selu"}
    ),
    "dense general": lambda: of_module(
        lambda x: nn.tanh(nn.DenseGeneral((2, 3), axis=(-1, -2), name="a")(x)),
        X.reshape(2, 2, 6),
        {"a": "tanh"},
    ),
    "dense general, batched": lambda: of_module(
        lambda x: nn.tanh(nn.DenseGeneral(3, axis=-1, batch_dims=(0,), name="a")(x)),
        X.reshape(2, 2, 6),
        {"a": "tanh"},
    ),
    "einsum": lambda: of_module(
        lambda x: nn.tanh(nn.Einsum((6, 2, 3), "bd,dhk->bhk", name="a")(x)),
        expected={"a": "tanh"},
    ),
    "einsum, batched": lambda: of_module(
        lambda x: nn.tanh(nn.Einsum((2, 6, 3), "bhd,hdk->bhk", name="a")(x)),
        X.reshape(2, 2, 6),
        {"a": "tanh"},
    ),
    "attention": lambda: of_module(
        lambda x: nn.MultiHeadDotProductAttention(2, name="a")(x),
        X.reshape(2, 2, 6),
        {f"a/{name}": "identity" for name in ("query", "key", "value", "out")},
    ),
    "conv": conv(5, (3, 3)),
    "conv, strides and VALID": conv(5, (3, 3), strides=(2, 2), padding="VALID"),
    "conv, dilation": conv(5, (3, 3), kernel_dilation=(2, 2)),
    "conv, groups": conv(6, (3, 3), feature_group_count=2),
    "conv, depthwise": conv(4, (3, 3), feature_group_count=4, use_bias=False),
    "conv, lists": conv(5, [3, 3], strides=[1, 2]),
    "conv 1d": lambda: conv_of_rank(1),
    "conv 3d": lambda: conv_of_rank(3),
    "conv transpose": lambda: of_module(
        lambda x: nn.tanh(nn.ConvTranspose(3, (2, 2), (2, 2), name="a")(x)),
        IMAGE,
        {"a": "tanh"},
    ),
    "conv transpose, transposed kernel": lambda: of_module(
        lambda x: nn.tanh(
            nn.ConvTranspose(3, (2, 2), (2, 2), transpose_kernel=True, name="a")(x)
        ),
        IMAGE,
        {"a": "tanh"},
    ),
    "batch norm and dropout": lambda: of_module(
        lambda x: nn.Dropout(0.5, deterministic=False)(
            nn.relu(
                nn.BatchNorm(use_running_average=False, name="norm")(
                    nn.Dense(5, name="a")(x)
                )
            )
        ),
        expected={"a": "identity"},
        rngs={"dropout": jax.random.key(5)},
        mutable=["batch_stats"],
    ),
    "remat": lambda: of_module(
        lambda x: nn.tanh(nn.remat(nn.Dense)(3, name="a")(x)), expected={"a": "tanh"}
    ),
    "jit": lambda: of_module(
        lambda x: nn.tanh(nn.jit(nn.Dense)(3, name="a")(x)), expected={"a": "tanh"}
    ),
    "scan": scanned,
    "scan of remat": lambda: scanned(nn.remat(Block)),
    "scan of scan of remat": scanned_twice,
    "ensemble": ensemble,
    "shared": shared,
    "shared, other functions": shared_with_other_functions,
    "tied": tied,
    "gan": gan,
    "cond": conditional,
    "bfloat16 compute": lambda: of_module(
        lambda x: nn.relu(nn.Dense(3, dtype=jnp.bfloat16, name="a")(x)),
        expected={"a": "relu"},
    ),
    "norm without kernel": lambda: of_module(
        lambda x: nn.leaky_relu(
            nn.Dense(3, name="a")(nn.LayerNorm(name="norm")(x)), 0.2
        ),
        expected={"a": "leaky_relu(0.2)"},
    ),
}


def of_nnx(build, expected, x=X):
    """A case in NNX, its loss a function of the model's parameters."""
    return build, expected, x


class NnxModel(nnx.Module):
    """Layers and functions, one after another."""

    def __init__(self, *parts):
        self.parts = nnx.List(parts)

    def __call__(self, x):
        for part in self.parts:
            x = part(x)
        return x


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(6, 5, rngs=rngs)
        self.down = nnx.Linear(5, 6, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(x)))


class NnxScanned(nnx.Module):
    def __init__(self, rngs, remat=False):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def create(rngs):
            return NnxBlock(rngs)

        self.stack = create(rngs)
        self.remat = remat

    def __call__(self, x):
        def body(x, block):
            return nnx.remat(lambda b, x: b(x))(block, x) if self.remat else block(x)

        return nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.stack)


class NnxShared(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(6, 6, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.layer(jnp.tanh(self.layer(x))))


class NnxEnsemble(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def create(rngs):
            return nnx.Linear(6, 2, rngs=rngs)

        self.members = create(rngs)

    def __call__(self, x):
        forward = nnx.vmap(lambda m, x: m(x), in_axes=(0, None), out_axes=0)
        return nnx.tanh(forward(self.members, x))


class NnxAttention(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)

    def __call__(self, x):
        return self.a(x)


NNX_BLOCK = {"stack/up": "gelu_tanh", "stack/down": "identity"}
NNX = {
    "linear": (
        lambda r: NnxModel(nnx.Linear(6, 3, rngs=r), nnx.relu),
        {"parts/0": "relu"},
        X,
    ),
    "linear without bias": (
        lambda r: NnxModel(nnx.Linear(6, 3, use_bias=False, rngs=r), nnx.tanh),
        {"parts/0": "tanh"},
        X[0],
    ),
    "linear general": (
        lambda r: NnxModel(
            nnx.LinearGeneral((2, 6), (2, 3), axis=(-2, -1), rngs=r), nnx.silu
        ),
        {"parts/0": "silu"},
        X.reshape(2, 2, 6),
    ),
    "einsum": (
        lambda r: NnxModel(
            nnx.Einsum("bd,dhk->bhk", (6, 2, 3), (2, 3), rngs=r), nnx.elu
        ),
        {"parts/0": "elu"},
        X,
    ),
    "conv": (
        lambda r: NnxModel(nnx.Conv(4, 5, (3, 3), strides=2, rngs=r), nnx.relu),
        {"parts/0": "relu"},
        IMAGE,
    ),
    "conv, groups": (
        lambda r: NnxModel(
            nnx.Conv(4, 6, (3, 3), feature_group_count=2, rngs=r), nnx.relu
        ),
        {"parts/0": "relu"},
        IMAGE,
    ),
    "conv transpose": (
        lambda r: NnxModel(
            nnx.ConvTranspose(4, 3, (2, 2), strides=2, rngs=r), nnx.relu
        ),
        {"parts/0": "relu"},
        IMAGE,
    ),
    "attention": (
        NnxAttention,
        {f"a/{name}": "identity" for name in ("query", "key", "value", "out")},
        X.reshape(2, 2, 6),
    ),
    "batch norm and dropout": (
        lambda r: NnxModel(
            nnx.Linear(6, 5, rngs=r),
            nnx.BatchNorm(5, rngs=r),
            nnx.relu,
            nnx.Dropout(0.5, rngs=r),
            nnx.Linear(5, 2, rngs=r),
        ),
        {"parts/0": "identity", "parts/4": "identity"},
        X,
    ),
    "bfloat16 compute": (
        lambda r: NnxModel(nnx.Linear(6, 3, dtype=jnp.bfloat16, rngs=r), nnx.relu),
        {"parts/0": "relu"},
        X,
    ),
    "scan": (NnxScanned, NNX_BLOCK, X),
    "scan of remat": (lambda r: NnxScanned(r, remat=True), NNX_BLOCK, X),
    "ensemble": (NnxEnsemble, {"members": "tanh"}, X),
    "shared": (NnxShared, {"layer": "tanh"}, X),
}


def by_weight(expected):
    """The expected transfer functions, by the path of each weight."""
    names = ("embedding", "w", "v")
    return {
        path if path.split("/")[-1] in names else f"{path}/kernel": transfer
        for path, transfer in expected.items()
    }


SLOW = {  # what others show as well
    "conv, strides and VALID",
    "conv, dilation",
    "conv, lists",
    "conv 1d",
    "conv transpose, transposed kernel",
    "conv, depthwise",
    "several batch axes",
    "dense general, batched",
    "einsum, batched",
    "shared, other functions",
    "scan of scan of remat",
    "gan",
    "conv 3d",
    "conv transpose",
    "dense without bias",
    "einsum",
    "linear without bias",
    "linear general",
    "one example",
    "remat",
    "jit",
    "norm without kernel",
}


def quick_or_slow(names):
    return [slow(name) if name in SLOW else name for name in names]


def transfers_of_products(layers):
    products = (layer for layer in layers if not layer.linear_map.is_diagonal)
    return {layer.path: layer.transfer.name for layer in products}


@pytest.mark.parametrize("name", quick_or_slow(LINEN))
def test_linen(name):
    case = LINEN[name]()
    layers, _ = assert_captured(case.loss_fn, case.params)
    assert transfers_of_products(layers) == by_weight(case.expected)


@pytest.mark.parametrize("name", quick_or_slow(NNX))
def test_nnx(name):
    build, expected, x = NNX[name]

    def loss_fn(model, x):
        return jnp.mean(jnp.sin(model(x)) ** 2)

    untouched, model = build(nnx.Rngs(0)), build(nnx.Rngs(0))
    loss, grads = nnx.jit(nnx.value_and_grad(loss_fn))(untouched, x)
    layers = loco.nnx.layers(loss_fn)(model, x)
    capture = nnx.jit(loco.nnx.value_and_grad(loss_fn, layers))
    found, found_grads, intermediates = capture(model, x)
    assert_close((found, found_grads), (loss, grads))
    assert_close(nnx.state(model), nnx.state(untouched))
    assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(
        nnx.state(untouched)
    )
    assert transfers_of_products(layers) == by_weight(expected)
    params, grads = nnx.as_pure(nnx.state(model, nnx.Param)), nnx.as_pure(grads)
    assert_usable(layers, params, grads, intermediates)
