"""Models, layers and local problems that several tests use."""

import re
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

import locoprop_optax as loco
from locoprop_optax._problems.problem import pose

TRANSFERS = sorted(loco.losses.known_transfers())
MAIN_TRANSFERS = ["identity", "relu", "sigmoid", "softmax", "tanh"]


def slow(*case):
    """A case that others show as well, for `pytest -m slow`."""
    return pytest.param(*case, marks=pytest.mark.slow)


DOCS = Path(__file__).parents[1] / "docs"


def python_blocks(page):
    """The Python code in a page of Markdown, block by block."""
    return re.findall(r"```python\n(.*?)```", page, re.S)


def run_blocks(page, **names: Any) -> dict[str, Any]:
    """What the Python code in a page defines, given names that it may use."""
    names["__name__"] = "__docs__"
    for code in python_blocks(page):
        exec(code, names)
    return names


class MLP(nn.Module):
    """Two Dense layers with tanh between them."""

    hidden: int = 5
    out: int = 3
    dtype: jnp.dtype | None = None
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = nn.tanh(nn.Dense(self.hidden, name="first", **options)(x))
        return nn.Dense(self.out, name="second", **options)(x)


def regression(model=None, seed=0, batch=8, features=4):
    """A loss function, parameters and a batch."""
    model = MLP() if model is None else model
    x = jax.random.normal(jax.random.key(seed), (batch, features))
    y = jax.random.normal(jax.random.key(seed + 1), (batch, 3))
    params = model.init(jax.random.key(seed + 2), x)["params"]

    def loss_fn(params, batch):
        inputs, targets = batch
        outputs = model.apply({"params": params}, inputs)
        return jnp.mean(jnp.sum((outputs - targets) ** 2, axis=-1))

    return loss_fn, params, (x, y)


def capture(loss_fn, **options):
    """`loco.value_and_grad` of a loss whose layers are found at each call."""
    has_aux = options.get("has_aux", False)

    def loss_grads_and_intermediates(params, *args, **kwargs):
        layers = loco.layers(loss_fn, **options)(params, *args, **kwargs)
        differentiate = loco.value_and_grad(loss_fn, layers, has_aux=has_aux)
        return jax.jit(lambda p: differentiate(p, *args, **kwargs))(params)

    return loss_grads_and_intermediates


def train_step(loss_fn, layers, tx):
    """A training step with the intermediates, as the README writes it."""
    capture = loco.value_and_grad(loss_fn, layers)

    def step(params, opt_state, batch):
        loss, grads, intermediates = capture(params, batch)
        updates, opt_state = tx.update(
            grads, opt_state, params, intermediates=intermediates
        )
        return optax.apply_updates(params, updates), opt_state, loss

    return step


def local_steps(layers, learning_rate=0.3, **parts):
    """Steps of LocoProp at a rate, with `scale_by_locoprop`'s parts."""
    return optax.chain(
        loco.scale_by_locoprop(layers, **parts),
        optax.scale_by_learning_rate(learning_rate),
    )


def update_of(make, loss_fn, params, *batch, key=None, **options):
    """The first update of an optimizer that is made of a loss's layers."""
    layers = loco.layers(loss_fn, **options)(params, *batch)
    capture = loco.value_and_grad(loss_fn, layers, key=key)
    tx = make(layers)

    @jax.jit
    def update(params, *batch):
        _, grads, intermediates = capture(params, *batch)
        state = tx.init(params)
        return tx.update(grads, state, params, intermediates=intermediates)[0]

    return update(params, *batch)


def kfac(layers, damping=0.0):
    """K-FAC for one batch, of the length of a Newton step."""
    return loco.scale_by_locoprop(
        layers,
        loss=loco.losses.squared_loss(),
        target=loco.targets.natural_gradient(1.0, damping=damping),
        solver=loco.solvers.exact(damping=damping),
    )


def layers_for(params):
    """The layers of parameters that are Dense layers, each by itself."""

    def loss_fn(params):
        outputs = []
        for layer in params.values():
            x = jnp.ones((2, layer["kernel"].shape[0]), layer["kernel"].dtype)
            outputs.append(jnp.sum(x @ layer["kernel"] + layer.get("bias", 0.0)))
        return sum(outputs)

    return loco.layers(loss_fn)(params)


def counted(function):
    """A jitted function, and a list that grows by one with each trace of it."""
    traces = []

    def trace(*args):
        traces.append(None)
        return function(*args)

    return jax.jit(trace), traces


def random_layer(seed, n, d_in, d_out, transfer="identity", bias=True):
    """A Dense layer's parameters and intermediates with random numbers."""
    rng = np.random.default_rng(seed)
    x, g = rng.normal(size=(n, d_in)), rng.normal(size=(n, d_out))
    params = {"kernel": rng.normal(size=(d_in, d_out))}
    gradient = {"kernel": x.T @ g}
    a = x @ params["kernel"]
    if bias:
        params["bias"] = rng.normal(size=d_out)
        gradient["bias"] = g.sum(0)
        a = a + params["bias"]
    layer = loco.LayerIntermediates(
        *map(jnp.asarray, (x, a, g)),
        gradient=jax.tree.map(jnp.asarray, gradient),
        transfer=loco.losses.as_transfer(transfer),
    )
    return jax.tree.map(jnp.asarray, params), layer


def problem_of(params, layer, *, gamma=0.1, loss=None, regularizer=None):
    """The local problem of one layer."""
    return pose(
        layer,
        params,
        (),
        jnp.zeros((), jnp.int32),
        loss=loco.losses.matching_loss() if loss is None else loss,
        target=loco.targets.gradient_descent(gamma),
        regularizer=regularizer or loco.regularizers.none(),
    )


def solved(make, params, layer):
    """The update of one layer, as an optimizer made of its layers returns it."""
    tree = {"layer": params}
    tx = make(layers_for(tree))
    intermediates = loco.Intermediates({"layer/kernel": layer})
    grads = {"layer": dict(layer.gradient)}
    updates, _ = jax.jit(tx.update)(
        grads, tx.init(tree), tree, intermediates=intermediates
    )
    return updates["layer"]


SHAPES = (  # few, since each is compiled once for all tests: examples, inputs, outputs
    {"n": 1, "d_in": 1, "d_out": 1},
    {"n": 1, "d_in": 4, "d_out": 2},
    {"n": 3, "d_in": 6, "d_out": 5},
    {"n": 7, "d_in": 3, "d_out": 1},
    {"n": 9, "d_in": 2, "d_out": 4},
)
random_layers = st.builds(
    lambda shape, **drawn: {**shape, **drawn},
    st.sampled_from(SHAPES),
    seed=st.integers(0, 2**32 - 1),
    transfer=st.sampled_from(MAIN_TRANSFERS),
    bias=st.booleans(),
)
