"""Which parameters form a layer, and which layers have a local problem.

A layer is a module that owns parameters directly. It is named by its path in the
tree of parameters, its keys joined by "/".
"""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeAlias

import jax
import optax

PathPattern: TypeAlias = str | Sequence[str] | Callable[[str], bool]
LayerParams: TypeAlias = Mapping[str, jax.Array]


class LayerError(ValueError):
    """What is wrong with a layer, to be told with its name."""


def matches(pattern: PathPattern | None, path: str) -> bool:
    """Whether a path fits a glob, one of several globs, or a predicate."""
    if pattern is None:
        return False
    if callable(pattern):
        return bool(pattern(path))
    globs = (pattern,) if isinstance(pattern, str) else pattern
    return any(fnmatchcase(path, glob) for glob in globs)


def split_key_path(key_path: Sequence[Any]) -> tuple[str, str]:
    """Splits the key path of a parameter into its layer's path and its own name."""
    if len(key_path) > 1 and key_path[-1] == jax.tree_util.GetAttrKey("value"):
        key_path = key_path[:-1]  # the box around the parameter
    keys = [jax.tree_util.keystr((key,), simple=True) for key in key_path]
    return "/".join(keys[:-1]), "".join(keys[-1:])


def is_masked(node: Any) -> bool:
    """Whether an outer Optax transformation hides this parameter."""
    return isinstance(node, optax.MaskedNode)


class LayerSelection(NamedTuple):
    """The rule that says which layers have a local problem.

    Attributes:
      include: layers that own no `kernel` but are local all the same.
      exclude: layers that are not local although they own a `kernel`.
    """

    include: PathPattern | None = None
    exclude: PathPattern | None = None

    def is_local(self, path: str, names: Mapping[str, Any]) -> bool:
        """Whether the layer at `path`, which owns parameters `names`, is local."""
        owned = "kernel" in names or matches(self.include, path)
        return owned and not matches(self.exclude, path)

    def mask(self, params: Any) -> Any:
        """Puts a `MaskedNode` in place of each parameter that is not local."""
        layers = layers_of(params)

        def keep(key_path, leaf):
            path, _ = split_key_path(key_path)
            local = self.is_local(path, layers[path])
            return leaf if local else optax.MaskedNode()

        return tree_map_with_key_path(keep, params)


def tree_map_with_key_path(function: Callable[..., Any], tree: Any) -> Any:
    """`jax.tree.map_with_path` for which a `MaskedNode` is a leaf."""
    return jax.tree.map_with_path(function, tree, is_leaf=is_masked)


def layers_of(tree: Any, like: Any = None) -> dict[str, dict[str, Any]]:
    """What `tree` holds for each parameter of `like`, by layer path and name.

    Args:
      tree: a tree that has something at the place of each parameter, maybe a subtree.
      like: the parameters; default `tree` itself. Masked ones are leaves, too.
    """
    like = tree if like is None else like
    leaves, structure = jax.tree.flatten_with_path(like, is_leaf=is_masked)
    layers: dict[str, dict[str, Any]] = {}
    for (key_path, _), held in zip(leaves, structure.flatten_up_to(tree), strict=True):
        path, name = split_key_path(key_path)
        layers.setdefault(path, {})[name] = held
    return layers


def is_hidden(path: str, layers: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a `MaskedNode` stands for a layer as a whole, or for what it is in."""
    keys = path.split("/")
    above = (("/".join(keys[:i]), key) for i, key in enumerate(keys))
    return any(is_masked(layers.get(parent, {}).get(key)) for parent, key in above)


def anchor(leaves: Mapping[str, Any]) -> str:
    """The parameter that stands for a layer: its kernel, or else its largest."""
    if "kernel" in leaves:
        return "kernel"
    return max(sorted(leaves), key=lambda name: getattr(leaves[name], "ndim", 0))


def per_layer(values: Mapping[str, Any], params: Any) -> Any:
    """A tree like the parameters that has each layer's value at its anchor.

    All other places hold a `MaskedNode`.
    """
    anchors = {path: anchor(leaves) for path, leaves in layers_of(params).items()}

    def place(key_path, leaf):
        del leaf
        path, name = split_key_path(key_path)
        chosen = path in values and name == anchors[path]
        return values[path] if chosen else optax.MaskedNode()

    return tree_map_with_key_path(place, params)


def layer_values(tree: Any, params: Any) -> dict[str, Any]:
    """The inverse of `per_layer`, for the layers that are not masked."""
    held = layers_of(tree, like=params)
    seen = visible(layers_of(params))
    return {path: held[path][anchor(leaves)] for path, leaves in seen.items()}


def visible(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Drops what is masked, and layers of which nothing is left."""
    seen = {
        path: {name: leaf for name, leaf in leaves.items() if not is_masked(leaf)}
        for path, leaves in layers.items()
    }
    return {path: leaves for path, leaves in seen.items() if leaves}


def with_layers(tree: Any, layers: Mapping[str, Mapping[str, Any]]) -> Any:
    """`tree` with the leaves that `layers` names put in place of its own."""

    def replace(key_path, leaf):
        path, name = split_key_path(key_path)
        return layers.get(path, {}).get(name, leaf)

    return tree_map_with_key_path(replace, tree)
