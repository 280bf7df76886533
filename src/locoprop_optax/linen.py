"""Capture of a Linen model's intermediates, without touching the model.

While the loss runs, an interceptor passes the output of each layer through an identity
with a derivative of its own. It also takes a probe, an array of zeros that sits in
`params` beside the layer's kernel and so travels wherever the kernel does, and returns
the layer's input, pre-activation and cotangent as the probe's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from locoprop_optax._graph import tap
from locoprop_optax._intermediates import Intermediates, LayerIntermediates
from locoprop_optax._layers import PathPattern, layers_of, matches
from locoprop_optax._linear_maps import DENSE, LinearMap
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
_PROBE = "locoprop_probe:"


def value_and_grad(
    loss_fn: Callable[..., Any],
    has_aux: bool = False,
    transfers: Transfers | None = None,
    exclude: PathPattern | None = None,
) -> Callable[..., tuple[Any, Any, Intermediates]]:
    r"""`jax.value_and_grad` that also returns each layer's intermediates.

    From one forward and one backward pass of an unchanged model come the loss
    :math:`L`, its gradients, and for each layer with :math:`a = xW + b` its input
    :math:`x`, pre-activation :math:`a` and cotangent :math:`\partial L/\partial a`.
    The loss is also traced once, without being run, to find the transfer functions.

    Args:
      loss_fn: a function from params, a tree of arrays, and any other arguments to a
        scalar loss, or to (loss, aux). It calls Linen modules in any way it likes.
      has_aux: whether `loss_fn` returns (loss, aux).
      transfers: transfer functions by layer path or glob, which override what is
        found: names, `losses.Transfer`s or elementwise callables.
      exclude: layers not to capture: a glob over paths, several, or a predicate. Name
        them in the optimizer's `exclude=` too.

    Returns:
      A function with the arguments of `loss_fn` that returns (loss, grads,
      intermediates), or ((loss, aux), grads, intermediates).

    Raises:
      ValueError: when called, if a name in `transfers` is unknown or its path fits no
        layer, if a layer's inputs are integers, or if a layer's records cannot be
        told apart. The message names the layer.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn
      >>> import locoprop_optax as loco
      >>> model = nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(1)])
      >>> x = jnp.ones((5, 3))
      >>> loss_fn = lambda params, x: jnp.mean(model.apply({"params": params}, x) ** 2)
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> loss, grads, intermediates = loco.linen.value_and_grad(loss_fn)(params, x)
      >>> intermediates.layers["layers_0"].transfer.name
      'tanh'
    """
    overrides = _as_transfers(transfers)

    def loss_grads_and_intermediates(params, *args, **kwargs):
        captures = _discover(loss_fn, has_aux, overrides, exclude, params, args, kwargs)
        probes = {path: capture.probes() for path, capture in captures.items()}

        def probed_loss(params, probes):
            with _intercepted(_record):
                return loss_fn(_with_probes(params, probes), *args, **kwargs)

        value, (grads, records) = jax.value_and_grad(
            probed_loss, argnums=(0, 1), has_aux=has_aux
        )(params, probes)
        gradients = layers_of(grads)
        layers = {
            path: capture.collect(records[path], gradients[path])
            for path, capture in captures.items()
        }
        return value, grads, Intermediates(layers)

    return loss_grads_and_intermediates


def tabulate(
    loss_fn: Callable[..., Any],
    has_aux: bool = False,
    transfers: Transfers | None = None,
    exclude: PathPattern | None = None,
) -> Callable[..., str]:
    """Shows what `value_and_grad` captures: each layer, and its transfer function.

    Nothing is computed: the loss is traced.

    Args:
      loss_fn: as for `value_and_grad`.
      has_aux: as for `value_and_grad`.
      transfers: as for `value_and_grad`.
      exclude: as for `value_and_grad`.

    Returns:
      A function with the arguments of `loss_fn` that returns the table as text.

    Raises:
      ValueError: when called, as `value_and_grad`.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn
      >>> import locoprop_optax as loco
      >>> model = nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(1)])
      >>> x = jnp.ones((5, 3))
      >>> loss_fn = lambda params, x: jnp.mean(model.apply({"params": params}, x) ** 2)
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> print(loco.linen.tabulate(loss_fn)(params, x))
      layer     kind   inputs  preactivations  transfer  why
      layers_0  Dense  (5, 3)  (5, 4)          tanh      applied to the pre-activation
      layers_2  Dense  (5, 4)  (5, 1)          identity  the loss is its matching loss
    """
    overrides = _as_transfers(transfers)

    def table(params, *args, **kwargs):
        captures = _discover(loss_fn, has_aux, overrides, exclude, params, args, kwargs)
        rows = [("layer", "kind", "inputs", "preactivations", "transfer", "why")]
        for path in _kernels(params):
            if path not in captures:
                why = "excluded" if matches(exclude, path) else "not captured"
                rows.append((path, "", "", "", "", why))
                continue
            capture = captures[path]
            finding = capture.finding
            for call in capture.calls:
                shapes = (str(call.inputs.shape), str(call.preactivations.shape))
                found = (finding.transfer.name, finding.reason)
                rows.append((path, call.kind, *shapes, *found))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = (
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))
            for row in rows
        )
        return "\n".join(line.rstrip() for line in lines)

    return table


class _Call(NamedTuple):
    """One call of a layer while the loss was traced."""

    number: int
    kind: str
    linear_map: LinearMap
    kernel_shape: tuple[int, ...]
    inputs: jax.ShapeDtypeStruct
    preactivations: jax.ShapeDtypeStruct


class _Capture(NamedTuple):
    """How a layer is captured: its calls, stacked as often as its kernel is."""

    calls: tuple[_Call, ...]
    stack: tuple[int, ...]
    finding: Finding

    def probes(self) -> dict[str, Any]:
        """Zeros in the shapes of the records of each call."""

        def zeros(like):
            return jnp.zeros(self.stack + like.shape, like.dtype)

        return {
            str(call.number): _Record(
                zeros(call.inputs),
                zeros(call.preactivations),
                zeros(call.preactivations),
            )
            for call in self.calls
        }

    def collect(
        self, records: Mapping[str, _Record], gradient: Mapping[str, jax.Array]
    ) -> LayerIntermediates:
        """The layer's intermediates, several calls joined along their examples."""
        record, *more = (records[str(call.number)] for call in self.calls)
        if more:
            record = jax.tree.map(self._join, record, *more)
        return LayerIntermediates(
            *record,
            gradient=gradient,
            transfer=self.finding.transfer,
            linear_map=self.calls[0].linear_map,
            stack_dims=len(self.stack),
        )

    def _join(self, *arrays: jax.Array) -> jax.Array:
        stack = self.stack
        rows = [a.reshape(*stack, -1, a.shape[-1]) for a in arrays]
        return jnp.concatenate(rows, axis=len(stack))


class _Record(NamedTuple):
    inputs: jax.Array
    preactivations: jax.Array
    cotangents: jax.Array


@jax.custom_vjp
def _probed(probe: _Record, inputs: jax.Array, preactivations: jax.Array) -> jax.Array:
    """The pre-activations; the gradient of `probe` is the layer's record."""
    del probe, inputs
    return preactivations


def _probed_forward(probe, inputs, preactivations):
    del probe
    return preactivations, (inputs, preactivations)


def _probed_backward(saved, cotangents):
    return _Record(*saved, cotangents), None, cotangents


_probed.defvjp(_probed_forward, _probed_backward)


def _record(
    module: nn.Module, path: str, number: int, probes: Any, inputs: Any, output: Any
) -> jax.Array:
    """Handles a layer's call while the loss is differentiated."""
    del module, path
    probe = probes.get(str(number))
    return output if probe is None else _probed(_Record(*probe), inputs, output)


@contextmanager
def _intercepted(handle: Callable[..., jax.Array]) -> Iterator[None]:
    """Passes the output of each call of a probed layer through `handle`."""
    calls: dict[str, int] = {}

    def interceptor(next_fun, args, kwargs, context):
        scope = context.module.scope
        if context.method_name != "__call__" or scope is None:
            return next_fun(*args, **kwargs)
        owned = scope.variables().get("params", {})
        key = next((k for k in owned if k.startswith(_PROBE)), None)
        if key is None:
            return next_fun(*args, **kwargs)
        path = key.removeprefix(_PROBE)
        calls[path] = number = calls.get(path, -1) + 1
        (inputs,) = (*args, *kwargs.values())
        output = next_fun(*args, **kwargs)
        return handle(context.module, path, number, owned[key], inputs, output)

    with nn.intercept_methods(interceptor):
        yield


def _with_probes(tree: Any, probes: Mapping[str, Any], parent: str = "") -> Any:
    """Puts each layer's probe beside its kernel, under a key that says its path."""

    def visit(key_path, node):
        keys = [jax.tree_util.keystr((k,), simple=True) for k in key_path]
        path = "/".join(filter(None, (parent, *keys)))
        if not isinstance(node, Mapping):
            return node
        copy = {
            key: _with_probes(value, probes, "/".join(filter(None, (path, str(key)))))
            for key, value in node.items()
        }
        if path in probes:
            copy[_PROBE + path] = probes[path]
        return type(node)(copy)

    is_mapping = lambda node: isinstance(node, Mapping)  # noqa: E731
    return jax.tree.map_with_path(visit, tree, is_leaf=is_mapping)


def _kernels(params: Any) -> dict[str, Any]:
    """The kernel of each layer that owns one."""
    layers = layers_of(params).items()
    return {path: leaves["kernel"] for path, leaves in layers if "kernel" in leaves}


def _discover(
    loss_fn: Callable[..., Any],
    has_aux: bool,
    overrides: Mapping[str, Transfer],
    exclude: PathPattern | None,
    params: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[str, _Capture]:
    """Traces the loss to learn each layer's calls, shapes and transfer function."""
    kernels = {p: k for p, k in _kernels(params).items() if not matches(exclude, p)}
    for pattern in overrides:
        if not any(matches(pattern, path) for path in kernels):
            raise ValueError(
                f"transfers={{{pattern!r}: ...}} fits no layer. Layers that own a "
                f"kernel: {', '.join(map(repr, kernels))}."
            )
    calls: dict[tuple[str, int], _Call] = {}

    def discover(module, path, number, probe, inputs, output):
        linear_map = _linear_map_of(module)
        if linear_map is None:
            return output
        if not jnp.issubdtype(jnp.result_type(inputs), jnp.floating):
            raise ValueError(
                f"Layer {path!r}: its inputs have dtype {jnp.result_type(inputs)}, "
                "expected a floating-point dtype. Cast them before the model."
            )
        calls[path, number] = _Call(
            number,
            type(module).__name__,
            linear_map,
            probe.shape,
            jax.ShapeDtypeStruct(jnp.shape(inputs), jnp.result_type(inputs)),
            jax.ShapeDtypeStruct(output.shape, output.dtype),
        )
        return tap(probe, output, layer=path, call=number)

    def tapped_loss(params, probes):
        with _intercepted(discover):
            result = loss_fn(_with_probes(params, probes), *args, **kwargs)
        return result[0] if has_aux else result

    closed = jax.make_jaxpr(tapped_loss)(params, kernels)
    sightings: dict[str, list[Sighting]] = {}
    for sighting in survey(closed, list(known_transfers().values())):
        sightings.setdefault(sighting.layer, []).append(sighting)
    return {
        path: _capture(path, seen, calls, kernels[path], overrides)
        for path, seen in sightings.items()
    }


def _capture(
    path: str,
    sightings: list[Sighting],
    calls: Mapping[tuple[str, int], _Call],
    kernel: jax.Array,
    overrides: Mapping[str, Transfer],
) -> _Capture:
    for sighting in sightings:
        if sighting.trouble is not None:
            raise ValueError(
                f"Layer {path!r} cannot be captured: {sighting.trouble}. Name it in "
                "`exclude=`, here and in the optimizer, to leave it to the fallback."
            )
    made = tuple(calls[path, s.call] for s in sorted(sightings, key=lambda s: s.call))
    inner = made[0].kernel_shape
    stack = kernel.shape[: kernel.ndim - len(inner)]
    if stack + inner != kernel.shape:
        raise ValueError(
            f"Layer {path!r} cannot be captured: its kernel of shape {kernel.shape} is "
            f"used in slices of shape {inner}, which are not stacked along its first "
            "axes. Stack them there, or name the layer in `exclude=`."
        )
    return _Capture(made, stack, _finding(path, sightings, overrides))


def _finding(
    path: str, sightings: list[Sighting], overrides: Mapping[str, Transfer]
) -> Finding:
    for pattern, transfer in overrides.items():
        if matches(pattern, path):
            return Finding(transfer, "given in transfers=")
    first, *others = (s.finding for s in sightings)
    if any(other.transfer != first.transfer for other in others):
        names = " and ".join(sorted({s.finding.transfer.name for s in sightings}))
        return Finding(IDENTITY, f"its calls differ: {names}")
    return first


def _linear_map_of(module: nn.Module) -> LinearMap | None:
    """The linear map of a module whose kind is known."""
    plain = isinstance(module, nn.Dense) and module.dot_general is None
    return DENSE if plain and module.dot_general_cls is None else None


def _as_transfers(transfers: Transfers | None) -> dict[str, Transfer]:
    return {path: as_transfer(t) for path, t in (transfers or {}).items()}
