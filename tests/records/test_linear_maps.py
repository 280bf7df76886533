"""A layer is its design matrix times its kernel, whatever its kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from locoprop_optax._records.linear_maps import (
    DENSE,
    Convolution,
    Factor,
    Lookup,
    Product,
)

CASES = {
    "dense": (DENSE, (7, 4), (4, 3), (3,)),
    "one example": (DENSE, (4,), (4, 3), (3,)),
    "two axes summed": (Product(2, 1), (5, 2, 4), (2, 4, 3), (3,)),
    "two axes of outputs": (Product(1, 2), (5, 6, 4), (4, 2, 3), (2, 3)),
    "convolution": (
        Convolution((1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1)),
        (2, 5, 5, 3),
        (3, 3, 3, 4),
        (4,),
    ),
    "strided in groups": (
        Convolution((2,), ((0, 1),), (1,), (2,), groups=2),
        (2, 9, 4),
        (3, 2, 6),
        (6,),
    ),
    "transposed": (
        Convolution((1,), ((2, 1),), (2,), (1,)),
        (2, 4, 3),
        (3, 3, 2),
        (2,),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_design_times_the_kernel(name, has_bias, float64):
    linear_map, inputs, kernel, bias = CASES[name]
    draw = iter(jax.random.split(jax.random.key(0), 3))
    x = jax.random.normal(next(draw), inputs)
    params = {"kernel": jax.random.normal(next(draw), kernel)}
    if has_bias:
        params["bias"] = jax.random.normal(next(draw), bias)
    matrix = linear_map.to_matrix(params)
    expected = linear_map.design(params, x) @ matrix
    found = linear_map(params, x)
    np.testing.assert_allclose(
        found, jnp.moveaxis(expected, 0, 1).reshape(found.shape), atol=1e-12
    )
    back = linear_map.from_matrix(matrix, like=params)
    for key, leaf in params.items():
        np.testing.assert_array_equal(back[key], leaf)


@pytest.mark.parametrize("name", CASES)
def test_squares_are_the_diagonal_of_the_design_times_itself(name):
    linear_map, inputs, kernel, _ = CASES[name]
    x = jax.random.normal(jax.random.key(0), inputs)
    params = {"kernel": jnp.ones(kernel)}
    design = linear_map.design(params, x)
    expected = jnp.einsum("gni,gni->gi", design, design)
    np.testing.assert_allclose(linear_map.squares(params, x), expected, rtol=1e-6)


ROWS = jnp.asarray([[0, 2, 2], [5, 1, 2]])  # the table has no row 5
DIAGONAL = {
    "lookup": (Lookup(), ROWS, (4, 3)),
    "clipping lookup": (Lookup(clips=True), ROWS, (4, 3)),
    "summand": (Lookup(fixed=True), jnp.zeros((2, 5), int), (1, 3)),
    "summand, of rows": (
        Lookup(fixed=True),
        jnp.broadcast_to(jnp.arange(4), (2, 4)),
        (5, 3),
    ),
    "factor": (Factor(), jnp.arange(30.0).reshape(2, 5, 3), (3,)),
}


@pytest.mark.parametrize("name", DIAGONAL)
def test_squares_are_the_diagonal_of_the_jacobian_times_itself(name, float64):
    linear_map, x, shape = DIAGONAL[name]
    kernel = jax.random.normal(jax.random.key(0), shape)
    jacobian = jax.jacobian(lambda kernel: linear_map({"kernel": kernel}, x))(kernel)
    jacobian = jacobian.reshape(-1, kernel.size)
    diagonal = jnp.diag(jacobian.T @ jacobian).reshape(shape)
    np.testing.assert_allclose(jacobian.T @ jacobian, jnp.diag(diagonal.ravel()))
    squares = linear_map.squares({"kernel": kernel}, x)
    spread = squares[..., None] * linear_map.to_matrix({"kernel": jnp.ones(shape)})
    found = linear_map.from_matrix(spread, like={"kernel": kernel})["kernel"]
    np.testing.assert_allclose(found, diagonal)


def test_rows_of_several_calls_are_joined():
    parts = [jnp.ones((2, 5, 4)), jnp.ones((3, 5, 4))]
    assert DENSE.join_inputs(parts, 0).shape == (5, 5, 4)
    parts = [jnp.ones((2, 5, 4)), jnp.ones((3, 4)), jnp.ones(4)]
    assert DENSE.join_inputs(parts, 0).shape == (14, 4)
    stacked = [jnp.ones((6, 2, 5, 4)), jnp.ones((6, 3, 4))]
    assert DENSE.join_inputs(stacked, 1).shape == (6, 13, 4)
    assert Lookup().join_inputs([jnp.ones((2, 5), int)] * 2, 0).shape == (4, 5)
    assert Lookup().join_inputs([ROWS, ROWS[0]], 0).shape == (9,)
    assert Product(1, 2).join_outputs([jnp.ones((2, 3, 4))] * 2, 0).shape == (4, 3, 4)
