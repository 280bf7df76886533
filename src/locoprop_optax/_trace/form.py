"""How a parameter is turned into the operand of a product: its entries, rearranged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from locoprop_optax._trace import primitives

Step = tuple[core.Primitive, tuple[int, ...]]


@dataclass(frozen=True)
class Form:
    """Reshapes, transposes and reversals, one after another; each can be undone.

    Attributes:
      shape: of the parameter.
      steps: what is done, and with which shape, permutation or axes.
    """

    shape: tuple[int, ...]
    steps: tuple[Step, ...] = ()

    @property
    def result(self) -> tuple[int, ...]:
        """The shape that comes out."""
        return self._shapes()[-1]

    def __call__(self, array: jax.Array) -> jax.Array:
        """The parameter, rearranged."""
        for primitive, numbers in self.steps:
            array = _rearranged(array, primitive, numbers)
        return array

    def undo(self, array: jax.Array) -> jax.Array:
        """The inverse."""
        backwards = list(zip(self.steps, self._shapes(), strict=False))[::-1]
        for (primitive, numbers), before in backwards:
            if primitive == primitives.RESHAPE:
                numbers = before
            elif primitive == primitives.TRANSPOSE:
                numbers = tuple(int(n) for n in np.argsort(numbers))
            array = _rearranged(array, primitive, numbers)
        return array

    def reshape(self, shape: Sequence[int]) -> Form:
        """This form, then a reshape."""
        shape = tuple(map(int, shape))
        if shape == self.result:
            return self
        *before, last = self.steps or (None,)
        if last and last[0] == primitives.RESHAPE:
            return replace(self, steps=tuple(before)).reshape(shape)
        return self._then(primitives.RESHAPE, shape)

    def transpose(self, order: Sequence[int]) -> Form:
        """This form, then a transpose."""
        order = tuple(map(int, order))
        *before, last = self.steps or (None,)
        if last and last[0] == primitives.TRANSPOSE:
            order = tuple(last[1][n] for n in order)
            return replace(self, steps=tuple(before)).transpose(order)
        if order == tuple(range(len(order))):
            return self
        return self._then(primitives.TRANSPOSE, order)

    def reverse(self, axes: Sequence[int]) -> Form:
        """This form, then a reversal of axes."""
        return self._then(primitives.REVERSE, tuple(map(int, axes)))

    def _then(self, primitive: core.Primitive, numbers: tuple[int, ...]) -> Form:
        return replace(self, steps=(*self.steps, (primitive, numbers)))

    def _shapes(self) -> list[tuple[int, ...]]:
        shapes = [self.shape]
        for primitive, numbers in self.steps:
            shape = shapes[-1]
            if primitive == primitives.RESHAPE:
                shape = numbers
            elif primitive == primitives.TRANSPOSE:
                shape = tuple(shape[n] for n in numbers)
            shapes.append(shape)
        return shapes


def _rearranged(
    array: jax.Array, primitive: core.Primitive, numbers: tuple[int, ...]
) -> jax.Array:
    if primitive == primitives.RESHAPE:
        return array.reshape(numbers)
    if primitive == primitives.TRANSPOSE:
        return array.transpose(numbers)
    return jax.lax.rev(array, numbers)


class Source(NamedTuple):
    """A value in a trace that is a parameter, rearranged.

    Attributes:
      number: of the parameter.
      form: from the whole parameter to the value, the axes that scans around it slice
        away in front.
      sliced: of each scan around it, whether it slices the parameter.
      grown: the shape of the value if it repeats the form along axes of size 1.
    """

    number: int
    form: Form
    sliced: tuple[bool, ...] = ()
    grown: tuple[int, ...] | None = None

    @property
    def lead(self) -> int:
        """How many axes are sliced away."""
        return sum(self.sliced)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the value."""
        return self.grown or self.form.result[self.lead :]

    def transposed(self, order: Sequence[int]) -> Form:
        """The form, its axes behind the sliced ones in another order."""
        lead = self.lead
        return self.form.transpose([*range(lead), *(lead + n for n in order)])

    def reshaped(self, shape: Sequence[int]) -> Form:
        """The form, its axes behind the sliced ones in another shape."""
        return self.form.reshape([*self.form.result[: self.lead], *shape])

    def after(self, equation: core.JaxprEqn) -> Source | None:
        """What an equation makes of it; None if that is more than rearranging."""
        primitive, params = equation.primitive, equation.params
        if primitive in primitives.CAST | primitives.UNCHANGED:
            is_float = jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.inexact)
            return self if is_float else None
        if self.grown is not None:
            return None
        if primitive == primitives.TRANSPOSE:
            return self._replace(form=self.transposed(params["permutation"]))
        if primitive == primitives.REVERSE:
            axes = [self.lead + axis for axis in params["dimensions"]]
            return self._replace(form=self.form.reverse(axes))
        if primitive in (primitives.RESHAPE, primitives.SQUEEZE):
            shape = equation.outvars[0].aval.shape
            ordered = self._replace(form=self.transposed(primitives.order(equation)))
            return self._replace(form=ordered.reshaped(shape))
        if primitive == primitives.BROADCAST:
            shape, axes = params["shape"], params["broadcast_dimensions"]
            ones = [1] * len(shape)
            for axis, size in zip(axes, self.shape, strict=True):
                ones[axis] = size
            grown = None if tuple(ones) == tuple(shape) else tuple(shape)
            return self._replace(form=self.reshaped(ones), grown=grown)
        return None

    def inside_scan(self, *, is_slice: bool) -> Source:
        """What it is inside a scan, which slices it or takes it whole."""
        return self._replace(sliced=(*self.sliced, is_slice))
