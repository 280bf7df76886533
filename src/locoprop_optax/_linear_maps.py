r"""How a layer's pre-activation depends on its parameters: always linearly.

A linear map is all that a local problem knows about the kind of its layer. Seen as
matrices, a layer is a product of its design matrix with its kernel, once for each of
its groups (one, but for grouped convolutions and batched products):

.. math::
  a_g = X_g W_g + 1 b_g^\top, \qquad
  X_g: n \times d,\quad W_g: d \times o
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import ascii_letters
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from opt_einsum.parser import parse_einsum_input

from locoprop_optax._layers import LayerParams


class Matrices(NamedTuple):
    """A layer's parameters, or numbers of their shapes, as matrices.

    Attributes:
      kernel: W.
      bias: b as one row; None if there is none.
    """

    kernel: Float[Array, "g d o"]
    bias: Float[Array, "g 1 o"] | None


class LinearMap(Protocol):
    """A layer, linear in its parameters; hashable, so that equal layers are found."""

    @property
    def is_product(self) -> bool:
        """Whether XLA sees products of matrices alone.

        It runs them as fast in a stack of layers or in a loop, but no convolutions.
        """
        ...

    @property
    def ends_in_units(self) -> bool:
        """Whether kernel and bias end in the output's units, each with its own entries.

        A matrix that mixes the units of cotangents then mixes those of the gradient.
        """
        ...

    def __call__(self, params: LayerParams, inputs: Array) -> Array:
        """The pre-activation that the parameters give."""
        ...

    def design(self, params: LayerParams, inputs: Array) -> Float[Array, "g n d"]:
        """The matrices X; `params` gives the parameters' shapes."""
        ...

    def to_matrices(self, params: LayerParams) -> Matrices:
        """The parameters as matrices."""
        ...

    def from_matrices(self, matrices: Matrices, like: LayerParams) -> LayerParams:
        """The inverse of `to_matrices`, in the shapes of `like`."""
        ...


@dataclass(frozen=True)
class Product:
    """A product of inputs and kernel that `einsum` can write, plus a bias.

    Attributes:
      spec: the product, such as `"...i,io->...o"`. The bias has the output's axes
        that the kernel has, in the output's order.
    """

    spec: str
    is_product = True

    def __call__(self, params: LayerParams, inputs: Array) -> Array:
        """Computes the product and adds the bias; what is not given counts as zero."""
        preactivations = jnp.einsum(self.spec, inputs, params["kernel"])
        if "bias" not in params:
            return preactivations
        output = self.spec.split("->")[1].replace("...", "")
        sizes = dict(zip(self._bias_axes, params["bias"].shape, strict=True))
        shape = [sizes.get(axis, 1) for axis in output]
        return preactivations + params["bias"].reshape(shape)

    def design(self, params: LayerParams, inputs: Array) -> Float[Array, "g n d"]:
        """The inputs, their axes sorted into groups, rows and what is summed."""
        del params
        groups, summed, _ = self._kernel_axes
        axes = self.spec.split(",")[0]
        rows = "".join(axis for axis in axes if axis not in groups + summed)
        x = jnp.einsum(f"{axes}->{groups}{rows}{summed}", inputs)
        size = math.prod(x.shape[: len(groups)])
        return x.reshape(size, -1, math.prod(x.shape[x.ndim - len(summed) :]))

    def to_matrices(self, params: LayerParams) -> Matrices:
        """The kernel's axes sorted into groups, what is summed, and outputs."""
        groups, summed, outputs = self._kernel_axes
        kernel = params["kernel"]
        k = jnp.einsum(f"{self.axes}->{groups}{summed}{outputs}", kernel)
        split = len(groups), len(groups) + len(summed)
        shape = (k.shape[: split[0]], k.shape[split[0] : split[1]], k.shape[split[1] :])
        matrix = k.reshape([math.prod(part) for part in shape])
        if "bias" not in params:
            return Matrices(matrix, None)
        bias = jnp.einsum(f"{self._bias_axes}->{groups}{outputs}", params["bias"])
        return Matrices(matrix, bias.reshape(matrix.shape[0], 1, matrix.shape[2]))

    def from_matrices(self, matrices: Matrices, like: LayerParams) -> LayerParams:
        """Puts the axes back to where they were."""
        groups, summed, outputs = self._kernel_axes
        sizes = dict(zip(self.axes, like["kernel"].shape, strict=True))

        def restore(part, axes, to):
            return jnp.einsum(f"{axes}->{to}", part.reshape([sizes[a] for a in axes]))

        kernel = restore(matrices.kernel, groups + summed + outputs, self.axes)
        if matrices.bias is None:
            return {"kernel": kernel}
        bias = restore(matrices.bias, groups + outputs, self._bias_axes)
        return {"kernel": kernel, "bias": bias}

    @property
    def ends_in_units(self) -> bool:
        """Whether the kernel's last axis is the output's last and not a group's."""
        last = self.axes[-1]
        return self.spec.endswith(last) and last in self._kernel_axes[2]

    @property
    def axes(self) -> str:
        """The kernel's axes."""
        return self.spec.split("->")[0].split(",")[1]

    @property
    def _bias_axes(self) -> str:
        output = self.spec.split("->")[1]
        return "".join(axis for axis in output if axis in self.axes)

    @property
    def _kernel_axes(self) -> tuple[str, str, str]:
        """The kernel's axes that are groups, that are summed, and that are outputs."""
        sides, output = self.spec.split("->")
        inputs = sides.split(",")[0]
        groups = "".join(a for a in self.axes if a in inputs and a in output)
        summed = "".join(a for a in self.axes if a in inputs and a not in output)
        return groups, summed, "".join(a for a in self.axes if a not in inputs)


DENSE = Product("...i,io->...o")


def explicit_product(spec: str, inputs: Array, kernel: Array) -> Product:
    """The product of an einsum, its ellipses written out for these operands."""
    sides, output, _ = parse_einsum_input((spec.replace(" ", ""), inputs, kernel))
    return Product(f"{sides}->{output}")


def dense_general(
    ndim: int,
    groups: int | Sequence[int],
    summed: int | Sequence[int],
    features: int,
) -> Product:
    """The product over some axes of an input with `ndim` axes.

    Args:
      ndim: the number of the input's axes.
      groups: the axes that the kernel and the output have, too.
      summed: the axes that are summed over; the kernel has them in their order.
      features: how many axes the output gets from the kernel.
    """

    def letters(axes):
        axes = (axes,) if isinstance(axes, int) else axes
        return "".join(inputs[axis] for axis in sorted(axis % ndim for axis in axes))

    inputs, new = ascii_letters[:ndim], ascii_letters[ndim : ndim + features]
    batch, contracted = letters(groups), letters(summed)
    free = "".join(axis for axis in inputs if axis not in batch + contracted)
    return Product(f"{inputs},{batch}{contracted}{new}->{batch}{free}{new}")


@dataclass(frozen=True)
class Channelwise:
    """A layer that does the same with the inputs for each of its output channels.

    Convolutions are such layers. The layer's own forward function is all there is; its
    design matrix is what it makes of kernels that pick one entry each, as many at a
    time as it has channels.

    Attributes:
      forward: from (params, inputs) to pre-activations with channels on the last axis;
        linear in params.
      groups: how many groups of channels see inputs of their own.
      channel_axis: the kernel's axis that counts output channels, from the end.
    """

    forward: Callable[[LayerParams, Array], Array]
    groups: int = 1
    channel_axis: int = -1
    is_product = False

    @property
    def ends_in_units(self) -> bool:
        """Whether all units see all inputs, and the kernel's last axis counts them."""
        return self.groups == 1 and self.channel_axis == -1

    def __call__(self, params: LayerParams, inputs: Array) -> Array:
        """The layer's own forward function."""
        return self.forward(params, inputs)

    def design(self, params: LayerParams, inputs: Array) -> Float[Array, "g n d"]:
        """What the layer makes of kernels that pick one entry each."""
        shape = jnp.moveaxis(params["kernel"], self.channel_axis, -1).shape
        rows, channels = math.prod(shape[:-1]), shape[-1] // self.groups
        passes = -(-rows // channels)
        picks = jnp.eye(rows, passes * channels, dtype=inputs.dtype)
        picks = jnp.tile(picks.reshape(rows, passes, 1, channels), (self.groups, 1))
        picks = jnp.moveaxis(picks, 1, 0).reshape(passes, *shape)
        picks = jnp.moveaxis(picks, -1, self.channel_axis)
        others = {
            name: jnp.zeros_like(p, dtype=inputs.dtype)
            for name, p in params.items()
            if name != "kernel"
        }

        def picked(kernel):
            return self.forward({**others, "kernel": kernel}, inputs)

        entries = jax.vmap(picked, out_axes=-2)(picks)
        entries = entries.reshape(-1, passes, self.groups, channels)
        entries = jnp.moveaxis(entries, 2, 0)
        return entries.reshape(*entries.shape[:2], -1)[..., :rows]

    def to_matrices(self, params: LayerParams) -> Matrices:
        """The kernel with all axes but the channels' made one, by group."""
        kernel = jnp.moveaxis(params["kernel"], self.channel_axis, -1)
        entries = kernel.reshape(-1, self.groups, kernel.shape[-1] // self.groups)
        bias = params["bias"].reshape(self.groups, 1, -1) if "bias" in params else None
        return Matrices(jnp.moveaxis(entries, 1, 0), bias)

    def from_matrices(self, matrices: Matrices, like: LayerParams) -> LayerParams:
        """Puts the axes back to where they were."""
        shape = jnp.moveaxis(like["kernel"], self.channel_axis, -1).shape
        kernel = jnp.moveaxis(matrices.kernel, 0, 1).reshape(shape)
        kernel = jnp.moveaxis(kernel, -1, self.channel_axis)
        if matrices.bias is None:
            return {"kernel": kernel}
        return {"kernel": kernel, "bias": matrices.bias.reshape(like["bias"].shape)}


def counts_examples_first(linear_map: LinearMap) -> bool:
    """Whether the first axis of a layer's inputs and outputs counts examples."""
    product = isinstance(linear_map, Product)
    return not (product and linear_map.spec[0] in linear_map.axes)


def concatenate_examples(
    linear_map: LinearMap, arrays: Sequence[Array], stack_dims: int
) -> Array:
    """Puts the examples of several calls or micro-batches one after another.

    Raises:
      ValueError: if the layer's first axis does not count examples.
    """
    if linear_map == DENSE:
        stack = arrays[0].shape[:stack_dims]
        arrays = [a.reshape(*stack, -1, a.shape[-1]) for a in arrays]
    elif not counts_examples_first(linear_map):
        raise ValueError(
            f"Examples of {linear_map} cannot be put one after another, since its "
            "inputs' first axis does not count them. Call the layer once, or name it "
            "in `exclude=`."
        )
    return jnp.concatenate(arrays, axis=stack_dims)


def check_channelwise(
    linear_map: Channelwise, kind: str, params: LayerParams, inputs: Array
) -> None:
    """Raises a `ValueError` unless random numbers show a map to be what it claims."""
    with jax.ensure_compile_time_eval():
        keys = iter(jax.random.split(jax.random.key(0), len(params) + 1))
        x = jax.random.normal(next(keys), jnp.shape(inputs))
        drawn = {n: jax.random.normal(next(keys), p.shape) for n, p in params.items()}
        found = linear_map(drawn, x)
        kernel, bias = linear_map.to_matrices(drawn)
        expected = linear_map.design(drawn, x) @ kernel
        if bias is not None:
            expected = expected + bias
        expected = jnp.moveaxis(expected, 0, 1).reshape(found.shape)
        allowed = 1e-3 * math.sqrt(kernel.shape[1])
        same = jnp.allclose(found, expected, rtol=1e-3, atol=allowed)
    if not same:
        raise ValueError(
            f"{kind} was registered as linear in its parameters, channel by channel, "
            "but its output is not its design matrix times its kernel plus its bias. "
            "Check `groups` and `channel_axis`, or do not register it."
        )
