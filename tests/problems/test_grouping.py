import jax
import jax.numpy as jnp
import numpy as np

from locoprop_optax._problems.grouping import Grouped

LAYERS = {
    "a": {"w": jnp.ones((2, 3))},
    "b": {"w": jnp.full((2, 3), 2.0)},
    "c": {"w": jnp.full((4,), 3.0)},
    "d": {"w": jnp.full((2, 3), 4.0)},
}


def group(stack_dims=None, alone=()):
    dims = {path: 0 for path in LAYERS} | (stack_dims or {})
    return Grouped.of(LAYERS, dims, alone)


def test_equal_layers_are_stacked_and_others_carry_no_axis():
    shapes = [jax.tree.leaves(value)[0].shape for value in group().values]
    assert shapes == [(3, 2, 3), (4,)]


def test_layers_that_stay_alone():
    shapes = [jax.tree.leaves(v)[0].shape for v in group(alone=("a", "b")).values]
    assert shapes == [(2, 3), (2, 3), (4,), (2, 3)]


def test_a_function_sees_single_layers():
    def total(layer, other):
        assert layer["w"].shape in ((2, 3), (4,), (3,))
        return jnp.sum(layer["w"]) * other

    grouped = group(stack_dims={"d": 1})
    others = {"a": 1.0, "b": 2.0, "c": 3.0, "d": jnp.asarray([4.0, 5.0])}
    found = grouped.map(total, grouped.like(others)).to_layers()
    expected = {"a": 6.0, "b": 24.0, "c": 36.0, "d": [48.0, 60.0]}
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value)


def test_unzip_parts_tuples():
    doubled, halved = group().map(lambda la: (2 * la["w"], la["w"] / 2)).unzip()
    for path, layer in LAYERS.items():
        np.testing.assert_allclose(doubled.to_layers()[path], 2 * layer["w"])
        np.testing.assert_allclose(halved.to_layers()[path], layer["w"] / 2)
