"""What one equation of a trace says of a layer, and the layout of its records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from locoprop_optax._records.form import Form
from locoprop_optax._records.linear_maps import LinearMap


class Layout(NamedTuple):
    """From a value, as the trace has it, to a record: rows first, and units last.

    Attributes:
      whole: the shape of the value, those of the loops around it in front, in which
        it may have axes of size 1.
      order: of its axes.
      shape: of the record.
    """

    whole: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]

    def rows(self, columns: int) -> tuple[int, ...]:
        """The shape of the record without so many axes at its end."""
        return self.shape[: len(self.shape) - columns]

    def merged(self, columns: int) -> Layout:
        """The same with so many axes at the end of the record made one."""
        rows = self.rows(columns)
        size = math.prod(self.shape[len(rows) :])
        return self._replace(shape=(*rows, size))

    def __call__(self, value: jax.Array) -> jax.Array:
        """The record."""
        whole = jnp.broadcast_to(value, self.whole)
        return whole.transpose(self.order).reshape(self.shape)


class SameRows(NamedTuple):
    """The numbers of a table's rows that are read in every call.

    Attributes:
      rows: their numbers, for the last axes of the record.
      shape: of the record.
    """

    rows: np.ndarray
    shape: tuple[int, ...]

    def __call__(self, value: Any) -> jax.Array:
        """The record."""
        del value
        return jnp.broadcast_to(jnp.asarray(self.rows), self.shape)


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
      other: which operand is recorded as the input; None if there is none.
      inputs: from that operand to its record.
      outputs: from the result to its record.
      batched: of a product, the axes of the result that count stacked layers.
      units: of a product, the axes of the result that count units.
    """

    linear: Linear
    sliced: tuple[bool, ...]
    stack: tuple[int, ...]
    other: int | None
    inputs: Layout | SameRows
    outputs: Layout
    batched: Sequence[int] = ()
    units: Sequence[int] = ()


def layout_of(
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
    return Layout(whole, tuple(order), tuple(whole[axis] for axis in order))
