import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import locoprop_optax as loco
from tests.helpers import layers, random_layer

pytestmark = pytest.mark.usefixtures("float64")


@given(layers, st.floats(0.01, 20))
def test_gradient_descent_is_gamma_times_the_cotangents(drawn, gamma):
    params, layer = random_layer(**drawn)
    target = loco.targets.gradient_descent(gamma)
    state = target.init(params["kernel"])
    displacement, _ = target.update(layer, None, state, jnp.zeros((), int))
    np.testing.assert_allclose(displacement.outputs, gamma * layer.cotangents)
    np.testing.assert_allclose(
        displacement.gradient["kernel"], gamma * layer.gradient["kernel"]
    )


def test_normalized_follows_its_formula_over_batches():
    gamma, decay, moment = 0.05, 0.9, 0.0
    target = loco.targets.normalized(gamma, decay)
    params, _ = random_layer(0, 6, 4, 3)
    state = target.init(params["kernel"])
    for k in range(4):
        n = 6 + k
        _, layer = random_layer(k, n, 4, 3)
        displacement, state = target.update(layer, None, state, jnp.asarray(k))
        per_example = n * np.asarray(layer.cotangents)
        moment = decay * moment + (1 - decay) * np.mean(per_example**2)
        scale = gamma / np.sqrt(moment / (1 - decay ** (k + 1)))
        np.testing.assert_allclose(displacement.outputs, scale * per_example)
        np.testing.assert_allclose(
            displacement.gradient["bias"], scale * per_example.sum(0)
        )


def test_normalized_takes_as_many_rows_as_a_large_image_has():
    params, layer = random_layer(0, 50_000, 2, 1)
    target = loco.targets.normalized(0.05)
    displacement, _ = target.update(
        layer, None, target.init(params["kernel"]), jnp.zeros((), jnp.int32)
    )
    rms = np.sqrt(np.mean(np.asarray(layer.cotangents) ** 2))
    np.testing.assert_allclose(displacement.outputs, 0.05 * layer.cotangents / rms)


def test_normalized_by_unit():
    params, layer = random_layer(0, 6, 4, 3)
    target = loco.targets.normalized(0.05, by_unit=True)
    state = target.init(params["kernel"])
    displacement, state = target.update(layer, None, state, jnp.zeros((), int))
    rms = np.sqrt(np.mean(np.asarray(layer.cotangents) ** 2, axis=0))
    np.testing.assert_allclose(displacement.outputs, 0.05 * layer.cotangents / rms)
    assert displacement.gradient is None, "to be computed"
    assert state.shape == (3,)
    with pytest.raises(ValueError, match=r"last axis counts 4, but .* 3 units"):
        target.update(layer, None, target.init(params["kernel"].T), jnp.zeros((), int))


@given(layers, st.floats(1e-6, 1e6))
def test_normalized_does_not_see_the_scale_of_the_loss(drawn, scale):
    params, layer = random_layer(**drawn)
    target = loco.targets.normalized(0.1)
    moved = [
        target.update(
            loco.LayerIntermediates(
                layer.inputs, layer.preactivations, s * layer.cotangents, {}
            ),
            None,
            target.init(params["kernel"]),
            jnp.zeros((), int),
        )[0].outputs
        for s in (1.0, scale)
    ]
    np.testing.assert_allclose(*moved, rtol=1e-9)


def test_normalized_leaves_a_layer_without_gradient_where_it_is():
    params, layer = random_layer(0, 6, 4, 3)
    silent = loco.LayerIntermediates(
        layer.inputs, layer.preactivations, 0 * layer.cotangents, {}
    )
    target = loco.targets.normalized(0.1)
    displacement, _ = target.update(
        silent, None, target.init(params["kernel"]), jnp.zeros((), int)
    )
    np.testing.assert_array_equal(displacement.outputs, 0)


@pytest.mark.parametrize(
    "make", [loco.targets.gradient_descent, loco.targets.normalized]
)
@pytest.mark.parametrize("gamma", [0.0, -1.0])
def test_gamma_must_be_positive(make, gamma):
    with pytest.raises(ValueError, match=f"γ.* must be positive, got {gamma}"):
        make(gamma)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decay_must_be_a_share(decay):
    with pytest.raises(ValueError, match="decay must be in"):
        loco.targets.normalized(0.1, decay)
