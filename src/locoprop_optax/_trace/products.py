"""What a product with a parameter in a trace computes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax.extend import core

from locoprop_optax._records.form import Form
from locoprop_optax._records.linear_maps import Convolution, Product
from locoprop_optax._trace import primitives
from locoprop_optax._trace.found import Found, Linear, layout_of
from locoprop_optax._trace.graph import Equation
from locoprop_optax._trace.primitives import dtype_of, shape_of
from locoprop_optax._trace.source import Source


def product_of(
    equation: core.JaxprEqn, side: int, source: Source, scans: tuple[int, ...]
) -> Found | None:
    """What a product with a parameter computes; None if it is no layer."""
    other = equation.invars[1 - side]
    if source.grown is not None or not jnp.issubdtype(dtype_of(other), jnp.floating):
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
    value, other = map(shape_of, (equation.outvars[0], equation.invars[1 - side]))
    free = [a for a in range(len(source.shape)) if a not in summed + batch]
    rows = [a for a in range(len(other)) if a not in x_summed + x_batch]
    # The result has the batched axes, then those of the first operand, of the second.
    after_batch = range(len(batch), len(value))
    if side == 0:
        units, out_rows = after_batch[: len(free)], after_batch[len(free) :]
    else:
        out_rows, units = after_batch[: len(rows)], after_batch[len(rows) :]
    stacked = range(len(batch))
    kernel = source.transposed([*batch, *summed, *free])
    outputs = layout_of(value, scans, source.sliced, stacked, out_rows, units)
    if not free:  # one unit, which has no axis
        kernel = kernel.reshape((*kernel.result, 1))
        outputs = outputs._replace(shape=(*outputs.shape, 1))
    linear_map = Product(len(summed), max(1, len(free)))
    return Found(
        linear=Linear(source.number, kernel, None, linear_map),
        sliced=source.sliced,
        stack=kernel.result[: source.lead + len(batch)],
        other=1 - side,
        inputs=layout_of(other, scans, source.sliced, x_batch, rows, x_summed),
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

    def layout(atom, spec):
        shape = shape_of(atom)
        batch, channels, *space = spec
        found = layout_of(shape, scans, source.sliced, [], [batch, *space], [channels])
        examples = len(found.shape) - len(space) - 1
        stack, kept = found.shape[: source.lead], found.shape[examples:]
        count = math.prod(found.shape[source.lead : examples])
        return found._replace(shape=(*stack, count, *kept))

    kernel = source.transposed([*window, into, out])
    return Found(
        linear=Linear(source.number, kernel, None, linear_map),
        sliced=source.sliced,
        stack=kernel.result[: source.lead],
        other=0,
        inputs=layout(equation.invars[0], specs.lhs_spec),
        outputs=layout(equation.outvars[0], specs.out_spec),
        batched=[],
        units=[specs.out_spec[1]],
    )


def axes_after(equations: Sequence[Equation], ndim: int) -> list[int | None] | None:
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
            before = [shape_of(equation.source.invars[0])[axis] for axis in order]
            axes = [axes[axis] for axis in order]
            after = shape_of(equation.source.outvars[0])
            if [n for n in before if n != 1] != [n for n in after if n != 1]:
                return None
            kept = (a for a, size in zip(axes, before, strict=True) if size != 1)
            axes = [next(kept) if size != 1 else None for size in after]
        elif primitive not in primitives.CAST | primitives.UNCHANGED:
            return None
    return axes


def bias_form(
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
