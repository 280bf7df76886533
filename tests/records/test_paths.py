import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from locoprop_optax._records.paths import matches, paths_of

TREE = {
    "encoder": [{"kernel": 1, "bias": 2}, {"kernel": 3}],
    "norm": {"scale": 4, "bias": 5},
}
PATHS = [
    "encoder/0/bias",
    "encoder/0/kernel",
    "encoder/1/kernel",
    "norm/bias",
    "norm/scale",
]


def test_paths_in_the_order_of_the_leaves():
    assert paths_of(TREE) == PATHS
    assert paths_of(7) == [""]


def test_masked_parameters_have_paths():
    assert paths_of({"a": {"b": optax.MaskedNode(), "c": 1}}) == ["a/b", "a/c"]


def test_boxes_have_none():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    assert paths_of(nnx.state(model)) == ["bias", "kernel"]


def test_keys_with_a_slash_are_quoted():
    assert paths_of({"a/b": 1, "a": {"b": 2}}) == ["a/b", "'a/b'"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (None, []),
        ("encoder/*", PATHS[:3]),
        (["norm/*", "*/1/*"], PATHS[2:]),
        (lambda path: path.endswith("bias"), [PATHS[0], PATHS[3]]),
    ],
)
def test_patterns(pattern, expected):
    assert [path for path in PATHS if matches(pattern, path)] == expected


def test_paths_need_no_arrays():
    assert paths_of(jax.eval_shape(lambda: {"a": jnp.ones(3)})) == ["a"]
