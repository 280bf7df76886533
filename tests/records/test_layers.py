import jax.numpy as jnp
import numpy as np
import optax
import pytest

from locoprop_optax._layers import (
    LayerSelection,
    layers_of,
    matches,
    visible,
    with_layers,
)

TREE = {
    "encoder": [{"kernel": 1, "bias": 2}, {"kernel": 3}],
    "norm": {"scale": 4, "bias": 5},
}


def test_layers_by_path_and_name():
    assert layers_of(TREE) == {
        "encoder/0": {"kernel": 1, "bias": 2},
        "encoder/1": {"kernel": 3},
        "norm": {"scale": 4, "bias": 5},
    }


def test_bare_parameters_have_the_empty_path():
    assert layers_of({"kernel": 1}) == {"": {"kernel": 1}}
    assert layers_of(7) == {"": {"": 7}}


def test_what_a_tree_holds_may_be_a_subtree():
    held = {
        "encoder": [{"kernel": {"a": 1}, "bias": ()}, {"kernel": 3}],
        "norm": {"scale": (1, 2), "bias": 0},
    }
    assert layers_of(held, like=TREE)["norm"]["scale"] == (1, 2)


def test_with_layers_puts_back_what_layers_of_takes():
    doubled = {
        path: {name: 2 * leaf for name, leaf in leaves.items()}
        for path, leaves in layers_of(TREE).items()
    }
    assert layers_of(with_layers(TREE, doubled)) == doubled
    assert with_layers(TREE, {}) == TREE


def test_masks_are_seen_and_dropped():
    tree = {"a": {"kernel": optax.MaskedNode(), "bias": 1}}
    assert set(layers_of(tree)["a"]) == {"kernel", "bias"}
    assert visible(layers_of(tree)) == {"a": {"bias": 1}}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (None, []),
        ("encoder/*", ["encoder/0", "encoder/1"]),
        (["norm", "*/1"], ["encoder/1", "norm"]),
        (lambda path: path.endswith("0"), ["encoder/0"]),
    ],
)
def test_patterns(pattern, expected):
    assert [path for path in layers_of(TREE) if matches(pattern, path)] == expected


def test_selection():
    def local(**options):
        return list(visible(layers_of(LayerSelection(**options).mask(TREE))))

    assert local() == ["encoder/0", "encoder/1"]
    assert local(exclude="*/0") == ["encoder/1"]
    assert local(include="norm") == ["encoder/0", "encoder/1", "norm"]
    assert local(include="norm", exclude="norm") == ["encoder/0", "encoder/1"]


def test_bare_arrays_are_not_local():
    assert LayerSelection().mask(jnp.ones(3)) == optax.MaskedNode()
    assert np.ndim(LayerSelection().mask({"kernel": np.ones(3)})["kernel"]) == 1
