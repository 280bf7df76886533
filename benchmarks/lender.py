"""Optimizers of other frameworks, as transformations of optax.

The gradients go to a process of its own, and the parameters come back, so that any
model of this one can be trained. The time of a step has the exchange within it.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.experimental import io_callback
from jax.flatten_util import ravel_pytree

from benchmarks import peer


class Lent(NamedTuple):
    """An optimizer that runs elsewhere.

    Attributes:
      optimizer: it.
      about: what is to be reported of it.
    """

    optimizer: optax.GradientTransformation
    about: Callable[[], dict[str, Any]]


@contextmanager
def lent(
    python: Path, script: str, params: Any, settings: Mapping[str, Any]
) -> Iterator[Lent]:
    """Starts an optimizer, and ends it with the block.

    Args:
      python: the interpreter of its environment.
      script: its name in `benchmarks/peers`, such as "torch_steps".
      params: what it starts from; it keeps them, so that one run uses it.
      settings: what the script's docstring lists.
    """
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
    arrays = {f"param_{i}": leaf for i, leaf in enumerate(leaves)}
    with peer.launch(python, script, arrays, settings) as running:
        shape = sum(leaf.size for leaf in leaves)
        exchange = np.memmap(running.folder / "exchange", np.float32, "r+", shape=shape)
        about: dict[str, Any] = {"peer_versions": running.versions}

        def step(gradients):
            exchange[:] = gradients
            about.update(running.ask())
            return np.array(exchange)

        def update(updates, state, params=None):
            flat, unravel = ravel_pytree(updates)
            moved = unravel(io_callback(step, flat, flat))
            return jax.tree.map(lambda new, old: new - old, moved, params), state

        optimizer = optax.GradientTransformation(lambda params: (), update)
        yield Lent(optimizer, lambda: about)
