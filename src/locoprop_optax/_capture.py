"""How the layers of a loss are captured, as a trace of the loss tells it.

Each call of a layer is recorded by a probe; which probes to make, and in which shapes,
is learnt from the trace.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from locoprop_optax._curvature import (
    CallOf,
    Layers,
    curvature_at,
    part,
    sampled_at_outputs,
)
from locoprop_optax._graph import Graph, tap
from locoprop_optax._intermediates import (
    Intermediates,
    LayerIntermediates,
    add_sampled_cotangents,
)
from locoprop_optax._layers import (
    LayerParams,
    PathPattern,
    anchor,
    layers_of,
    matches,
    split_key_path,
)
from locoprop_optax._linear_maps import DENSE, LinearMap, concatenate_examples
from locoprop_optax._probes import Probes, Record, Seeded
from locoprop_optax._sharding import typed, zeros
from locoprop_optax._survey import Sighting, survey
from locoprop_optax._transfer_detection import Finding
from locoprop_optax._transfers import (
    IDENTITY,
    Elementwise,
    Transfer,
    as_transfer,
    known_transfers,
)

Transfers = Mapping[str, str | Transfer | Elementwise]


class Call(NamedTuple):
    """One call of a layer while the loss was traced, as the layer sees it.

    Attributes:
      kind: the name of the layer's class.
      linear_map: how its pre-activation depends on its parameters.
      kernel_shape: the shape of its kernel.
      inputs: the type of its input.
      preactivations: the type of its output.
    """

    kind: str
    linear_map: LinearMap
    kernel_shape: tuple[int, ...]
    inputs: jax.ShapeDtypeStruct
    preactivations: jax.ShapeDtypeStruct


def tapped(
    kind: str,
    linear_map: LinearMap,
    *,
    layer: str,
    number: int,
    probe: jax.Array,
    kernel: jax.Array,
    inputs: jax.Array,
    preactivations: jax.Array,
) -> jax.Array:
    """Taps a layer's pre-activation, with a note of its call.

    Raises:
      ValueError: if the inputs are not floating-point numbers.
    """
    dtype = jnp.result_type(inputs)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"Layer {layer!r}: its inputs have dtype {dtype}, expected a "
            "floating-point dtype. Cast them before the model."
        )
    note = Call(
        kind,
        linear_map,
        jnp.shape(kernel),
        typed(inputs),
        typed(preactivations),
    )
    return tap(probe, kernel, preactivations, layer=layer, number=number, note=note)


class Capture(NamedTuple):
    """How one layer is captured.

    Attributes:
      calls: its calls by number, in order.
      stack: the leading axes of its kernel that count layers of a stack.
      finding: its transfer function.
    """

    calls: dict[int, Call]
    stack: tuple[int, ...]
    finding: Finding

    def probes(self) -> dict[str, Record]:
        """Zeros in the shapes of the record of each call."""
        return {
            str(number): Record(
                inputs=zeros(call.inputs, self.stack),
                preactivations=zeros(call.preactivations, self.stack),
                cotangents=zeros(call.preactivations, self.stack),
            )
            for number, call in self.calls.items()
        }

    def collect(
        self, records: Mapping[str, Record], gradient: LayerParams
    ) -> LayerIntermediates:
        """The layer's intermediates, several calls joined along their examples."""
        first, *more = (records[str(number)] for number in self.calls)
        linear_map = next(iter(self.calls.values())).linear_map

        def join(*arrays):
            return concatenate_examples(linear_map, arrays, len(self.stack))

        record = jax.tree.map(join, first, *more) if more else first
        return LayerIntermediates(
            inputs=record.inputs,
            preactivations=record.preactivations,
            cotangents=record.cotangents,
            gradient=gradient,
            transfer=self.finding.transfer,
            linear_map=linear_map,
            stack_dims=len(self.stack),
        )


class Plan(NamedTuple):
    """How a loss is captured.

    Attributes:
      captures: how each layer is.
      closed: the trace of the loss, with a tap at each call.
      arguments: from parameters, by layer and name, to what the trace is called with.
      by_loss: the calls of whose results the loss is the matching loss, and of which
        transfer function.
      penalized: the parameters of captured layers that the loss reads in another way as
        well, by layer.
    """

    captures: dict[str, Capture]
    closed: core.ClosedJaxpr
    arguments: Callable[[Layers], list[jax.Array]]
    by_loss: dict[CallOf, Transfer]
    penalized: dict[str, set[str]]

    def probes(self, seeds: Mapping[CallOf, jax.Array] | None = None) -> Probes:
        """The probes of all calls; a pass back begins at those that have seeds."""
        probes: Probes = {
            path: capture.probes() for path, capture in self.captures.items()
        }
        for (path, number), seed in (seeds or {}).items():
            record = probes[path][str(number)]
            seed = seed.astype(record.cotangents.dtype)
            probes[path][str(number)] = Seeded(record, seed)
        return probes

    def intermediates(
        self,
        params: Any,
        grads: Any,
        records: Probes,
        seeded_records: Callable[[Probes], Probes] | None = None,
    ) -> Intermediates:
        """The intermediates of all layers.

        Args:
          params: the parameters.
          grads: the loss's gradients.
          records: of all calls.
          seeded_records: from probes with seeds to their records, for the loss's
            curvature and sampled cotangents; None to do without.
        """
        gradient, layers = layers_of(grads), layers_of(params)
        captured = self._with_penalties(self._collect(records, gradient), layers)
        if seeded_records is None:
            return captured
        parted = part(self.closed, self.by_loss, self.arguments, layers, self.penalized)
        found = seeded_records(self.probes(sampled_at_outputs(parted, layers)))
        for path, number in self.by_loss:
            found[path][str(number)] = found[path][str(number)].record
        both = add_sampled_cotangents(captured, self._collect(found, gradient))
        return replace(both, curvature=curvature_at(parted, layers, gradient))

    def _with_penalties(self, captured: Intermediates, layers: Layers) -> Intermediates:
        """Tells the gradients of penalties from those through the layers."""
        told_apart = {}
        for path in self.penalized:
            layer = captured.layers[path]
            through = layer.pull_back(layers[path])
            penalty = {name: layer.gradient[name] - g for name, g in through.items()}
            told_apart[path] = replace(layer, gradient=through, penalty=penalty)
        return replace(captured, layers={**captured.layers, **told_apart})

    def _collect(self, records: Probes, gradient: Layers) -> Intermediates:
        return Intermediates(
            {
                path: capture.collect(records[path], gradient[path])
                for path, capture in self.captures.items()
            }
        )


def loss_in(result: Any, has_aux: bool) -> Any:
    """The loss in what a loss function returned.

    Raises:
      TypeError: if there is more in it than was said.
    """
    if isinstance(result, tuple) and not has_aux:
        raise TypeError(
            f"loss_fn returned a tuple of {len(result)}, expected the loss alone. If "
            "it is (loss, aux), pass has_aux=True."
        )
    return result[0] if has_aux else result


def as_transfers(transfers: Transfers | None) -> dict[str, Transfer]:
    """The user's transfer functions, each name looked up."""
    return {path: as_transfer(t) for path, t in (transfers or {}).items()}


def anchors_of(params: Any) -> dict[str, jax.Array]:
    """A parameter of each layer whose leading axes tell how the layer is stacked."""
    return {path: leaves[anchor(leaves)] for path, leaves in layers_of(params).items()}


def plan(
    closed: core.ClosedJaxpr,
    params: Any,
    anchored: Collection[str],
    transfers: Mapping[str, Transfer],
) -> Plan:
    """Decides how each layer is captured.

    Args:
      closed: the trace of the loss, with a tap at each call; its first arguments are
        the parameters, then those that stand for the layers.
      params: the parameters.
      anchored: the layers that a parameter stands for.
      transfers: transfer functions by layer path or glob, which override what the
        trace shows.

    Raises:
      ValueError: if a pattern fits no layer, or a layer's records would not be whole.
    """
    layers = layers_of(params)
    names = [split_key_path(k) for k, _ in jax.tree.leaves_with_path(params)]
    kernels = {at: path for at, (path, name) in enumerate(names) if name == "kernel"}
    sightings: dict[str, list[Sighting]] = {}
    for sighting in survey(closed, kernels, list(known_transfers().values())):
        sightings.setdefault(sighting.layer, []).append(sighting)
    for pattern in transfers:
        if not any(matches(pattern, path) for path in sightings):
            raise ValueError(
                f"transfers={{{pattern!r}: ...}} fits no captured layer. Captured: "
                f"{', '.join(map(repr, sightings)) or 'none'}."
            )
    captures = {}
    for path, seen in sightings.items():
        calls = {s.number: s.note for s in _whole(path, seen)}
        stack = _stack(path, calls, layers[path]["kernel"].shape)
        captures[path] = Capture(calls, stack, _finding(path, seen, transfers))
    by_loss = {
        (path, sighting.number): sighting.finding.transfer
        for path, seen in sightings.items()
        for sighting in seen
        if sighting.finding.by_loss
    }

    penalized: dict[str, set[str]] = {}
    for at in Graph.of(closed).read_past_taps():
        path, name = names[at] if at < len(names) else ("", "")
        if path in captures:
            penalized.setdefault(path, set()).add(name)

    def arguments(layers):
        given = [layers[path][name] for path, name in names]
        stand_ins = [layers[path][anchor(layers[path])] for path in sorted(anchored)]
        return given + [jnp.zeros_like(stand_in) for stand_in in stand_ins]

    return Plan(captures, closed, arguments, by_loss, penalized)


def _whole(path: str, sightings: Sequence[Sighting]) -> list[Sighting]:
    """A layer's sightings in the order of its calls, if all its records are whole."""

    def refuse(reason: str) -> None:
        raise ValueError(
            f"Layer {path!r} cannot be captured: {reason}. Name it in `exclude=`, here "
            "and in the optimizer, to leave it to the fallback."
        )

    for sighting in sightings:
        if sighting.trouble is not None:
            refuse(sighting.trouble)
    ordered = sorted(sightings, key=lambda s: s.number)
    shapes = {s.note.inputs.shape[1:] for s in ordered}
    maps = {s.note.linear_map for s in ordered}
    if len(maps) > 1:
        different = " and ".join(sorted(map(str, maps)))
        refuse(f"its calls compute different things, {different}")
    if len(shapes) > 1 and maps != {DENSE}:
        several = " and ".join(map(str, sorted(shapes)))
        refuse(f"it is called with inputs whose examples have the shapes {several}")
    return ordered


def _stack(
    path: str, calls: Mapping[int, Call], shape: tuple[int, ...]
) -> tuple[int, ...]:
    inner = next(iter(calls.values())).kernel_shape
    stack = shape[: len(shape) - len(inner)]
    if stack + inner != shape:
        raise ValueError(
            f"Layer {path!r} cannot be captured: its kernel of shape {shape} is used "
            f"in slices of shape {inner}, which are not stacked along its first axes. "
            "Stack them there, or name the layer in `exclude=`."
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
    for path, leaves in layers_of(params).items():
        if path in captures:
            transfer, reason, _ = captures[path].finding
            for call in captures[path].calls.values():
                shapes = (str(call.inputs.shape), str(call.preactivations.shape))
                rows.append((path, call.kind, *shapes, transfer.name, reason))
        elif "kernel" in leaves:
            why = "excluded" if matches(exclude, path) else NOT_CAPTURED
            rows.append((path, "", "", "", "", why))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


NOT_CAPTURED = "not captured: not called, or of an unknown kind; name it in exclude="
