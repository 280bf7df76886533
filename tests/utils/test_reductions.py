"""Sums over trees are those of their arrays, small and large."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from locoprop_optax._utils.reductions import SMALL, all_finite, inner, joined, norms


def tree(seed):
    draw = np.random.default_rng(seed).normal
    large, small = (2, SMALL), (3, 4)
    return {"a": jnp.asarray(draw(size=small)), "b": jnp.asarray(draw(size=large))} | {
        f"c{n}": jnp.asarray(draw(size=n)) for n in (1, 5)
    }


def test_small_arrays_are_one():
    assert sorted(leaf.size for leaf in joined(tree(0))) == [18, 2 * SMALL]


@pytest.mark.usefixtures("float64")
def test_inner_product():
    first, second = tree(0), tree(1)
    expected = sum(np.vdot(first[name], second[name]) for name in first)
    np.testing.assert_allclose(inner(first, second), expected, rtol=1e-12)


@pytest.mark.usefixtures("float64")
def test_norms_are_in_the_order_of_the_arrays():
    arrays = jax.tree.leaves(tree(0))
    expected = [np.linalg.norm(np.ravel(array)) for array in arrays]
    np.testing.assert_allclose(norms(arrays), expected, rtol=1e-12)


@pytest.mark.parametrize("name", tree(0))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_seen_anywhere(name, bad):
    numbers = tree(0) | {"count": jnp.zeros((), jnp.int32)}
    assert all_finite(numbers)
    spoiled = numbers[name].ravel().at[-1].set(bad)
    assert not all_finite(numbers | {name: spoiled})


def test_bits_are_added_in_float32():
    halves = [jnp.full(SMALL, 1e-3, jnp.bfloat16)] * 2
    assert inner(*halves).dtype == jnp.float32
