import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import locoprop_optax as loco
from tests.helpers import layers, random_layer

pytestmark = pytest.mark.usefixtures("float64")


PARTS = (loco.regularizers.squared_l2(0.7), loco.regularizers.weight_decay(0.3))
REGULARIZERS = [loco.regularizers.none(), *PARTS, loco.regularizers.sum_of(*PARTS)]


@given(
    layers,
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


@pytest.mark.parametrize("name", ["squared_l2", "weight_decay"])
def test_strength_must_not_be_negative(name):
    with pytest.raises(ValueError, match="strength must not be negative, got -1"):
        getattr(loco.regularizers, name)(-1)


def test_sum_of_nothing():
    with pytest.raises(ValueError, match="at least one"):
        loco.regularizers.sum_of()
