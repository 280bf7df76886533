"""Which parameters form a layer, and in which form its records have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from locoprop_optax._records.form import Form
from locoprop_optax._records.linear_maps import LayerParams, LinearMap, Lookup
from locoprop_optax._records.paths import by_path, is_masked, map_by_path
from locoprop_optax.losses._transfers import Transfer


class Call(NamedTuple):
    """The sizes of one use of a layer as a product of matrices."""

    rows: int
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Layer:
    """A layer as a loss uses it, whichever the batch.

    Attributes:
      path: of its weight.
      bias: the path of its bias, if it has one.
      forms: from the weight, and from the bias, to the kernel and the bias of
        `linear_map`, stacked layers in front.
      linear_map: from kernel and bias to the pre-activation.
      stack: the shape of the axes in front that count stacked layers.
      transfer: the function that is applied to the pre-activation.
      reason: why it is taken for that.
      calls: the sizes of its uses when it was found; for people to read.
    """

    path: str
    bias: str | None
    forms: Mapping[str, Form] = field(hash=False)
    linear_map: LinearMap
    stack: tuple[int, ...]
    transfer: Transfer
    reason: str
    calls: tuple[Call, ...] = field(compare=False)

    @property
    def is_table(self) -> bool:
        """Whether different inputs read different rows of its weight."""
        rows = self.forms["kernel"].result[len(self.stack)]
        return isinstance(self.linear_map, Lookup) and rows > 1

    def is_like(self, other: Layer | None) -> bool:
        """Whether another layer has the same parameters, in the same form."""
        return other is not None and self._form == other._form

    @property
    def _form(self) -> tuple[Any, ...]:
        return self.path, self.bias, self.forms, self.stack, type(self.linear_map)

    @property
    def paths(self) -> dict[str, str]:
        """The path of each of its parameters, by what it is to the layer."""
        bias = {} if self.bias is None else {"bias": self.bias}
        return {"kernel": self.path, **bias}


class Cut(NamedTuple):
    """Where a traced loss is cut: at the last values in which its rest is convex.

    Attributes:
      values: of these values, where their equations stand and which of the results
        they are there; none if there are no such values.
      params: the numbers of the parameters that the rest reads, as penalties do.
      transfers: for each value the function of which the loss is the matching loss;
        None where there is none.
      equations: of how many equations the loss is made.
    """

    values: tuple[tuple[tuple[int, ...], int], ...]
    params: tuple[int, ...]
    transfers: tuple[Transfer | None, ...]
    equations: int


@dataclass(frozen=True)
class Layers:
    """The layers of a loss, as `layers` finds them; static and hashable.

    Printing it shows each layer: the path of its weight, its product, how many rows,
    inputs and outputs that has, and its transfer function and why; below, which
    parameters are no layers and why, and what is known of the loss's curvature.

    Attributes:
      layers: the layers, in the order of their execution.
      others: the path of each other parameter, and why it is no layer.
      cut: where the loss is cut for its Gauss-Newton model.
      curvature: the same in words.
    """

    layers: tuple[Layer, ...]
    others: tuple[tuple[str, str], ...]
    cut: Cut = field(compare=False)
    curvature: str = field(compare=False)

    def __str__(self) -> str:
        """The table."""
        rows = [("layer", "product", "rows", "inputs", "outputs", "transfer", "why")]
        rows += [row for layer in self.layers for row in _rows(layer)]
        parts = [_aligned(rows)]
        if self.others:
            parts.append(_aligned([("no layer", "why"), *self.others]))
        return "\n\n".join([*parts, f"curvature: {self.curvature}"])

    __repr__ = __str__

    def __iter__(self):
        """The layers."""
        return iter(self.layers)

    @property
    def paths(self) -> set[str]:
        """The paths of all parameters of layers."""
        return {path for layer in self.layers for path in layer.paths.values()}

    def split(self, tree: Any) -> dict[str, dict[str, Any]]:
        """What a tree like the parameters holds for each layer that is not masked."""
        held = by_path(tree)
        parts: dict[str, dict[str, Any]] = {}
        for layer in self.layers:
            own = {name: held.get(path) for name, path in layer.paths.items()}
            seen = {n: v for n, v in own.items() if v is not None and not is_masked(v)}
            if seen:
                parts[layer.path] = {n: layer.forms[n](v) for n, v in seen.items()}
        return parts

    def merge(self, tree: Any, parts: Mapping[str, LayerParams]) -> Any:
        """The tree with the layers' parts in the places of its own."""
        replaced = {
            layer.paths[name]: layer.forms[name].undo(value)
            for layer in self.layers
            for name, value in parts.get(layer.path, {}).items()
        }
        return map_by_path(replaced.get, tree)


def _rows(layer: Layer) -> list[tuple[str, ...]]:
    bias = "" if layer.bias is None else f" + {layer.bias.split('/')[-1]}"
    stack = f", {' × '.join(map(str, layer.stack))} layers" if layer.stack else ""
    return [
        (
            layer.path + bias,
            f"{layer.linear_map}{stack}",
            *map(str, call),
            layer.transfer.name,
            layer.reason,
        )
        for call in layer.calls
    ]


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
