"""Where a traced loss uses its parameters linearly, and how else it reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeGuard

import jax.numpy as jnp

from locoprop_optax._records.form import Form
from locoprop_optax._trace import primitives
from locoprop_optax._trace.diagonal import diagonal_of
from locoprop_optax._trace.found import Found, Layout, Linear, SameRows
from locoprop_optax._trace.graph import (
    Atom,
    Equation,
    Graph,
    Position,
    is_number,
    live_results,
)
from locoprop_optax._trace.primitives import Scan, dtype_of
from locoprop_optax._trace.products import axes_after, bias_form, product_of
from locoprop_optax._trace.source import Source

Sources = Mapping[int, Source]


class Use(NamedTuple):
    """One use of a parameter as that of a layer.

    Attributes:
      position: of the equation where the parameter enters linearly.
      linear: what is computed.
      stack: the shape of the axes that count stacked layers.
      other: which of its operands is recorded as the input, if any.
      inputs: from that operand to its record.
      outputs: from the result to its record.
      scans: the lengths of the scans around it.
      value: the type of the result in one turn of those.
      graph: the graph it stands in.
      preactivation: the number there of what the layer gives, its bias added.
      results: the results of that graph that the loss depends on differentiably.
      live: all numbers there that it does.
      outermost: whether the graph is the whole loss.
    """

    position: Position
    linear: Linear
    stack: tuple[int, ...]
    other: int | None
    inputs: Layout | SameRows
    outputs: Layout
    scans: tuple[int, ...]
    value: Any
    graph: Graph
    preactivation: int
    results: set[int]
    live: set[int]
    outermost: bool


@dataclass
class Reading:
    """How a loss reads its parameters.

    Attributes:
      uses: those of layers, in the order of their execution.
      otherwise: of each parameter how else it is read, in words.
      hidden: of parameters whose products are not seen, why, in words.
      computed: the parameters that kernels are computed from.
    """

    uses: list[Use] = field(default_factory=list)
    otherwise: dict[int, list[str]] = field(default_factory=dict)
    hidden: dict[int, str] = field(default_factory=dict)
    computed: set[int] = field(default_factory=set)

    def note(self, number: int, what: str, *, hides: bool = False) -> None:
        """Notes that a parameter is read in another way than by a layer."""
        known = self.otherwise.setdefault(number, [])
        if what not in known:
            known.append(what)
        if hides:
            self.hidden.setdefault(number, what)


def read_parameters(graph: Graph, count: int) -> Reading:
    """How the first result of a graph reads its first inputs, the parameters."""
    reading = Reading()
    sources = {
        number: Source(at, Form(tuple(graph.avals[number].shape)))
        for at, number in enumerate(graph.inputs[:count])
    }
    data = {*graph.inputs[count:], *graph.held}
    _Scope(graph, sources, data, graph.results[:1], reading).read()
    return reading


class _Scope:
    """One graph: the whole loss, or the function of a loop or condition in it."""

    def __init__(
        self,
        graph: Graph,
        sources: Sources,
        data: set[int],
        results: Sequence[Atom],
        reading: Reading,
        scans: tuple[int, ...] = (),
        *,
        outermost: bool = True,
    ):
        self.graph, self.reading = graph, reading
        self.results, self.live = set(filter(is_number, results)), graph.live(results)
        self.scans, self.outermost = scans, outermost
        self.sources: dict[int, Source] = dict(sources)
        self.data = data
        self.computed: dict[int, tuple[set[int], str]] = {}
        self.active: set[Atom] = set()
        self.products: dict[int, tuple[int, Found]] = {}  # by the result's number

    def read(self) -> None:
        """Reads the equations that the loss depends on."""
        for equation in self.graph.equations:
            if self._is_data(equation.inputs):
                self.data.update(equation.outputs)
            is_live = not self.live.isdisjoint(equation.outputs)
            if is_live and equation.primitive != primitives.STOP_GRADIENT:
                self._read(equation)

    def source(self, atom: Atom) -> Source | None:
        """The parameter that an atom is, if it is one."""
        return self.sources.get(atom) if is_number(atom) else None

    def _read(self, equation: Equation) -> None:
        operands = list(map(self.source, equation.inputs))
        inputs = set(filter(is_number, equation.inputs))
        if not self.active.isdisjoint(inputs):
            self.active.update(equation.outputs)
        if equation.bodies:
            self._enter(equation, operands)
            return
        self._pass_on_computed(equation, operands)
        if not any(operands):
            return
        if equation.primitive in primitives.UNCHANGED and len(operands) > 1:
            pairs = zip(operands, equation.outputs, strict=True)
            self.sources.update((out, source) for source, out in pairs if source)
            return
        first, *others = operands
        if first and not others and (moved := first.after(equation.source)):
            self.sources[equation.outputs[0]] = moved
            return
        (place, source), *more = [(at, s) for at, s in enumerate(operands) if s]
        if not more and self._add_layer(equation, place, source):
            return
        for source in filter(None, operands):
            self._read_otherwise(equation, source)

    def _add_layer(self, equation: Equation, place: int, source: Source) -> bool:
        """Whether a parameter enters linearly."""
        if equation.primitive in primitives.PRODUCTS:
            found = product_of(equation.source, place, source, self.scans)
            if found is not None:
                self._add_product(equation, found)
            return found is not None
        if equation.primitive in primitives.ADD:
            self._add_bias(equation, place, source)
        return self._add_diagonal(equation, place, source)

    def _add_diagonal(self, equation: Equation, place: int, source: Source) -> bool:
        """Whether a parameter is looked up, or an elementwise factor or summand.

        Of these, other operands are more than parameters. The result may still be a
        kernel that is computed.
        """
        others = [a for at, a in enumerate(equation.inputs) if at != place]
        if others and not self._is_data(others):
            return False
        found = diagonal_of(equation.source, place, source, self.scans)
        if found is not None:
            self._add_use(equation, found)
            self._may_compute(equation, source)
        return found is not None

    def _is_data(self, atoms: Sequence[Atom]) -> bool:
        """Whether any of them depends on more than parameters and constants."""
        return not self.data.isdisjoint(filter(is_number, atoms))

    def _add_product(self, equation: Equation, found: Found) -> None:
        (number,) = equation.outputs
        self.active.add(number)
        self.products[number] = len(self.reading.uses), found
        self._add_use(equation, found)

    def _add_use(self, equation: Equation, found: Found) -> None:
        (number,) = equation.outputs
        self.reading.uses.append(
            Use(
                position=equation.position,
                linear=found.linear,
                stack=found.stack,
                other=found.other,
                inputs=found.inputs,
                outputs=found.outputs,
                scans=self.scans,
                value=equation.source.outvars[0].aval,
                graph=self.graph,
                preactivation=number,
                results=self.results,
                live=self.live,
                outermost=self.outermost,
            )
        )

    def _add_bias(self, addition: Equation, place: int, source: Source) -> None:
        """Notes that what is added is the bias of a product, if it is.

        That is so if the product goes nowhere else, and all its rows get the same.
        """
        forms, number = [], addition.inputs[1 - place]
        while is_number(number) and self._is_read_once(number):
            if number in self.products:
                at, found = self.products[number]
                axes = axes_after(forms[::-1], len(self.graph.avals[number].shape))
                form = bias_form(source, found, axes)
                if form is not None:
                    use = self.reading.uses[at]
                    linear = use.linear._replace(bias=(source.number, form))
                    self.reading.uses[at] = use._replace(
                        linear=linear, preactivation=addition.outputs[0]
                    )
                return
            producer = self.graph.producers.get(number)
            if producer is None or len(producer.inputs) != 1:
                return
            forms.append(producer)
            (number,) = producer.inputs

    def _is_read_once(self, number: int) -> bool:
        readers = [
            at
            for at in self.graph.consumers.get(number, ())
            if not self.live.isdisjoint(self.graph.equations[at].outputs)
        ]
        return len(readers) == 1 and number not in self.results

    def _enter(self, equation: Equation, operands: list[Source | None]) -> None:
        """Reads the functions of a loop or a condition."""
        scans, loops = self.scans, equation.primitive == primitives.SCAN
        is_fed = self._is_data(equation.inputs)
        if loops:
            scans = (*scans, Scan.of(equation.source).length)
        for body in equation.bodies:
            results = live_results(equation, body, self.live)
            scope = _Scope(
                body, {}, set(body.held), results, self.reading, scans, outermost=False
            )
            entering = zip(
                equation.inputs[equation.offset :],
                operands[equation.offset :],
                body.inputs,
                strict=True,
            )
            for at, (atom, source, number) in enumerate(entering):
                if is_number(atom) and atom in self.active:
                    scope.active.add(number)
                if self._is_data([atom]) or (source is None and loops and is_fed):
                    scope.data.add(number)
                if self._is_computed(atom):
                    scope.computed[number] = self.computed[atom]
                if source is None or number not in scope.live:
                    continue
                entered = self._entered(equation, at, source)
                if entered is None:
                    what = "it enters a scan as its carry, or repeated"
                    self.reading.note(source.number, what, hides=True)
                else:
                    scope.sources[number] = entered
            scope.read()

    def _entered(self, equation: Equation, at: int, source: Source) -> Source | None:
        if equation.primitive != primitives.SCAN:
            return source
        scan = Scan.of(equation.source)
        if scan.consts <= at < scan.consts + scan.carries:
            return None
        if source.grown is not None:
            return None
        return source.inside_scan(is_slice=at >= scan.consts)

    def _read_otherwise(self, equation: Equation, source: Source) -> None:
        what, hides = _in_words(equation)
        self.reading.note(source.number, what, hides=hides)
        self._may_compute(equation, source)

    def _may_compute(self, equation: Equation, source: Source) -> None:
        if self._is_as_large(equation, math.prod(source.shape)):
            name = equation.primitive.name
            self._compute(equation.outputs[0], {source.number}, name)

    def _compute(self, number: int, parameters: set[int], name: str) -> None:
        known, first = self.computed.get(number, (set(), name))
        self.computed[number] = known | parameters, first

    def _is_computed(self, atom: Atom) -> TypeGuard[int]:
        return is_number(atom) and atom in self.computed

    def _pass_on_computed(
        self, equation: Equation, operands: Sequence[Source | None]
    ) -> None:
        """Follows values of the size of a parameter that are computed from it.

        One that is multiplied with an activation is a kernel; one that is multiplied
        with a parameter is an activation itself.
        """
        inputs = list(filter(self._is_computed, equation.inputs))
        if not inputs:
            return
        parameters = set().union(*(self.computed[n][0] for n in inputs))
        name = self.computed[inputs[0]][1]
        if equation.primitive in primitives.PRODUCTS:
            for number in set() if any(operands) else parameters:
                self.reading.computed.add(number)
                self.reading.hidden[number] = f"a kernel is computed from it, by {name}"
        elif self._is_as_large(
            equation, *(math.prod(self.graph.avals[n].shape) for n in inputs)
        ):
            self._compute(equation.outputs[0], parameters, name)

    def _is_as_large(self, equation: Equation, *sizes: int) -> bool:
        """Whether a result has the size of what it is computed from, or assembles it.

        What a parameter is to an activation is no part of it.
        """
        if len(equation.outputs) != 1:
            return False
        size = math.prod(self.graph.avals[equation.outputs[0]].shape)
        met = [n for n in equation.inputs if is_number(n) and n in self.active]
        if any(math.prod(self.graph.avals[n].shape) == size > 1 for n in met):
            return False
        return equation.primitive in primitives.ASSEMBLING or size in sizes


def _in_words(equation: Equation) -> tuple[str, bool]:
    """How an equation reads a parameter, and whether that may hide a product."""
    primitive = equation.primitive
    if primitive == primitives.LOOKUP:
        return "looked up", False
    if primitive in primitives.PRODUCTS:
        dtypes = {dtype_of(atom) for atom in equation.source.invars}
        if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
            return "it is multiplied with integers; cast them before the model", True
        if equation.primitive == primitives.CONVOLUTION:
            return "it is convolved as the input, in batches, or with a parameter", True
        return "it is multiplied with a parameter", True
    if primitive in primitives.CUSTOM:
        return "it enters a function with a derivative rule of its own", True
    if primitive == primitives.WHILE:
        return "it enters a while loop, which keeps no record of each turn", True
    if primitives.functions_in(equation.source):
        return f"it enters a {primitive.name}", True
    if primitive in primitives.ADD:
        return "added", False
    if primitive == primitives.MULTIPLY:
        return "multiplied elementwise", False
    return f"goes to {primitive.name}", False
