"""What a solver is."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from locoprop_optax._problems.problem import LocalProblem, LocalProblems
from locoprop_optax._records.layers import Layer
from locoprop_optax._records.linear_maps import LayerParams

T = TypeVar("T")


def _as_it_is(problems: LocalProblems, state: Any, count: Array) -> Any:
    del problems, count
    return state


class Solver(NamedTuple):
    """A solver, as pure functions.

    Attributes:
      init: from the layers' parameters, by path and by name, and the layers by path,
        to the solver's state.
      solve: from (problems, state, count) to (steps, new state), steps in the form of
        the parameters.
      refresh: from (problems, state, count) to the state with what is known of the
        curvature made anew, before `solve`, but not at every step. Default: nothing is.
      scales_gradient: whether the step follows the gradient at a rate of the solver's
        own, so that penalties belong into its problems. Otherwise their gradient is
        added to the step as it is, and does not go through an inverse of curvature.
    """

    init: Callable[[Mapping[str, LayerParams], Mapping[str, Layer]], Any]
    solve: Callable[[LocalProblems, Any, Array], tuple[Any, Any]]
    refresh: Callable[[LocalProblems, Any, Array], Any] = _as_it_is
    scales_gradient: bool = False


def repeat(
    advance: Callable[[T, Any], T], start: T, numbers: range, *problems: LocalProblem
) -> T:
    """Local steps, one for each number: in a loop, which compiles one of them.

    With convolutions they are written out. In a loop, XLA takes many times as long for
    a convolution's gradient on a CPU.

    Args:
      advance: from (step, number) to the next step.
      start: the step so far.
      numbers: those of the steps to take.
      *problems: whose gradients the steps need.
    """
    if not any(problem.linear_map.is_convolution for problem in problems):
        body = lambda step, number: (advance(step, number), None)  # noqa: E731
        return jax.lax.scan(body, start, jnp.arange(numbers.start, numbers.stop))[0]
    for number in numbers:
        start = advance(start, number)
    return start
