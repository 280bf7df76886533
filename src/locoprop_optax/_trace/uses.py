"""Where a traced loss uses its parameters linearly, and how else it reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from locoprop_optax._records.linear_maps import Convolution, LinearMap, Product
from locoprop_optax._trace import primitives
from locoprop_optax._trace.form import Form, Source
from locoprop_optax._trace.graph import (
    Atom,
    Equation,
    Graph,
    Position,
    is_number,
    live_results,
)
from locoprop_optax._trace.primitives import Scan

Sources = Mapping[int, Source]


class Layout(NamedTuple):
    """From a value, as the trace has it, to a record: rows first, and units last.

    Attributes:
      order: of the value's axes, those of the loops around it in front.
      shape: of the record.
    """

    order: tuple[int, ...]
    shape: tuple[int, ...]

    def __call__(self, value: jax.Array) -> jax.Array:
        """The record."""
        return value.transpose(self.order).reshape(self.shape)

    def undo(self, record: jax.Array, like: Any) -> jax.Array:
        """The inverse, in the shape of `like`."""
        shape = [like.shape[axis] for axis in self.order]
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return record.reshape(shape).transpose(inverse)


class Linear(NamedTuple):
    """What a layer computes, whichever the batch; equal for all uses of a layer.

    Attributes:
      weight: the number of the parameter.
      kernel: from the weight to the kernel of the linear map, stacked layers in front.
      bias: the number of the bias, if there is one, and the same for it.
      linear_map: from kernel and bias to pre-activations.
    """

    weight: int
    kernel: Form
    bias: tuple[int, Form] | None
    linear_map: LinearMap


class Found(NamedTuple):
    """What one equation says of a layer.

    Attributes:
      linear: what is computed.
      sliced: of each scan around it, whether it slices the weight.
      stack: the shape of the axes that count stacked layers.
      inputs: from the other operand to its record.
      outputs: from the result to its record.
      batched: the axes of the result that count stacked layers.
      units: the axes of the result that count units.
    """

    linear: Linear
    sliced: tuple[bool, ...]
    stack: tuple[int, ...]
    inputs: Layout
    outputs: Layout
    batched: Sequence[int]
    units: Sequence[int]


class Use(NamedTuple):
    """One product of a parameter in a trace.

    Attributes:
      position: of the equation of the product.
      side: which of its operands is the parameter.
      linear: what is computed.
      stack: the shape of the axes that count stacked layers.
      inputs: from the other operand to its record.
      outputs: from the result to its record.
      scans: the lengths of the scans around it.
      value: the type of the result in one turn of those.
      graph: the graph it stands in.
      preactivation: the number there of what the layer gives, its bias added.
      live: the numbers there that the loss depends on differentiably.
      outermost: whether the graph is the whole loss.
    """

    position: Position
    side: int
    linear: Linear
    stack: tuple[int, ...]
    inputs: Layout
    outputs: Layout
    scans: tuple[int, ...]
    value: Any
    graph: Graph
    preactivation: int
    live: set[int]
    outermost: bool


@dataclass
class Reading:
    """How a loss reads its parameters.

    Attributes:
      uses: the products, in the order of their execution.
      otherwise: of each parameter how else it is read, as words for people.
      computed: of parameters that kernels are computed from, by what.
    """

    uses: list[Use] = field(default_factory=list)
    otherwise: dict[int, list[str]] = field(default_factory=dict)
    computed: dict[int, str] = field(default_factory=dict)

    def note(self, number: int, what: str) -> None:
        """Notes that a parameter is read in another way than by a product."""
        known = self.otherwise.setdefault(number, [])
        if what not in known:
            known.append(what)


def read_parameters(graph: Graph, count: int) -> Reading:
    """How the first result of a graph reads its first inputs, the parameters."""
    reading = Reading()
    sources = {
        number: Source(at, Form(tuple(graph.avals[number].shape)))
        for at, number in enumerate(graph.inputs[:count])
    }
    _Scope(graph, sources, graph.live(graph.results[:1]), reading).read()
    return reading


class _Scope:
    """One graph: the whole loss, or the function of a loop or condition in it."""

    def __init__(
        self,
        graph: Graph,
        sources: Sources,
        live: set[int],
        reading: Reading,
        scans: tuple[int, ...] = (),
        *,
        outermost: bool = True,
    ):
        self.graph, self.live, self.reading = graph, live, reading
        self.scans, self.outermost = scans, outermost
        self.sources: dict[int, Source] = dict(sources)
        self.computed: dict[int, tuple[set[int], str]] = {}
        self.products: dict[int, tuple[int, Found]] = {}  # by the result's number

    def read(self) -> None:
        """Reads the equations that the loss depends on."""
        for equation in self.graph.equations:
            if not self.live.isdisjoint(equation.outputs):
                self._read(equation)

    def source(self, atom: Atom) -> Source | None:
        """The parameter that an atom is, if it is one."""
        return self.sources.get(atom) if is_number(atom) else None

    def _read(self, equation: Equation) -> None:
        self._pass_on_computed(equation)
        operands = list(map(self.source, equation.inputs))
        if not any(operands):
            return
        if equation.bodies:
            self._enter(equation, operands)
            return
        if equation.primitive in primitives.UNCHANGED and len(operands) > 1:
            pairs = zip(operands, equation.outputs, strict=True)
            self.sources.update((out, source) for source, out in pairs if source)
            return
        first, *others = operands
        if first and not others and (moved := first.after(equation.source)):
            self.sources[equation.outputs[0]] = moved
            return
        alone = sum(map(bool, operands)) == 1
        if alone and equation.primitive in primitives.PRODUCTS:
            side = operands.index(next(filter(None, operands)))
            found = _product(equation.source, side, operands[side], self.scans)
            if found is not None:
                self._add_use(equation, side, found)
                return
        if alone and equation.primitive in primitives.ADD:
            place = operands.index(next(filter(None, operands)))
            if self._add_bias(equation, place, operands[place]):
                return
        for source in filter(None, operands):
            self._read_otherwise(equation, source)

    def _add_use(self, equation: Equation, side: int, found: Found) -> None:
        (number,) = equation.outputs
        self.products[number] = len(self.reading.uses), found
        self.reading.uses.append(
            Use(
                position=equation.position,
                side=side,
                linear=found.linear,
                stack=found.stack,
                inputs=found.inputs,
                outputs=found.outputs,
                scans=self.scans,
                value=equation.source.outvars[0].aval,
                graph=self.graph,
                preactivation=number,
                live=self.live,
                outermost=self.outermost,
            )
        )

    def _add_bias(self, addition: Equation, place: int, source: Source) -> bool:
        """Whether what is added is the bias of a product, to whose use it then belongs.

        That is so if the product goes nowhere else, and all its rows get the same.
        """
        forms, number = [], addition.inputs[1 - place]
        while is_number(number) and self._is_read_once(number):
            if number in self.products:
                at, found = self.products[number]
                axes = _axes_after(forms[::-1], len(self.graph.avals[number].shape))
                form = _bias_form(source, found, axes)
                if form is not None:
                    use = self.reading.uses[at]
                    linear = use.linear._replace(bias=(source.number, form))
                    self.reading.uses[at] = use._replace(
                        linear=linear, preactivation=addition.outputs[0]
                    )
                return form is not None
            producer = self.graph.producers.get(number)
            if producer is None or len(producer.inputs) != 1:
                return False
            forms.append(producer)
            (number,) = producer.inputs
        return False

    def _is_read_once(self, number: int) -> bool:
        readers = [
            at
            for at in self.graph.consumers.get(number, ())
            if not self.live.isdisjoint(self.graph.equations[at].outputs)
        ]
        return len(readers) == 1 and number not in self.graph.results

    def _enter(self, equation: Equation, operands: list[Source | None]) -> None:
        """Reads the functions of a loop or a condition."""
        for body in equation.bodies:
            live = body.live(live_results(equation, body, self.live))
            inner: dict[int, Source] = {}
            for at, source in enumerate(operands[equation.offset :]):
                if source is None or body.inputs[at] not in live:
                    continue
                entered = self._entered(equation, at, source)
                if entered is None:
                    self.reading.note(source.number, "enters a scan as its carry")
                else:
                    inner[body.inputs[at]] = entered
            scans = self.scans
            if equation.primitive == primitives.SCAN:
                scans = (*scans, Scan.of(equation.source).length)
            _Scope(body, inner, live, self.reading, scans, outermost=False).read()

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
        name = equation.primitive.name
        self.reading.note(source.number, _in_words(equation))
        if self._is_as_large(equation, math.prod(source.shape)):
            self._compute(equation.outputs[0], {source.number}, name)

    def _compute(self, number: int, parameters: set[int], name: str) -> None:
        known, first = self.computed.get(number, (set(), name))
        self.computed[number] = known | parameters, first

    def _pass_on_computed(self, equation: Equation) -> None:
        """Follows values of the size of a parameter that are computed from it."""
        inputs = [n for n in equation.inputs if is_number(n) and n in self.computed]
        if not inputs:
            return
        parameters = set().union(*(self.computed[n][0] for n in inputs))
        name = self.computed[inputs[0]][1]
        if equation.primitive in primitives.PRODUCTS or equation.bodies:
            for number in parameters:
                self.reading.computed.setdefault(number, name)
        elif self._is_as_large(
            equation, *(math.prod(self.graph.avals[n].shape) for n in inputs)
        ):
            self._compute(equation.outputs[0], parameters, name)

    def _is_as_large(self, equation: Equation, *sizes: int) -> bool:
        """Whether a result has the size of what it is computed from, or assembles it.

        A parameter that is applied to activations gives more.
        """
        if len(equation.outputs) != 1:
            return False
        size = math.prod(self.graph.avals[equation.outputs[0]].shape)
        return equation.primitive in primitives.ASSEMBLING or size in sizes


def _axes_after(equations: Sequence[Equation], ndim: int) -> list[int | None] | None:
    """Which axis is which after changes of the form alone; None if there are others.

    An axis of size 1 may be told as none.
    """
    axes: list[int | None] = list(range(ndim))
    for equation in equations:
        primitive, params = equation.primitive, equation.params
        if primitive == primitives.TRANSPOSE:
            axes = [axes[axis] for axis in params["permutation"]]
        elif primitive in (primitives.RESHAPE, primitives.SQUEEZE):
            order = primitives.order(equation.source)
            before = [equation.source.invars[0].aval.shape[axis] for axis in order]
            axes = [axes[axis] for axis in order]
            after = equation.source.outvars[0].aval.shape
            if [n for n in before if n != 1] != [n for n in after if n != 1]:
                return None
            kept = (a for a, size in zip(axes, before, strict=True) if size != 1)
            axes = [next(kept) if size != 1 else None for size in after]
        elif primitive not in primitives.CAST | primitives.UNCHANGED:
            return None
    return axes


def _bias_form(
    source: Source, found: Found, axes: Sequence[int | None] | None
) -> Form | None:
    """From a parameter to the bias of a product; None if it is none.

    Args:
      source: what is added.
      found: the product.
      axes: which axis of the product's result each axis of the sum is.
    """
    shape = source.form.result[source.lead :]
    if axes is None or len(shape) != len(axes) or source.sliced != found.sliced:
        return None
    own = [axes.index(a) for a in (*found.batched, *found.units) if a in axes]
    others = [at for at in range(len(axes)) if at not in own]
    expected = (*found.stack, *found.outputs.shape[-max(1, len(found.units)) :])
    form = source.transposed([*own, *others])
    repeated = any(shape[at] != 1 for at in others)
    if repeated or math.prod(form.result) != math.prod(expected):
        return None
    return form.reshape(expected)


def _product(
    equation: core.JaxprEqn, side: int, source: Source, scans: tuple[int, ...]
) -> Found | None:
    """What a product with a parameter computes; None if it is no layer."""
    other = equation.invars[1 - side].aval
    if source.grown is not None or not jnp.issubdtype(other.dtype, jnp.floating):
        return None
    if equation.primitive == primitives.DOT:
        return _dot(equation, side, source, scans)
    return _convolution(equation, source, scans) if side == 1 else None


def _dot(
    equation: core.JaxprEqn, side: int, source: Source, scans: tuple[int, ...]
) -> Found:
    contracted, batched = equation.params["dimension_numbers"]
    pairs = sorted(zip(contracted[side], contracted[1 - side], strict=True))
    summed, x_summed = [a for a, _ in pairs], [a for _, a in pairs]
    batch, x_batch = list(batched[side]), list(batched[1 - side])
    value, other = equation.outvars[0].aval, equation.invars[1 - side].aval
    free = [a for a in range(len(source.shape)) if a not in summed + batch]
    rows = [a for a in range(len(other.shape)) if a not in x_summed + x_batch]
    # The result has the batched axes, then those of the first operand, of the second.
    after_batch = range(len(batch), len(value.shape))
    if side == 0:
        units, out_rows = after_batch[: len(free)], after_batch[len(free) :]
    else:
        out_rows, units = after_batch[: len(rows)], after_batch[len(rows) :]
    stacked = range(len(batch))
    kernel = source.transposed([*batch, *summed, *free])
    outputs = _layout(value.shape, scans, source.sliced, stacked, out_rows, units)
    if not free:  # one unit, which has no axis
        kernel = kernel.reshape((*kernel.result, 1))
        outputs = outputs._replace(shape=(*outputs.shape, 1))
    linear_map = Product(len(summed), max(1, len(free)))
    return Found(
        linear=Linear(source.number, kernel, None, linear_map),
        sliced=source.sliced,
        stack=kernel.result[: source.lead + len(batch)],
        inputs=_layout(other.shape, scans, source.sliced, x_batch, rows, x_summed),
        outputs=outputs,
        batched=stacked,
        units=units,
    )


def _convolution(
    equation: core.JaxprEqn, source: Source, scans: tuple[int, ...]
) -> Found | None:
    params = equation.params
    specs = params["dimension_numbers"]
    if params["batch_group_count"] != 1:
        return None
    out, into, *window = specs.rhs_spec
    linear_map = Convolution(
        tuple(params["window_strides"]),
        tuple(map(tuple, params["padding"])),
        tuple(params["lhs_dilation"]),
        tuple(params["rhs_dilation"]),
        params["feature_group_count"],
    )

    def layout(aval, spec):
        batch, channels, *space = spec
        found = _layout(
            aval.shape, scans, source.sliced, [], [batch, *space], [channels]
        )
        sizes = [aval.shape[axis] for axis in (*space, channels)]
        return found._replace(shape=(*found.shape[: source.lead], -1, *sizes))

    kernel = source.transposed([*window, into, out])
    return Found(
        linear=Linear(source.number, kernel, None, linear_map),
        sliced=source.sliced,
        stack=kernel.result[: source.lead],
        inputs=layout(equation.invars[0].aval, specs.lhs_spec),
        outputs=layout(equation.outvars[0].aval, specs.out_spec),
        batched=[],
        units=[specs.out_spec[1]],
    )


def _layout(
    shape: Sequence[int],
    scans: Sequence[int],
    sliced: Sequence[bool],
    batch: Sequence[int],
    rows: Sequence[int],
    columns: Sequence[int],
) -> Layout:
    """Puts stacked layers in front of rows, those of loops first, and columns last."""
    loops = len(scans)
    whole = (*scans, *shape)
    stacked = [at for at, is_slice in enumerate(sliced) if is_slice]
    repeated = [at for at in range(loops) if at not in stacked]
    batch, rows, columns = (
        [loops + axis for axis in axes] for axes in (batch, rows, columns)
    )
    order = (*stacked, *batch, *repeated, *rows, *columns)
    return Layout(tuple(order), tuple(whole[axis] for axis in order))


def _in_words(equation: Equation) -> str:
    """How an equation reads a parameter."""
    primitive = equation.primitive
    if primitive == primitives.LOOKUP:
        return "looked up"
    if primitive in primitives.PRODUCTS:
        return "multiplied with another parameter"
    if primitive in primitives.CUSTOM:
        return "inside a function with a derivative rule of its own"
    if primitive == primitives.WHILE:
        return "inside a while loop, which keeps no record of each turn"
    if primitives.functions_in(equation.source):
        return f"inside a {primitive.name}"
    if primitive in primitives.ADD:
        return "added"
    if primitive == primitives.MULTIPLY:
        return "multiplied elementwise"
    return f"goes to {primitive.name}"
