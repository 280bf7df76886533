"""How parameters are named: by the path of their keys, joined by "/"."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import jax
import optax

PathPattern: TypeAlias = str | Sequence[str] | Callable[[str], bool]


def matches(pattern: PathPattern | None, path: str) -> bool:
    """Whether a path fits a glob, one of several globs, or a predicate."""
    if pattern is None:
        return False
    if callable(pattern):
        return bool(pattern(path))
    globs = (pattern,) if isinstance(pattern, str) else pattern
    return any(fnmatchcase(path, glob) for glob in globs)


def path_of(key_path: Sequence[Any]) -> str:
    """The name of a parameter; a key that holds a "/" is quoted."""
    if len(key_path) > 1 and key_path[-1] == jax.tree_util.GetAttrKey("value"):
        key_path = key_path[:-1]  # the box around the parameter
    keys = (jax.tree_util.keystr((key,), simple=True) for key in key_path)
    return "/".join(repr(key) if "/" in key else key for key in keys)


def paths_of(params: Any) -> list[str]:
    """The names of all parameters, masked ones too, in the order of their leaves."""
    return [path_of(k) for k, _ in jax.tree.leaves_with_path(params, is_leaf=is_masked)]


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their names, masked ones too."""
    leaves = jax.tree.leaves(tree, is_leaf=is_masked)
    return dict(zip(paths_of(tree), leaves, strict=True))


def map_by_path(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """Applies a function of a parameter's name and its leaf, masked ones too."""
    return jax.tree.map_with_path(
        lambda key_path, leaf: function(path_of(key_path), leaf),
        tree,
        is_leaf=is_masked,
    )


def is_masked(node: Any) -> bool:
    """Whether an outer Optax transformation hides this parameter."""
    return isinstance(node, optax.MaskedNode)
