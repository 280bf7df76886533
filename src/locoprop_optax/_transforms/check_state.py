"""Does a saved state fit the optimizer that is to go on with it?"""

from typing import Any

import jax

_SHOWN = 10


def check_state(saved: Any, expected: Any) -> None:
    """Checks that a saved state has the form of the state that is to be restored.

    A checkpoint of another model, solver or version holds other arrays, or arrays of
    other shapes. Trees are compared by the paths of their leaves, so that the metadata
    of an Orbax checkpoint can be compared, which has dictionaries where the state has
    tuples.

    Args:
      saved: a tree whose leaves have a shape and a dtype, such as
        `manager.item_metadata(step).tree` of an Orbax `CheckpointManager`.
      expected: the state, of this model and this optimizer.

    Raises:
      ValueError: if they differ; the message names what does, with both forms.

    Example:
      >>> import jax.numpy as jnp
      >>> import locoprop_optax as loco
      >>> loco.check_state({"kernel": jnp.ones((2, 3))}, {"kernel": jnp.ones((2, 4))})
      Traceback (most recent call last):
      ...
      ValueError: The saved state is not of this model, optimizer and version:
      - kernel: saved as float32[2, 3], expected float32[2, 4]
      Restore it with those that it was saved with, or begin anew.
    """
    found, wanted = _forms(saved), _forms(expected)
    # Parameters first, which are nested least: they explain what the state lacks.
    paths = sorted(found.keys() | wanted.keys(), key=lambda p: (p.count("/"), p))
    differences = [
        f"- {path}: saved as {found.get(path, 'nothing')}, "
        f"expected {wanted.get(path, 'nothing')}"
        for path in paths
        if found.get(path) != wanted.get(path)
    ]
    if not differences:
        return
    shown, more = differences[:_SHOWN], len(differences) - _SHOWN
    raise ValueError(
        "\n".join(
            [
                "The saved state is not of this model, optimizer and version:",
                *shown,
                *([f"- and {more} more"] if more > 0 else []),
                "Restore it with those that it was saved with, or begin anew.",
            ]
        )
    )


def _forms(tree: Any) -> dict[str, str]:
    """The form of each leaf, by its path."""
    forms = {}
    for key_path, leaf in jax.tree.leaves_with_path(tree):
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        if not hasattr(leaf, "shape"):
            leaf = jax.typeof(leaf)
        forms[path] = f"{leaf.dtype}{list(leaf.shape)}"
    return forms
