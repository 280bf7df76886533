import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import locoprop_optax as loco
from tests.helpers import random_layer, random_layers

pytestmark = pytest.mark.usefixtures("float64")


REGULARIZERS = [loco.regularizers.none(), loco.regularizers.squared_l2(0.7)]
BREGMAN = [
    loco.regularizers.relative_entropy(0.4),
    loco.regularizers.signed_entropy(0.4, scale=0.2),
    loco.regularizers.bregman(0.4, loco.losses.as_transfer("identity")),
    loco.regularizers.bregman(0.4, loco.losses.as_transfer("softplus")),
]


@given(
    random_layers,
    st.sampled_from(REGULARIZERS),
)
def test_gradient_and_curvature_belong_to_the_value(drawn, regularizer):
    params, _ = random_layer(**drawn)
    step, _ = random_layer(**{**drawn, "seed": drawn["seed"] // 2})
    no_step = jax.tree.map(jax.numpy.zeros_like, step)
    expected = jax.grad(lambda s: regularizer.value(s, params))(step)
    for name, gradient in regularizer.gradient(step, params).items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-12)
        change = gradient - regularizer.gradient(no_step, params)[name]
        np.testing.assert_allclose(
            change, regularizer.curvature * step[name], rtol=1e-9, atol=1e-12
        )


def test_strength_must_not_be_negative():
    with pytest.raises(ValueError, match="strength must not be negative, got -1"):
        loco.regularizers.squared_l2(-1)


POTENTIALS = {  # and their gradients
    "log": (lambda w: w * np.log(w) - w, np.log),
    "arsinh(0.2)": (
        lambda w: w * np.arcsinh(w / 0.2) - np.hypot(w, 0.2),
        lambda w: np.arcsinh(w / 0.2),
    ),
    "identity": (lambda w: 0.5 * w**2, lambda w: w),
    "softplus": (
        loco.losses.as_transfer("softplus").potential,
        loco.losses.as_transfer("softplus").function,
    ),
}


def positive(drawn, seed):
    params, _ = random_layer(**{**drawn, "seed": seed})
    return {name: jax.numpy.abs(p) + 0.1 for name, p in params.items()}


@given(random_layers, st.sampled_from(BREGMAN))
def test_bregman_divergences(drawn, regularizer):
    old, new = positive(drawn, drawn["seed"]), positive(drawn, drawn["seed"] // 2)
    step = {name: new[name] - old[name] for name in old}
    no_step = jax.tree.map(jax.numpy.zeros_like, step)
    psi, dual = POTENTIALS[regularizer.mirror.name]
    expected = 0.4 * sum(
        float(np.sum(psi(new[n]) - psi(old[n]) - dual(old[n]) * step[n])) for n in old
    )
    value = regularizer.value(step, old)
    np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-9)
    assert value >= 0
    np.testing.assert_allclose(regularizer.value(no_step, old), 0, atol=1e-12)
    gradient = jax.grad(lambda s: regularizer.value(s, old))(step)
    for name, g in regularizer.gradient(step, old).items():
        np.testing.assert_allclose(g, gradient[name], rtol=1e-9, atol=1e-12)
        if regularizer.curvature is not None:
            bound = regularizer.curvature * np.abs(step[name])
            assert np.all(np.abs(g) <= bound + 1e-12)


@pytest.mark.parametrize("step", [1e-6, -1e-4, 1e-2, -0.5, 3.0])
@pytest.mark.parametrize(
    "regularizer", [BREGMAN[0], BREGMAN[1], loco.regularizers.signed_entropy(0.4, 5.0)]
)
def test_small_steps_lose_nothing_in_float32(regularizer, step):
    found, expected = (
        (
            regularizer.value(s, params),
            regularizer.gradient(s, params)["kernel"],
            regularizer.mirror_step(s, s, params)["kernel"],
        )
        for dtype in ("float32", "float64")
        for s, params in [
            (
                {"kernel": jax.numpy.asarray([step], dtype)},
                {"kernel": jax.numpy.asarray([0.7], dtype)},
            )
        ]
    )
    for name, a, b in zip(("value", "gradient", "step"), found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("name", ["relative_entropy", "signed_entropy"])
def test_strength_of_a_divergence_must_be_positive(name):
    with pytest.raises(ValueError, match="strength must be positive, got 0"):
        getattr(loco.regularizers, name)(0)
    with pytest.raises(ValueError, match="scale must be positive, got 0"):
        loco.regularizers.signed_entropy(1.0, scale=0)
