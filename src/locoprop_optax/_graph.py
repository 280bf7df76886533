"""A traced loss as a flat list of equations in which captured layers stand out.

A *tap* is an identity put around a layer's pre-activation while a loss is traced. It
also takes a stand-in for the layer's probe, so that the trace shows whether a probe
would reach the layer whole.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer, eval_jaxpr
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from locoprop_optax._sharding import among_shards, was_among_shards

tap_p = core.Primitive("locoprop_tap")


def _identity(probe: Any, kernel: Any, preactivations: Any, **params: Any) -> Any:
    del probe, kernel, params
    return preactivations


tap_p.def_abstract_eval(_identity)
tap_p.def_impl(_identity)
mlir.register_lowering(tap_p, mlir.lower_fun(_identity, multiple_results=False))


def tap(
    probe: jax.Array,
    kernel: jax.Array,
    preactivations: jax.Array,
    *,
    layer: str,
    number: int,
    note: Any,
) -> jax.Array:
    """Marks a layer's pre-activation in a trace; `note` is hashable and kept there."""
    operands = (probe, kernel, preactivations)
    return tap_p.bind(*operands, layer=layer, number=number, note=note, broadcast=False)


def _batch_tap(operands, dims, *, broadcast, **params):
    probe_dim, _, dim = dims
    broadcast = broadcast or (dim is not None and probe_dim is None)
    return tap_p.bind(*operands, broadcast=broadcast, **params), dim


def _differentiate_tap(primals, tangents, **params):
    return tap_p.bind(*primals, **params), tangents[2]


batching.primitive_batchers[tap_p] = _batch_tap
ad.primitive_jvps[tap_p] = _differentiate_tap

Atom = int | core.Literal


class Equation(NamedTuple):
    """One equation, its variables numbered, and the jaxpr that it stands in."""

    source: core.JaxprEqn
    home: core.Jaxpr
    inputs: tuple[Atom, ...]
    outputs: tuple[int, ...]

    @property
    def primitive(self) -> core.Primitive:
        """What it does."""
        return self.source.primitive

    @property
    def params(self) -> dict[str, Any]:
        """How it does it."""
        return self.source.params

    def holds_tap_of(self, layer: str) -> bool:
        """Whether it is a tap of a layer, or runs one."""
        return layer in layers_in(self.source)

    def evaluate(self, operands: Sequence[Any], context: Any) -> list[Any]:
        """Its results for the values of its inputs, in the context of other equations.

        They are computed where this is called, and not on the mesh of the trace. For
        one shard alone a sum over shards is its own, and a function is what it does,
        since a derivative rule would bring the mesh back.
        """
        apart = was_among_shards(self.source.outvars[0]) and not among_shards()
        if apart and self.primitive.name in _OVER_SHARDS:
            return list(operands)
        body = body_of(self.params)
        runs = _CALLS | {"custom_jvp_call"} if apart else _CALLS
        if self.primitive.name in runs and body is not None:
            called = Graph.of(body)
            held = {n: np.asarray(v) if apart else v for n, v in called.held.items()}
            inputs: dict[Any, Any] = dict(zip(called.inputs, operands, strict=True))
            known = run(called.equations, inputs | held)
            return _read(called.results, known)
        given = {
            var: value
            for var, value in zip(self.source.invars, operands, strict=True)
            if not isinstance(var, core.Literal)
        }
        invars = [_off_mesh(atom) for atom in self.source.invars]
        alone = self.home.replace(
            constvars=[],
            invars=list(given),
            outvars=self.source.outvars,
            eqns=[self.source.replace(ctx=context, invars=invars)],
        )
        return eval_jaxpr(alone, [], *given.values())


@dataclass
class Graph:
    """The equations of a trace, or of the body of one of its loops.

    Attributes:
      equations: in the order of their execution.
      inputs: the arguments' numbers.
      results: the results' numbers.
      avals: the abstract value of each number.
      held: the values of the numbers that the trace closes over.
      wraps: the equations that hold taps and could not be inlined.
    """

    equations: list[Equation] = field(default_factory=list)
    inputs: tuple[Atom, ...] = ()
    results: tuple[Atom, ...] = ()
    avals: dict[int, Any] = field(default_factory=dict)
    held: dict[int, Any] = field(default_factory=dict)
    wraps: list[Equation] = field(default_factory=list)

    @classmethod
    def of(cls, closed: core.ClosedJaxpr) -> "Graph":
        """Flattens a jaxpr: calls that hold taps are inlined, others are kept."""
        graph = cls()
        graph.inputs = tuple(graph._number(v) for v in closed.jaxpr.invars)
        graph.results = graph._inline(closed.jaxpr, closed.consts, graph.inputs)
        return graph

    def _number(self, var: Any) -> int:
        self.avals[len(self.avals)] = var.aval
        return len(self.avals) - 1

    def _inline(
        self, jaxpr: core.Jaxpr, consts: Sequence[Any], inputs: Sequence[Atom]
    ) -> tuple[Atom, ...]:
        numbers: dict[Any, Atom] = dict(zip(jaxpr.invars, inputs, strict=True))
        for var, value in zip(jaxpr.constvars, consts, strict=True):
            numbers[var] = number = self._number(var)
            if value is not None:
                self.held[number] = value

        def read(atom) -> Atom:
            return atom if isinstance(atom, core.Literal) else numbers[atom]

        for equation in jaxpr.eqns:
            operands = tuple(map(read, equation.invars))
            name, params = equation.primitive.name, equation.params
            body = body_of(params)
            if name in _INLINED and body is not None and holds_tap(body.jaxpr):
                outputs = self._inline(body.jaxpr, body.consts, operands)
            else:
                outputs = tuple(self._number(v) for v in equation.outvars)
                kept = Equation(equation, jaxpr, operands, outputs)
                self.equations.append(kept)
                if any(map(holds_tap, _sub_jaxprs(params))):
                    self.wraps.append(kept)
            numbers.update(zip(equation.outvars, outputs, strict=True))
        return tuple(map(read, jaxpr.outvars))

    @cached_property
    def constants(self) -> dict[int, Any]:
        """The values of the numbers that are known while the loss is traced."""
        return {n: v for n, v in self.held.items() if not isinstance(v, Tracer)}

    @cached_property
    def makers(self) -> dict[int, Equation]:
        """The equation that each number is a result of."""
        return {number: e for e in self.equations for number in e.outputs}

    @cached_property
    def consumers(self) -> dict[int, list[int]]:
        """The positions of the equations that read each number."""
        consumers: dict[int, list[int]] = {}
        for at, equation in enumerate(self.equations):
            for number in set(filter(_is_number, equation.inputs)):
                consumers.setdefault(number, []).append(at)
        return consumers

    def after(self, start: int, until: str | None = None) -> list[Equation]:
        """The equations that depend on a number, in order.

        Not those that do so by way of a tap of the layer `until` alone.
        """
        reached, numbers = set(), [start]
        while numbers:
            for at in set(self.consumers.get(numbers.pop(), ())) - reached:
                equation = self.equations[at]
                if until is None or not equation.holds_tap_of(until):
                    reached.add(at)
                    numbers.extend(equation.outputs)
        return [self.equations[at] for at in sorted(reached)]

    def leading_to(self, wanted: Iterable[int], given: set[int]) -> list[Equation]:
        """The equations that make some numbers from others, in order."""
        needed, chosen = set(wanted) - given, []
        for equation in reversed(self.equations):
            if not needed.isdisjoint(equation.outputs):
                chosen.append(equation)
                needed.update(set(filter(_is_number, equation.inputs)) - given)
        return chosen[::-1]

    def read_past_taps(self) -> set[int]:
        """The positions of the inputs that the first result reads past all taps."""
        taps = [e for e in self.equations if layers_in(e.source)]
        known = {*self.inputs, *self.held, *(n for e in taps for n in e.outputs)}
        past = self.leading_to(filter(_is_number, self.results[:1]), known)
        read = {
            number
            for equation in past
            for number in equation.inputs
            if _is_number(number)
        }
        return {at for at, number in enumerate(self.inputs) if number in read}

    def used_apart(self, position: int, layer: str) -> bool:
        """Whether an input reaches a result by a product that is not its layer's own.

        A penalty on the input, elementwise and summed, is no such use.
        """
        start = self.inputs[position]
        if not isinstance(start, int):
            return False
        multiplied: set[int] = set()
        for equation in self.after(start, until=layer):
            numbers = (atom for atom in equation.inputs if isinstance(atom, int))
            if _multiplies(equation.source) or multiplied & set(numbers):
                multiplied.update(equation.outputs)
        return any(isinstance(r, int) and r in multiplied for r in self.results)

    def origin(self, atom: Atom) -> int | None:
        """The position of the input that an operand is, but for its form; or None."""
        while isinstance(atom, int) and atom in self.makers:
            maker = self.makers[atom]
            if maker.primitive.name not in _FORM_ONLY:
                return None
            atom = maker.inputs[0]
        return self.inputs.index(atom) if atom in self.inputs else None

    def sources(self, atom: Atom) -> set[int]:
        """The positions of the inputs that an operand is computed from."""
        reached, pending = set(), [atom]
        while pending:
            number = pending.pop()
            if isinstance(number, int) and number not in reached:
                reached.add(number)
                pending.extend(
                    self.makers[number].inputs if number in self.makers else ()
                )
        return {at for at, number in enumerate(self.inputs) if number in reached}


def run(equations: Sequence[Equation], values: Mapping[int, Any]) -> dict[int, Any]:
    """The values of all numbers, from those that are given."""
    known = dict(values)
    context = jax.make_jaxpr(jnp.negative)(0.0).eqns[0].ctx  # that of this place
    for equation in equations:
        results = equation.evaluate(_read(equation.inputs, known), context)
        known.update(zip(equation.outputs, results, strict=True))
    return known


def _read(atoms: Iterable[Atom], known: Mapping[int, Any]) -> list[Any]:
    plain = map(_off_mesh, atoms)
    return [a.val if isinstance(a, core.Literal) else known[a] for a in plain]


def _off_mesh(atom: Any) -> Any:
    """A literal without the mesh of its trace; a variable as it is."""
    if not isinstance(atom, core.Literal):
        return atom
    return core.Literal(np.asarray(atom.val), atom.aval)


def _is_number(atom: Atom) -> TypeGuard[int]:
    return isinstance(atom, int)


_FORM_ONLY = {
    "convert_element_type",
    "copy",
    "expand_dims",
    "optimization_barrier",
    "reshape",
    "sharding_constraint",
    "squeeze",
    "transpose",
}
_PRODUCTS = {"dot_general", "conv_general_dilated", "ragged_dot"}
_OVER_SHARDS = {"pmax", "pmin", "psum"}
_CALLS = {"jit", "pjit", "closed_call", "core_call"}
_INLINED = _CALLS | {"remat", "remat2", "checkpoint"}


def body_of(params: Mapping[str, Any]) -> core.ClosedJaxpr | None:
    """The jaxpr that an equation with these parameters calls, if it is just one."""
    body = params.get("jaxpr", params.get("call_jaxpr"))
    return core.ClosedJaxpr(body, ()) if isinstance(body, core.Jaxpr) else body


def _sub_jaxprs(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def bodies_of(wrap: Equation) -> Iterator[tuple[Graph, int]]:
    """The functions an equation runs, and where their arguments start."""
    if wrap.primitive.name == "cond":
        yield from ((Graph.of(branch), 1) for branch in wrap.params["branches"])
    elif wrap.primitive.name == "while":
        yield Graph.of(wrap.params["body_jaxpr"]), wrap.params["cond_nconsts"]
    else:
        for body in _sub_jaxprs(wrap.params):
            yield Graph.of(core.ClosedJaxpr(body, [None] * len(body.constvars))), 0


def _multiplies(equation: core.JaxprEqn) -> bool:
    """Whether an equation is a product, or calls one."""
    return equation.primitive.name in _PRODUCTS or any(
        _multiplies(inner)
        for jaxpr in _sub_jaxprs(equation.params)
        for inner in jaxpr.eqns
    )


def holds_tap(jaxpr: core.Jaxpr) -> bool:
    """Whether a tap is among the equations, however deep."""
    return any(layers_in(equation) for equation in jaxpr.eqns)


def layers_in(equation: core.JaxprEqn) -> set[str]:
    """The layers whose taps an equation is or runs, however deep."""
    if equation.primitive is tap_p:
        return {equation.params["layer"]}
    inner = (e for jaxpr in _sub_jaxprs(equation.params) for e in jaxpr.eqns)
    return set().union(*map(layers_in, inner))
