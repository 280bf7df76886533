"""Whatever is asked for, it is a finite step or an error that says what is wrong.

`HYPOTHESIS_PROFILE=explore` looks at more cases.
"""

import dataclasses
from contextlib import contextmanager

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import locoprop_optax as loco
from tests.helpers import TRANSFERS

FEW = settings(max_examples=settings.default.max_examples // 2)
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]

layer_kinds = st.one_of(
    st.builds(
        lambda o, bias: (nn.Dense(o, use_bias=bias), 2),
        st.integers(1, 4),
        st.booleans(),
    ),
    st.builds(
        lambda o, k, s: (nn.Conv(o, (k,), strides=s), 3),
        st.integers(1, 3),
        st.integers(1, 3),
        st.integers(1, 2),
    ),
    st.builds(lambda o: (nn.DenseGeneral((o, 2)), 2), st.integers(1, 3)),
    st.builds(lambda o: (nn.ConvTranspose(o, (2,)), 3), st.integers(1, 3)),
)
targets = st.sampled_from(
    [
        loco.targets.gradient_descent(0.1),
        loco.targets.normalized(0.1),
        loco.targets.natural_gradient(0.1),
    ]
)
solvers = st.sampled_from(
    [
        loco.solvers.first_order(optax.sgd(0.01), 3),
        loco.solvers.first_order(optax.adam(0.01), 2, local_batch_size=2),
        loco.solvers.majorized_newton(2, 0.1),
        loco.solvers.majorized_newton(1, 0.0),
        loco.solvers.majorized_newton(1, 0.1, ema=0.9, stride=2),
        loco.solvers.exact(0.1),
        loco.solvers.conjugate_gradient(3),
        loco.solvers.mirror_descent(2),
    ]
)
losses = st.sampled_from(
    [
        loco.losses.matching_loss(),
        loco.losses.squared_loss(),
        loco.losses.squared_loss(after_activation=True),
    ]
)
regularizers = st.sampled_from(
    [
        loco.regularizers.none(),
        loco.regularizers.squared_l2(0.1),
        loco.regularizers.relative_entropy(0.1),
    ]
)
cases = st.fixed_dictionaries(
    {
        "kind": layer_kinds,
        "transfer": st.sampled_from(TRANSFERS),
        "dtype": st.sampled_from(DTYPES),
        "examples": st.integers(1, 5),
        "features": st.integers(1, 5),
        "scale": st.sampled_from([0.0, 1e-8, 1e-3, 1.0, 1e3, 1e8]),
        "loss": losses,
        "target": targets,
        "regularizer": regularizers,
        "solver": solvers,
    }
)


def captured(case):
    """The layers of a model of one, its parameters, gradients and intermediates."""
    module, ndim = case["kind"]
    module = module.clone(dtype=case["dtype"], param_dtype=case["dtype"], name="layer")
    shape = (case["examples"], *(4,) * (ndim - 2), case["features"])

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            a = module.clone(parent=self)(x)
            return loco.losses.as_transfer(case["transfer"]).function(a)

    x = case["scale"] * jax.random.normal(jax.random.key(0), shape)
    model = Model()
    params = model.init(jax.random.key(1), jnp.ones(shape))["params"]

    def loss_fn(params):
        outputs = model.apply({"params": params}, x.astype(case["dtype"]))
        return jnp.mean(jnp.square(outputs.astype(jnp.float32) - 1))

    find = loco.layers(loss_fn, transfers={"layer/*": case["transfer"]})
    layers = find(params)
    _, grads, intermediates = loco.value_and_grad(loss_fn, layers)(params)
    return layers, params, grads, intermediates


def step_is_finite(case, layers, params, grads, intermediates):
    tx = loco.keep_finite(
        optax.chain(
            loco.scale_by_locoprop(
                layers,
                loss=case["loss"],
                target=case["target"],
                regularizer=case["regularizer"],
                solver=case["solver"],
            ),
            optax.scale(-1.0),
        )
    )
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(grads, state, params, intermediates=intermediates)
        params = optax.apply_updates(params, updates)
        for before, after in zip(*map(jax.tree.leaves, (grads, params)), strict=True):
            assert after.shape == before.shape
            assert np.isfinite(np.asarray(after, np.float32)).all()


@contextmanager
def refused_by_layer():
    """Lets an error of ours pass that speaks of the layer."""
    try:
        yield
    except (ValueError, TypeError) as error:
        if "layer" not in str(error).lower():
            raise


@FEW
@given(cases)
def test_any_layer_with_any_parts(case):
    with refused_by_layer():
        step_is_finite(case, *captured(case))


def with_field(name, change):
    def apply(layer):
        return dataclasses.replace(layer, **{name: change(getattr(layer, name))})

    return apply


ARRAYS = ["inputs", "preactivations", "cotangents"]
CHANGES = {
    "one row less": lambda x: x[1:],
    "one row more": lambda x: jnp.concatenate([x, x[:1]]),
    "one column more": lambda x: jnp.concatenate([x, x[..., :1]], -1),
    "turned": lambda x: x.T,
    "flat": lambda x: x.reshape(-1),
    "no axis": lambda x: x.sum(),
    "integers": lambda x: x.astype(int),
    "booleans": lambda x: x > 0,
    "complex": lambda x: x + 1j,
    "not a number": lambda x: x * jnp.nan,
    "infinite": lambda x: x + jnp.inf,
    "nothing": lambda x: None,
    "empty": lambda x: x[:0],
}
mutations = st.one_of(
    st.builds(
        lambda name, change: with_field(name, CHANGES[change]),
        st.sampled_from(ARRAYS),
        st.sampled_from(sorted(CHANGES)),
    ),
    st.builds(
        lambda name, change: with_field(
            "gradient",
            lambda held: {
                n: CHANGES[change](g) if n == name else g for n, g in held.items()
            },
        ),
        st.sampled_from(["kernel", "bias"]),
        st.sampled_from(sorted(CHANGES)),
    ),
    st.just(with_field("gradient", lambda held: {})),
    st.just(with_field("gradient", lambda held: {**held, "more": held["kernel"]})),
    st.just(with_field("transfer", lambda _: loco.losses.as_transfer("softmax"))),
)


@FEW
@given(cases, mutations)
def test_intermediates_that_something_is_wrong_with(case, mutation):
    *rest, intermediates = captured(case)
    mutated = {p: mutation(layer) for p, layer in intermediates.layers.items()}
    broken = dataclasses.replace(intermediates, layers=mutated)
    with refused_by_layer():
        step_is_finite(case, *rest, broken)


@pytest.mark.parametrize("path", ["", "other", "layer", "Layer/kernel"])
def test_intermediates_under_another_name(path):
    case = {"kind": (nn.Dense(2), 2), "transfer": "tanh", "dtype": jnp.float32}
    layers, params, grads, intermediates = captured(
        {**case, "examples": 2, "features": 2, "scale": 1.0}
    )
    (layer,) = intermediates.layers.values()
    renamed = loco.Intermediates({path: layer})
    tx = loco.scale_by_locoprop(layers)
    with pytest.raises(ValueError, match="none of the optimizer's layers"):
        tx.update(grads, tx.init(params), params, intermediates=renamed)


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("change", ["nothing", "turned", "no axis"])
def test_a_convolution_with_an_array_of_another_form(name, change):
    case = {"kind": (nn.Conv(2, (2,)), 3), "transfer": "tanh", "dtype": jnp.float32}
    layers, params, grads, intermediates = captured(
        {**case, "examples": 3, "features": 2, "scale": 1.0}
    )
    broken = with_field(name, CHANGES[change])(intermediates.layers["layer/kernel"])
    tx = loco.scale_by_locoprop(layers)
    with pytest.raises(ValueError, match=r"'layer/kernel': (the shape of )?its"):
        tx.update(
            grads,
            tx.init(params),
            params,
            intermediates=loco.Intermediates({"layer/kernel": broken}),
        )
