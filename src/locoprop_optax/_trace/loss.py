"""Where a traced loss is cut: at the last values in which the rest of it is convex.

The Gauss-Newton model of a loss takes what is before the cut as linear in the
parameters, and what is behind it with its whole curvature.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from locoprop_optax._records.layers import Cut
from locoprop_optax._trace import primitives
from locoprop_optax._trace.graph import Equation, Graph, is_number, run
from locoprop_optax._trace.transfer import matching_of_loss, stand_ins
from locoprop_optax._trace.uses import Reading
from locoprop_optax._utils.sharding import off_mesh
from locoprop_optax.losses._transfers import Transfer, known_transfers

_TRIALS = 12
_ITERATIONS = 16
_LARGEST_TEST = 2**22


def find_cut(
    graph: Graph, reading: Reading, count: int, matched: Mapping[int, Transfer]
) -> Cut:
    """Cuts a loss, whose first inputs are so many parameters.

    Behind the cut no parameter meets an activation but in a sum. If the rest of the
    loss is not convex there, the cut moves on; it also does so, behind a temperature
    for instance, to where the loss is a matching loss.

    Args:
      graph: the loss.
      reading: how it reads its parameters.
      count: the number of these.
      matched: numbers of which the loss is known to be the matching loss.
    """
    parameters = {number: at for at, number in enumerate(graph.inputs[:count])}
    known = [t for t in known_transfers().values() if t.conjugate is not None]
    first: Cut | None = None
    with jax.ensure_compile_time_eval(), off_mesh():
        for values, params in _places(graph, reading, parameters):
            transfers = tuple(
                matched.get(value) or matching_of_loss(graph, value, set(values), known)
                for value in values
            )
            matches = all(transfers)
            if first is not None and not matches:
                continue
            numbers = [graph.inputs[at] for at in params]
            if (matches and not params) or _is_convex(graph, [*values, *numbers]):
                places = tuple(map(graph.place_of, values))
                cut = Cut(places, params, transfers, len(graph.equations))
                if matches:
                    return cut
                first = cut
    return first or Cut((), (), (), len(graph.equations))


def _places(
    graph: Graph, reading: Reading, parameters: dict[int, int]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The places where a loss may be cut, from the first on.

    Yields:
      The values at the cut, and the parameters that are read behind it.
    """
    active, alone = _activations(graph, reading, set(parameters))
    given = {use.position: use.preactivation for use in reading.uses if use.outermost}
    stops = set()
    for equation in graph.equations:
        if equation.position in given:
            stops.add(given[equation.position])
        elif _joins(equation, active, alone):
            stops.update(equation.outputs)
    fixed = {*graph.inputs, *graph.held}
    tail = graph.leading_to([graph.results[0]], fixed | stops)

    def cut(rest: Sequence[Equation]):
        made = {number for equation in rest for number in equation.outputs}
        read = {n for equation in rest for n in equation.inputs if is_number(n)}
        outer = read - made
        params = sorted(parameters[n] for n in outer if n in parameters)
        return tuple(sorted(outer & active)), tuple(params)

    first = cut(tail)
    yield first
    trials, seen = 0, {first}
    for start in range(1, len(tail)):
        values, params = cut(tail[start:])
        few = len(values) + len(params) <= max(1, len(first[0]) + len(first[1]))
        if few and (values, params) not in seen and trials < _TRIALS:
            seen.add((values, params))
            trials += 1
            yield values, params


def _activations(
    graph: Graph, reading: Reading, parameters: set[int]
) -> tuple[set[int], set[int]]:
    """The numbers that depend on parameters: with something else, and alone.

    Something else meets a parameter in a product, in a lookup, and in a function.
    """
    products = {use.position for use in reading.uses}
    active: set[int] = set()
    alone = set(parameters)
    for equation in graph.equations:
        inputs = set(filter(is_number, equation.inputs))
        if not active.isdisjoint(inputs):
            active.update(equation.outputs)
        elif not alone.isdisjoint(inputs):
            meets = (
                equation.position in products
                or equation.primitive == primitives.LOOKUP
                or bool(primitives.functions_in(equation.source))
            )
            (active if meets else alone).update(equation.outputs)
    return active, alone


def _joins(equation: Equation, active: set[int], alone: set[int]) -> bool:
    """Whether a parameter meets an activation in an equation, other than in a sum."""
    inputs = set(filter(is_number, equation.inputs))
    begins = active.isdisjoint(inputs) and not active.isdisjoint(equation.outputs)
    meets = not active.isdisjoint(inputs) and not alone.isdisjoint(inputs)
    return begins or (meets and equation.primitive not in primitives.SUMS)


def tail_of(graph: Graph, numbers: Sequence[int]) -> list[Equation]:
    """The equations from some numbers to the loss."""
    return graph.leading_to([graph.results[0]], {*graph.inputs, *graph.held, *numbers})


def _is_convex(graph: Graph, numbers: Sequence[int]) -> bool:
    """Whether the rest of a loss is convex in some numbers, and not linear.

    Power iterations look for the most negative eigenvalue of the Hessian at random
    points near zero and far from it, with random numbers in place of everything else.
    """
    if sum(graph.avals[n].size for n in numbers) > _LARGEST_TEST:
        return True
    loss: Any = graph.results[0]
    tail = tail_of(graph, numbers)
    rng = np.random.default_rng(0)
    others = stand_ins(graph, tail, set(numbers), rng)

    def loss_of(at):
        cast = {
            n: a.astype(graph.avals[n].dtype) for n, a in zip(numbers, at, strict=True)
        }
        return run(tail, {**others, **cast})[loss].astype(jnp.float32)

    def scaled(x, length):
        return jax.tree.map(lambda leaf: leaf / jnp.maximum(length, 1e-30), x)

    def norm(x):
        return jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in x))

    @jax.jit
    def extremes(at, start):
        def hvp(v):
            return jax.jvp(jax.grad(loss_of), (at,), (v,))[1]

        def largest(_, v):
            v = hvp(v)
            return scaled(v, norm(v))

        top = jax.lax.fori_loop(0, _ITERATIONS, largest, start)
        size = norm(hvp(top))

        def lowest(_, v):
            v = jax.tree.map(lambda h, u: h - 1.1 * size * u, hvp(v), v)
            return scaled(v, norm(v))

        bottom = jax.lax.fori_loop(0, _ITERATIONS, lowest, start)
        curved = hvp(bottom)
        return size, sum(jnp.vdot(a, b) for a, b in zip(bottom, curved, strict=True))

    is_linear, shapes = True, [graph.avals[n].shape for n in numbers]
    for distance in (1.5, 15.0):
        point, start = (
            [jnp.asarray(scale * rng.standard_normal(s), jnp.float32) for s in shapes]
            for scale in (distance, 1.0)
        )
        size, least = extremes(point, scaled(start, norm(start)))
        if not (jnp.isfinite(size) and least >= -1e-3 * size):
            return False
        is_linear = is_linear and bool(size == 0)
    return not is_linear
