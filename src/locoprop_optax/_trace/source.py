"""Values in a trace that are parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax.extend import core

from locoprop_optax._records.form import Form
from locoprop_optax._trace import primitives
from locoprop_optax._trace.primitives import dtype_of, shape_of


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
            is_float = jnp.issubdtype(dtype_of(equation.outvars[0]), jnp.inexact)
            return self if is_float else None
        if self.grown is not None:
            return None
        if primitive == primitives.TRANSPOSE:
            return self._replace(form=self.transposed(params["permutation"]))
        if primitive == primitives.REVERSE:
            axes = [self.lead + axis for axis in params["dimensions"]]
            return self._replace(form=self.form.reverse(axes))
        if primitive in (primitives.RESHAPE, primitives.SQUEEZE):
            shape = shape_of(equation.outvars[0])
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
