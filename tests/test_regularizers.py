import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import locoprop_optax as loco
from tests.helpers import layers, random_layer

pytestmark = pytest.mark.usefixtures("float64")


@given(
    layers,
    st.sampled_from([loco.regularizers.none(), loco.regularizers.squared_l2(0.7)]),
)
def test_gradient_and_curvature_belong_to_the_value(drawn, regularizer):
    params, _ = random_layer(**drawn)
    step, _ = random_layer(**{**drawn, "seed": drawn["seed"] // 2})
    expected = jax.grad(lambda s: regularizer.value(s, params))(step)
    for name, gradient in regularizer.gradient(step, params).items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-12)
        np.testing.assert_allclose(gradient, regularizer.curvature * step[name])


def test_strength_must_not_be_negative():
    with pytest.raises(ValueError, match="strength must not be negative, got -1"):
        loco.regularizers.squared_l2(-1)
