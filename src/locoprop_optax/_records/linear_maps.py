r"""How a layer's pre-activation depends on its parameters: always linearly.

A linear map is all that a local problem knows about the kind of its layer. Seen as
matrices, a layer is a product of its design with its kernel, once for each of its
groups (one, but for grouped convolutions). A bias is one more row of the kernel, whose
input is one:

.. math::
  a_g = X_g W_g, \qquad X_g: n \times d,\quad W_g: d \times o

The design of a lookup has one entry of one in each row, that of an elementwise factor
one entry, so that :math:`X^\top X` is diagonal and no matrix is made of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LayerParams: TypeAlias = Mapping[str, jax.Array]


class _OfRows:
    r"""What linear maps share that are one product of matrices, row by row.

    Attributes:
      summed: how many axes at the end of the input are no rows.
      outputs: how many axes at the end of the output are none.
      is_convolution: whether XLA is slow for it in a loop and under vmap.
      is_diagonal: whether :math:`X^\top X` is.
      units_apart: whether each unit has inputs of its own.
      reads: the kind of numbers that its inputs are.
      ends_in_units: whether a matrix that mixes the units of cotangents then mixes
        those of the gradient.
    """

    summed: int
    outputs: int
    is_convolution = is_diagonal = units_apart = False
    reads = jnp.floating
    ends_in_units = True

    def examples(self, cotangents: Array) -> int:
        """Each row counts as one, and each axis of outputs but the last."""
        return math.prod(cotangents.shape[:-1])

    def likeness(self, params: LayerParams, inputs: Array) -> Float[Array, ""] | float:
        """How much of the inputs is the mean over an example's positions, by norm."""
        del params
        positions = tuple(range(1, inputs.ndim - self.summed))
        mean = jnp.mean(inputs, axis=positions, keepdims=True)
        whole = jnp.mean(jnp.square(inputs))
        return jnp.mean(jnp.square(mean)) / jnp.where(whole == 0, 1, whole)

    def from_matrix(
        self, matrix: Float[Array, "g d o"], like: LayerParams
    ) -> LayerParams:
        """A matrix in the shapes of the parameters."""
        return _in_shapes(*_parted(matrix, like), like)

    def join_inputs(self, parts: Sequence[Array], stack_dims: int) -> Array:
        """The rows of several calls; their axes are made one where calls differ."""
        return _joined(parts, stack_dims, self.summed)

    def join_outputs(self, parts: Sequence[Array], stack_dims: int) -> Array:
        """The same for pre-activations, cotangents and targets."""
        return _joined(parts, stack_dims, self.outputs)


@dataclass(frozen=True)
class Product(_OfRows):
    """A product with the kernel, plus a bias.

    The input's last axes are summed with the kernel's first, in their order; all other
    axes of the input count rows.

    Attributes:
      summed: how many axes are.
      outputs: how many axes the kernel has beside them.
    """

    summed: int = 1
    outputs: int = 1

    def __str__(self) -> str:
        """What it is called in tables."""
        return "product"

    def __call__(self, params: LayerParams, inputs: Array) -> Array:
        """Computes the product and adds the bias; what is not given counts as zero."""
        preactivations = jnp.tensordot(inputs, params["kernel"], axes=self.summed)
        return preactivations + params["bias"] if "bias" in params else preactivations

    def design(self, params: LayerParams, inputs: Array) -> Float[Array, "g n d"]:
        """The inputs, their axes made rows and columns."""
        columns = math.prod(params["kernel"].shape[: self.summed])
        return _with_ones(inputs.reshape(1, -1, columns), params)

    def to_matrix(self, params: LayerParams) -> Float[Array, "g d o"]:
        """The kernel with the axes that are summed made one, and the others."""
        kernel = params["kernel"]
        matrix = kernel.reshape(1, math.prod(kernel.shape[: self.summed]), -1)
        return _with_bias(matrix, params)

    def squares(self, params: LayerParams, inputs: Array) -> Float[Array, "g d"]:
        r"""The diagonal of :math:`X^\top X`."""
        return _squares(self.design(params, inputs))


DENSE = Product()


@dataclass(frozen=True)
class Convolution:
    """A convolution, plus a bias; inputs `(batch, *space, channels)`.

    Its kernel has the shape `(*window, channels of a group, outputs)`.

    Attributes:
      strides: of the window.
      padding: before and after, for each axis of space.
      input_dilation: of the inputs, more than 1 in a transposed convolution.
      kernel_dilation: of the window.
      groups: of channels that see inputs of their own.
    """

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    groups: int = 1
    summed = outputs = 1
    is_convolution = True  # for which XLA is slow in a loop and under vmap
    is_diagonal = units_apart = False
    reads = jnp.floating
    likeness = _OfRows.likeness

    @property
    def ends_in_units(self) -> bool:
        """Whether all units see all inputs.

        A matrix that mixes the units of cotangents then mixes those of the gradient.
        """
        return self.groups == 1

    def __str__(self) -> str:
        """What it is called in tables."""
        groups = f" in {self.groups} groups" if self.groups > 1 else ""
        return f"convolution{groups}"

    def __call__(self, params: LayerParams, inputs: Array) -> Array:
        """Convolves and adds the bias; what is not given counts as zero."""
        preactivations = self._convolve(inputs, params["kernel"])
        return preactivations + params["bias"] if "bias" in params else preactivations

    def _convolve(self, inputs: Array, kernel: Array) -> Array:
        rank = len(self.strides)
        last = (0, rank + 1, *range(1, rank + 1))
        specs = jax.lax.ConvDimensionNumbers(last, (rank + 1, rank, *range(rank)), last)
        dtype = jnp.result_type(inputs, kernel)
        return jax.lax.conv_general_dilated(
            inputs.astype(dtype),
            kernel.astype(dtype),
            self.strides,
            self.padding,
            self.input_dilation,
            self.kernel_dilation,
            specs,
            self.groups,
        )

    def examples(self, cotangents: Array) -> int:
        """The positions of an example share its loss."""
        return cotangents.shape[0]

    def design(self, params: LayerParams, inputs: Array) -> Float[Array, "g n d"]:
        """What the layer makes of kernels that pick one entry each."""
        shape = params["kernel"].shape
        rows, channels = math.prod(shape[:-1]), shape[-1] // self.groups
        passes = -(-rows // channels)
        picks = jnp.eye(rows, passes * channels, dtype=inputs.dtype)
        picks = jnp.tile(picks.reshape(rows, passes, 1, channels), (self.groups, 1))
        picks = jnp.moveaxis(picks, 1, 0).reshape(passes, *shape)
        picked = jax.vmap(lambda kernel: self._convolve(inputs, kernel), out_axes=-2)
        entries = picked(picks).reshape(-1, passes, self.groups, channels)
        entries = jnp.moveaxis(entries, 2, 0)
        design = entries.reshape(*entries.shape[:2], -1)[..., :rows]
        return _with_ones(design, params)

    def to_matrix(self, params: LayerParams) -> Float[Array, "g d o"]:
        """The kernel with all axes but the channels' made one, by group."""
        kernel = params["kernel"]
        entries = kernel.reshape(-1, self.groups, kernel.shape[-1] // self.groups)
        return _with_bias(jnp.moveaxis(entries, 1, 0), params)

    def from_matrix(
        self, matrix: Float[Array, "g d o"], like: LayerParams
    ) -> LayerParams:
        """Puts the axes back to where they were."""
        kernel, bias = _parted(matrix, like)
        return _in_shapes(jnp.moveaxis(kernel, 0, 1), bias, like)

    def squares(self, params: LayerParams, inputs: Array) -> Float[Array, "g d"]:
        r"""The diagonal of :math:`X^\top X`."""
        return _squares(self.design(params, inputs))

    def join_inputs(self, parts: Sequence[Array], stack_dims: int) -> Array:
        """The examples of several calls, one after another."""
        return jnp.concatenate(parts, axis=stack_dims)

    def join_outputs(self, parts: Sequence[Array], stack_dims: int) -> Array:
        """The same for pre-activations, cotangents and targets."""
        return jnp.concatenate(parts, axis=stack_dims)


@dataclass(frozen=True)
class Lookup(_OfRows):
    """Rows of a table; inputs are their numbers. What is added is a lookup, too.

    Its kernel has the shape `(rows of the table, outputs)`.

    Attributes:
      fixed: whether the same rows are read for each batch, as a summand's are.
      clips: whether numbers out of the table mean its first or last row. Otherwise
        they read zeros.
    """

    fixed: bool = False
    clips: bool = False
    summed, outputs = 0, 1
    is_diagonal, reads = True, jnp.integer

    def __str__(self) -> str:
        """What it is called in tables."""
        return "summand" if self.fixed else "lookup"

    def __call__(self, params: LayerParams, inputs: Array) -> Array:
        """Looks the rows up."""
        mode = "clip" if self.clips else "fill"
        return params["kernel"].at[inputs].get(mode=mode, fill_value=0)

    def likeness(self, params: LayerParams, inputs: Array) -> Float[Array, ""] | float:
        """All positions read a bias' one row; of a table, each one of its own."""
        return 1.0 if len(params["kernel"]) == 1 else 1 / math.prod(inputs.shape[1:])

    def squares(self, params: LayerParams, inputs: Array) -> Float[Array, "1 d"]:
        """How often each row of the table is read."""
        rows, dtype = len(params["kernel"]), params["kernel"].dtype
        if self.fixed and rows == 1:  # XLA would count constants as it compiles
            return jnp.full((1, 1), inputs.size, dtype)
        numbers = jnp.clip(inputs, 0, rows - 1) if self.clips else inputs
        none = jnp.zeros(rows, dtype)
        return none.at[numbers.reshape(-1)].add(1, mode="drop")[None]

    def to_matrix(self, params: LayerParams) -> Float[Array, "1 d o"]:
        """The table, as it is."""
        return params["kernel"][None]


@dataclass(frozen=True)
class Factor(_OfRows):
    """An elementwise product with a vector, whose entries are units of their own."""

    summed = outputs = 1
    is_diagonal = units_apart = True

    def __str__(self) -> str:
        """What it is called in tables."""
        return "factor"

    def __call__(self, params: LayerParams, inputs: Array) -> Array:
        """The product."""
        return inputs * params["kernel"]

    def squares(self, params: LayerParams, inputs: Array) -> Float[Array, "1 d"]:
        """The sum of the squares of each entry's inputs."""
        del params
        rows = inputs.reshape(-1, inputs.shape[-1])
        return jnp.sum(jnp.square(rows), axis=0)[None]

    def to_matrix(self, params: LayerParams) -> Float[Array, "1 d 1"]:
        """The vector as a column."""
        return params["kernel"][None, :, None]


LinearMap: TypeAlias = Product | Convolution | Lookup | Factor


def _joined(parts: Sequence[Array], stack_dims: int, columns: int) -> Array:
    rows = [part.shape[stack_dims : part.ndim - columns] for part in parts]
    if len({shape[1:] for shape in rows}) > 1 or any(not shape for shape in rows):
        parts = [
            p.reshape(*p.shape[:stack_dims], -1, *p.shape[p.ndim - columns :])
            for p in parts
        ]
    return jnp.concatenate(parts, axis=stack_dims)


def _squares(design: Float[Array, "g n d"]) -> Float[Array, "g d"]:
    return jnp.sum(jnp.square(design), axis=1)


def _with_ones(design: Array, params: LayerParams) -> Array:
    """The design, and the ones that a bias is multiplied by."""
    if "bias" not in params:
        return design
    return jnp.concatenate([design, jnp.ones_like(design[..., :1])], axis=-1)


def _with_bias(kernel: Array, params: LayerParams) -> Array:
    """The kernel of each group, and its bias as one more row."""
    if "bias" not in params:
        return kernel
    bias = params["bias"].reshape(len(kernel), 1, -1)
    return jnp.concatenate([kernel, bias], axis=1)


def _parted(matrix: Array, like: LayerParams) -> tuple[Array, Array | None]:
    """The kernel's rows of each group, and the bias' if there is one."""
    return (matrix[:, :-1], matrix[:, -1]) if "bias" in like else (matrix, None)


def _in_shapes(kernel: Array, bias: Array | None, like: LayerParams) -> LayerParams:
    shaped = {"kernel": kernel.reshape(like["kernel"].shape)}
    if bias is not None:
        shaped["bias"] = bias.reshape(like["bias"].shape)
    return shaped
