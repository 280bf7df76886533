"""Capture of a layer's intermediates as the gradient of a probe.

A probe is an array of zeros that travels with a layer's parameters. The layer's output
passes through an identity that also takes the probe, and whose derivative returns the
layer's input, pre-activation and cotangent as the probe's gradient. Which probes to
make, and in which shapes, is learnt from a trace of the loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from locoprop_optax._intermediates import LayerIntermediates
from locoprop_optax._layers import PathPattern, layers_of, matches
from locoprop_optax._linear_maps import LinearMap
from locoprop_optax._survey import Sighting, survey
from locoprop_optax._transfer_detection import Finding
from locoprop_optax.losses import (
    IDENTITY,
    Elementwise,
    Transfer,
    as_transfer,
    known_transfers,
)

Transfers = Mapping[str, str | Transfer | Elementwise]


class Record(NamedTuple):
    """What one call of a layer leaves behind; also the form of its probe."""

    inputs: jax.Array
    preactivations: jax.Array
    cotangents: jax.Array


@jax.custom_vjp
def probed(probe: Record, inputs: jax.Array, preactivations: jax.Array) -> jax.Array:
    """The pre-activations; the gradient of `probe` is the call's record."""
    del probe, inputs
    return preactivations


def _probed_forward(probe, inputs, preactivations):
    del probe
    return preactivations, (inputs, preactivations)


def _probed_backward(saved, cotangents):
    inputs, preactivations = saved
    return Record(inputs, preactivations, cotangents), None, cotangents


probed.defvjp(_probed_forward, _probed_backward)


class Call(NamedTuple):
    """One call of a layer while the loss was traced.

    Attributes:
      number: which of the layer's calls it is, as counted while tracing.
      kind: the name of the layer's class.
      linear_map: how its pre-activation depends on its parameters.
      kernel_shape: the shape of its kernel, as the layer sees it.
      inputs: shape and dtype of its input, as the layer sees it.
      preactivations: shape and dtype of its output, as the layer sees it.
    """

    number: int
    kind: str
    linear_map: LinearMap
    kernel_shape: tuple[int, ...]
    inputs: jax.ShapeDtypeStruct
    preactivations: jax.ShapeDtypeStruct

    @classmethod
    def of(
        cls,
        layer: str,
        number: int,
        kind: str,
        linear_map: LinearMap,
        kernel: jax.Array,
        inputs: jax.Array,
        preactivations: jax.Array,
    ) -> Call:
        """Notes a call, of arrays that may be abstract.

        Raises:
          ValueError: if the inputs are not floating-point numbers.
        """
        dtype = jnp.result_type(inputs)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"Layer {layer!r}: its inputs have dtype {dtype}, expected a "
                "floating-point dtype. Cast them before the model."
            )
        shapes = (
            jax.ShapeDtypeStruct(jnp.shape(array), jnp.result_type(array))
            for array in (inputs, preactivations)
        )
        return cls(number, kind, linear_map, kernel.shape, *shapes)


class Capture(NamedTuple):
    """How one layer is captured.

    Attributes:
      calls: its calls, in order.
      stack: the leading axes of its kernel that count layers of a stack.
      finding: its transfer function.
    """

    calls: tuple[Call, ...]
    stack: tuple[int, ...]
    finding: Finding

    def probes(self) -> dict[str, Record]:
        """Zeros in the shapes of the record of each call."""

        def zeros(like):
            return jnp.zeros(self.stack + like.shape, like.dtype)

        return {
            str(call.number): Record(
                inputs=zeros(call.inputs),
                preactivations=zeros(call.preactivations),
                cotangents=zeros(call.preactivations),
            )
            for call in self.calls
        }

    def collect(
        self, records: Mapping[str, Record], gradient: Mapping[str, jax.Array]
    ) -> LayerIntermediates:
        """The layer's intermediates, several calls joined along their examples."""
        first, *more = (records[str(call.number)] for call in self.calls)
        record = jax.tree.map(self._join, first, *more) if more else first
        return LayerIntermediates(
            inputs=record.inputs,
            preactivations=record.preactivations,
            cotangents=record.cotangents,
            gradient=gradient,
            transfer=self.finding.transfer,
            linear_map=self.calls[0].linear_map,
            stack_dims=len(self.stack),
        )

    def _join(self, *arrays: jax.Array) -> jax.Array:
        rows = [a.reshape(*self.stack, -1, a.shape[-1]) for a in arrays]
        return jnp.concatenate(rows, axis=len(self.stack))


def as_transfers(transfers: Transfers | None) -> dict[str, Transfer]:
    """The user's transfer functions, each name looked up."""
    return {path: as_transfer(t) for path, t in (transfers or {}).items()}


def kernels_of(params: Any) -> dict[str, jax.Array]:
    """The kernel of each layer that owns one."""
    layers = layers_of(params).items()
    return {path: leaves["kernel"] for path, leaves in layers if "kernel" in leaves}


def plan(
    closed: core.ClosedJaxpr,
    calls: Mapping[tuple[str, int], Call],
    kernels: Mapping[str, jax.Array],
    transfers: Mapping[str, Transfer],
) -> dict[str, Capture]:
    """Decides how each layer is captured.

    Args:
      closed: the trace of the loss, with a tap at each call.
      calls: all calls by layer and number, as noted while tracing.
      kernels: the kernels of the layers to capture.
      transfers: transfer functions by layer path or glob, which override what the
        trace shows.

    Raises:
      ValueError: if a pattern fits no layer, or a layer's records would not be whole.
    """
    for pattern in transfers:
        if not any(matches(pattern, path) for path in kernels):
            raise ValueError(
                f"transfers={{{pattern!r}: ...}} fits no layer. Layers that own a "
                f"kernel: {', '.join(map(repr, kernels))}."
            )
    sightings: dict[str, list[Sighting]] = {}
    for sighting in survey(closed, list(known_transfers().values())):
        sightings.setdefault(sighting.layer, []).append(sighting)
    return {
        path: Capture(
            calls=(made := tuple(calls[path, s.call] for s in _whole(path, seen))),
            stack=_stack(path, made, kernels[path]),
            finding=_finding(path, seen, transfers),
        )
        for path, seen in sightings.items()
    }


def _whole(path: str, sightings: Sequence[Sighting]) -> list[Sighting]:
    """A layer's sightings in the order of its calls, if all its records are whole."""
    for sighting in sightings:
        if sighting.trouble is not None:
            raise ValueError(
                f"Layer {path!r} cannot be captured: {sighting.trouble}. Name it in "
                "`exclude=`, here and in the optimizer, to leave it to the fallback."
            )
    return sorted(sightings, key=lambda s: s.call)


def _stack(path: str, calls: Sequence[Call], kernel: jax.Array) -> tuple[int, ...]:
    inner = calls[0].kernel_shape
    stack = kernel.shape[: kernel.ndim - len(inner)]
    if stack + inner != kernel.shape:
        raise ValueError(
            f"Layer {path!r} cannot be captured: its kernel of shape {kernel.shape} is "
            f"used in slices of shape {inner}, which are not stacked along its first "
            "axes. Stack them there, or name the layer in `exclude=`."
        )
    return stack


def _finding(
    path: str, sightings: Sequence[Sighting], transfers: Mapping[str, Transfer]
) -> Finding:
    for pattern, transfer in transfers.items():
        if matches(pattern, path):
            return Finding(transfer, "given in transfers=")
    first, *others = (s.finding for s in sightings)
    if any(other.transfer != first.transfer for other in others):
        names = " and ".join(sorted({s.finding.transfer.name for s in sightings}))
        return Finding(IDENTITY, f"its calls differ: {names}")
    return first


def table(
    captures: Mapping[str, Capture], params: Any, exclude: PathPattern | None
) -> str:
    """All layers that own a kernel, and how each is captured."""
    rows = [("layer", "kind", "inputs", "preactivations", "transfer", "why")]
    for path in kernels_of(params):
        if path not in captures:
            why = "excluded" if matches(exclude, path) else "not captured"
            rows.append((path, "", "", "", "", why))
            continue
        transfer, reason = captures[path].finding
        for call in captures[path].calls:
            shapes = (str(call.inputs.shape), str(call.preactivations.shape))
            rows.append((path, call.kind, *shapes, transfer.name, reason))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
