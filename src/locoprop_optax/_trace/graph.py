"""A traced loss as a flat list of equations.

Calls are inlined, so that what consumes a pre-activation is found on whichever side of
a call it stands; loops and conditions keep functions of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import compress
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import eval_jaxpr
from jax.extend import core

from locoprop_optax._trace import primitives
from locoprop_optax._trace.primitives import Scan, branches, called
from locoprop_optax._utils.sharding import on_typed_mesh, was_on_typed_mesh

Atom = int | core.Literal
Position = tuple[int, ...]  # of an equation: the places of the calls around it, its own


@dataclass(frozen=True, eq=False)
class Equation:
    """One equation, its variables numbered, where it stands, and in which jaxpr."""

    source: core.JaxprEqn
    home: core.Jaxpr
    inputs: tuple[Atom, ...]
    outputs: tuple[int, ...]
    position: Position

    @property
    def primitive(self) -> core.Primitive:
        """What it does."""
        return self.source.primitive

    @property
    def params(self) -> dict[str, Any]:
        """How it does it."""
        return self.source.params

    @cached_property
    def bodies(self) -> list[Graph]:
        """The functions of a scan or a condition; of no other equation."""
        if self.primitive == primitives.SCAN:
            return [Graph.of(Scan.of(self.source).body, self.position)]
        if self.primitive == primitives.COND:
            return [
                Graph.of(branch, (*self.position, number))
                for number, branch in enumerate(branches(self.source))
            ]
        return []

    @property
    def offset(self) -> int:
        """How many of its inputs precede those of its functions."""
        return int(self.primitive == primitives.COND)

    def evaluate(self, operands: Sequence[Any], context: Any) -> list[Any]:
        """Its results for the values of its inputs, in the context of other equations.

        On a mesh whose types tell where arrays are, they are computed as they were
        traced, since a part of a loss may leave that to the compiler. Off such a mesh a
        sum over shards is that of one, nothing has a place, and a function is what it
        does, since a derivative rule would bring the mesh back.
        """
        on_mesh = on_typed_mesh()
        apart = was_on_typed_mesh(self.source.outvars[0]) and not on_mesh
        if apart and self.primitive in primitives.ON_MESH:
            return list(operands)
        body = called(self.source)
        if apart and self.primitive == primitives.CUSTOM_JVP and body is not None:
            inner = Graph.of(body)
            held = {n: np.asarray(v) for n, v in inner.held.items()}
            inputs: dict[Any, Any] = dict(zip(inner.inputs, operands, strict=True))
            return read(inner.results, run(inner.equations, inputs | held))
        invars = [_off_mesh(atom) for atom in self.source.invars]
        params = primitives.off_mesh(self.params) if apart else self.params
        context = self.source.ctx if on_mesh else context
        here = self.source.replace(ctx=context, invars=invars, params=params)
        return evaluate_alone(self.home, here, operands)


def evaluate_alone(
    home: core.Jaxpr, equation: core.JaxprEqn, operands: Sequence[Any]
) -> list[Any]:
    """The results of one equation of a jaxpr."""
    given = {
        var: value
        for var, value in zip(equation.invars, operands, strict=True)
        if not isinstance(var, core.Literal)
    }
    alone = home.replace(
        constvars=[], invars=list(given), outvars=equation.outvars, eqns=[equation]
    )
    return eval_jaxpr(alone, [], *given.values())


@dataclass
class Graph:
    """The equations of a trace, or of the function of a loop or condition in it.

    Attributes:
      equations: in the order of their execution.
      inputs: the arguments' numbers.
      results: the results' numbers.
      avals: the abstract value of each number.
      held: the values of the numbers that the trace closes over.
    """

    equations: list[Equation] = field(default_factory=list)
    inputs: tuple[int, ...] = ()
    results: tuple[Atom, ...] = ()
    avals: dict[int, Any] = field(default_factory=dict)
    held: dict[int, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, closed: core.ClosedJaxpr, position: Position = ()) -> Graph:
        """Flattens a jaxpr that stands at a position."""
        graph = cls()
        graph.inputs = tuple(graph._number(v) for v in closed.jaxpr.invars)
        graph.results = graph._inline(
            closed.jaxpr, closed.consts, graph.inputs, position
        )
        return graph

    def _number(self, var: Any) -> int:
        self.avals[len(self.avals)] = var.aval
        return len(self.avals) - 1

    def _inline(
        self,
        jaxpr: core.Jaxpr,
        consts: Sequence[Any],
        inputs: Sequence[Atom],
        position: Position,
    ) -> tuple[Atom, ...]:
        numbers: dict[Any, Atom] = dict(zip(jaxpr.invars, inputs, strict=True))
        for var, value in zip(jaxpr.constvars, consts, strict=True):
            numbers[var] = number = self._number(var)
            self.held[number] = value

        def look_up(atom) -> Atom:
            return atom if isinstance(atom, core.Literal) else numbers[atom]

        for place, equation in enumerate(jaxpr.eqns):
            here = (*position, place)
            operands = tuple(map(look_up, equation.invars))
            body = called(equation)
            if equation.primitive in _INLINED and body is not None:
                outputs = self._inline(body.jaxpr, body.consts, operands, here)
            else:
                outputs = tuple(self._number(v) for v in equation.outvars)
                kept = Equation(equation, jaxpr, operands, outputs, here)
                self.equations.append(kept)
            numbers.update(zip(equation.outvars, outputs, strict=True))
        return tuple(map(look_up, jaxpr.outvars))

    @cached_property
    def producers(self) -> dict[int, Equation]:
        """The equation that each number is a result of."""
        return {number: e for e in self.equations for number in e.outputs}

    @cached_property
    def places(self) -> dict[tuple[Position, int], int]:
        """The number of each result of each equation."""
        return {
            (equation.position, at): number
            for equation in self.equations
            for at, number in enumerate(equation.outputs)
        }

    def place_of(self, number: int) -> tuple[Position, int]:
        """Where the equation that makes a number stands, and which result it is."""
        producer = self.producers[number]
        return producer.position, producer.outputs.index(number)

    @cached_property
    def consumers(self) -> dict[int, list[int]]:
        """The positions in `equations` of those that read each number."""
        consumers: dict[int, list[int]] = {}
        for at, equation in enumerate(self.equations):
            for number in set(filter(is_number, equation.inputs)):
                consumers.setdefault(number, []).append(at)
        return consumers

    def dependents(self, starts: Iterable[int]) -> list[Equation]:
        """The equations that depend on some numbers, in order."""
        reached, numbers = set(), list(starts)
        while numbers:
            for at in set(self.consumers.get(numbers.pop(), ())) - reached:
                reached.add(at)
                numbers.extend(self.equations[at].outputs)
        return [self.equations[at] for at in sorted(reached)]

    def leading_to(self, wanted: Iterable[Atom], given: set[int]) -> list[Equation]:
        """The equations that make some numbers from others, in order."""
        needed, chosen = set(filter(is_number, wanted)) - given, []
        for equation in reversed(self.equations):
            if not needed.isdisjoint(equation.outputs):
                chosen.append(equation)
                needed.update(set(filter(is_number, equation.inputs)) - given)
        return chosen[::-1]

    def live(self, results: Iterable[Atom]) -> set[int]:
        """The numbers that the results depend on differentiably."""
        found = {n for n in results if is_number(n) and self._is_float(n)}
        for equation in reversed(self.equations):
            if found.isdisjoint(equation.outputs):
                continue
            operands = _live_operands(equation, found)
            found.update(n for n in operands if is_number(n) and self._is_float(n))
        return found

    def _is_float(self, number: int) -> bool:
        return jnp.issubdtype(self.avals[number].dtype, jnp.inexact)


def live_results(equation: Equation, body: Graph, live: set[int]) -> list[Atom]:
    """The results of a scan's or a condition's function that those live depend on."""
    wanted = [output in live for output in equation.outputs]
    if equation.primitive == primitives.SCAN:
        _, consts, carries, *_ = Scan.of(equation.source)
        while True:
            inside = body.live(compress(body.results, wanted))
            carried = body.inputs[consts : consts + carries]
            before, wanted[:carries] = (
                wanted[:carries],
                [
                    is_wanted or number in inside
                    for is_wanted, number in zip(wanted[:carries], carried, strict=True)
                ],
            )
            if before == wanted[:carries]:
                break
    return list(compress(body.results, wanted))


def _live_operands(equation: Equation, live: set[int]) -> list[Atom]:
    """The operands that an equation's live results depend on differentiably."""
    if equation.primitive == primitives.STOP_GRADIENT:
        return []
    if not equation.bodies:
        return list(equation.inputs)
    found = set()
    for body in equation.bodies:
        inside = body.live(live_results(equation, body, live))
        found.update(at for at, n in enumerate(body.inputs) if n in inside)
    return [equation.inputs[at + equation.offset] for at in found]


def run(equations: Sequence[Equation], values: Mapping[int, Any]) -> dict[int, Any]:
    """The values of all numbers, from those that are given."""
    known = dict(values)
    context = jax.make_jaxpr(jnp.negative)(0.0).eqns[0].ctx  # that of this place
    for equation in equations:
        results = equation.evaluate(read(equation.inputs, known), context)
        known.update(zip(equation.outputs, results, strict=True))
    return known


def read(atoms: Iterable[Atom], known: Mapping[int, Any]) -> list[Any]:
    """The values of atoms, literals off the mesh of their trace."""
    plain = map(_off_mesh, atoms)
    return [a.val if isinstance(a, core.Literal) else known[a] for a in plain]


def _off_mesh(atom: Any) -> Any:
    """A literal without the mesh of its trace; a variable as it is."""
    if not isinstance(atom, core.Literal):
        return atom
    return core.Literal(np.asarray(atom.val), atom.aval)


def is_number(atom: Atom) -> TypeGuard[int]:
    """Whether an atom is a variable."""
    return isinstance(atom, int)


_INLINED = primitives.CALLS | {primitives.REMAT}
