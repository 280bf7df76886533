"""What a lookup, a factor or a summand in a trace computes.

The design of these has one entry in each row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend import core

from locoprop_optax._records.linear_maps import Factor, Lookup
from locoprop_optax._trace import primitives
from locoprop_optax._trace.found import Found, Layout, Linear, SameRows, layout_of
from locoprop_optax._trace.primitives import shape_of
from locoprop_optax._trace.source import Source


def diagonal_of(
    equation: core.JaxprEqn, side: int, source: Source, scans: tuple[int, ...]
) -> Found | None:
    """What a lookup, an elementwise product or a sum computes; None if it is none."""
    primitive, ndim = equation.primitive, len(shape_of(equation.outvars[0]))
    if primitive in primitives.ADD or primitive == primitives.MULTIPLY:
        if ndim == 0:
            return None
        if not source.shape:
            source = source._replace(form=source.reshaped([1] * ndim))
        if primitive == primitives.MULTIPLY:
            return _factor(equation, side, source, scans)
        return _summand(equation, source, scans)
    if source.grown is not None or side != 0:
        return None
    if primitive == primitives.SLICE:
        return _slice(equation, source, scans)
    return _lookup(equation, source, scans) if primitive == primitives.LOOKUP else None


def _lookup(
    equation: core.JaxprEqn, source: Source, scans: tuple[int, ...]
) -> Found | None:
    gather = primitives.Gather.of(equation)
    if gather is None:
        return None
    indices, value = equation.invars[1], shape_of(equation.outvars[0])
    last = len(shape_of(indices)) - 1
    # The result has the indices' axes but the last where it has none of the table's.
    places = [at for at in range(len(value)) if at not in gather.kept]
    of_index = dict(zip(range(last), places, strict=True))
    batched = [of_index[axis] for axis in gather.index_batched]
    rows = [axis for axis in range(last) if axis not in gather.index_batched]
    free = [
        axis
        for axis in range(len(source.shape))
        if axis != gather.axis and axis not in gather.batched
    ]
    inputs = layout_of(
        shape_of(indices), scans, source.sliced, gather.index_batched, rows, [last]
    )
    return _table(
        source,
        (gather.batched, [gather.axis], free),
        lookup=Lookup(clips=gather.clips),
        other=1,
        inputs=inputs._replace(shape=inputs.rows(1)),
        outputs=layout_of(
            value,
            scans,
            source.sliced,
            batched,
            [of_index[axis] for axis in rows],
            gather.kept,
        ),
    )


def _slice(equation: core.JaxprEqn, source: Source, scans: tuple[int, ...]) -> Found:
    taken, whole = primitives.sliced(equation), source.shape
    value = shape_of(equation.outvars[0])
    cut = [at for at, size in enumerate(whole) if value[at] != size]
    free = [at for at in range(len(whole)) if at not in cut]
    outputs = layout_of(value, scans, source.sliced, [], cut, free)
    numbers = np.arange(math.prod(whole[at] for at in cut))
    rows = numbers.reshape([whole[at] for at in cut])[tuple(taken[at] for at in cut)]
    return _table(
        source,
        ([], cut, free),
        lookup=Lookup(fixed=True),
        other=None,
        inputs=SameRows(rows, outputs.rows(len(free))),
        outputs=outputs,
    )


def _summand(equation: core.JaxprEqn, source: Source, scans: tuple[int, ...]) -> Found:
    value, own = shape_of(equation.outvars[0]), _own_axes(source)
    table, units = own[:-1], own[-1:]
    repeated = [at for at in range(len(value)) if at not in own]
    outputs = layout_of(value, scans, source.sliced, [], [*repeated, *table], units)
    sizes = [value[at] for at in table]
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return _table(
        source,
        ([], [*repeated, *table], units),
        lookup=Lookup(fixed=True),
        other=None,
        inputs=SameRows(numbers, outputs.rows(len(units))),
        outputs=outputs,
    )


def _table(
    source: Source,
    axes: Sequence[Sequence[int]],
    *,
    lookup: Lookup,
    outputs: Layout,
    **inputs: Any,
) -> Found:
    """A lookup in a parameter, by its axes that count tables, rows and units."""
    batch, rows, units = axes
    kernel, lead = source.transposed([*batch, *rows, *units]), source.lead + len(batch)
    stack, of_rows = kernel.result[:lead], kernel.result[lead : lead + len(rows)]
    outputs = outputs.merged(len(units))
    table = kernel.reshape((*stack, math.prod(of_rows), outputs.shape[-1]))
    linear = Linear(source.number, table, None, lookup)
    return Found(linear, source.sliced, stack, outputs=outputs, **inputs)


def _factor(
    equation: core.JaxprEqn, side: int, source: Source, scans: tuple[int, ...]
) -> Found:
    value, own = shape_of(equation.outvars[0]), _own_axes(source)
    repeated = [at for at in range(len(value)) if at not in own]
    layout = layout_of(value, scans, source.sliced, [], repeated, own)
    layout = layout.merged(len(own))
    kernel = source.transposed([*repeated, *own])
    stack = kernel.result[: source.lead]
    vector = kernel.reshape((*stack, layout.shape[-1]))
    return Found(
        linear=Linear(source.number, vector, None, Factor()),
        sliced=source.sliced,
        stack=stack,
        other=1 - side,
        inputs=layout,
        outputs=layout,
    )


def _own_axes(source: Source) -> list[int]:
    """The axes of a result along which a parameter is not repeated."""
    shape = source.form.result[source.lead :]
    return [at for at, size in enumerate(shape) if size != 1]
