"""What a solver is."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array

from locoprop_optax._local_problem import LocalProblems


class Solver(NamedTuple):
    """A solver, as a pair of pure functions.

    Attributes:
      init: from the tree of local parameters to the solver's state, in which any
        tree of one value per parameter has the structure of that tree.
      solve: from (problems, state, count) to (tree of steps, new state).
    """

    init: Callable[[Any], Any]
    solve: Callable[[LocalProblems, Any, Array], tuple[Any, Any]]
