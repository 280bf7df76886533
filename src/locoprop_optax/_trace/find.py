"""Which parameters of a traced loss form layers, and why others do not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from glob import escape
from typing import Any

from locoprop_optax._records.layers import Call, Cut, Layer, Layers
from locoprop_optax._records.paths import PathPattern, matches
from locoprop_optax._trace.trace import Trace, trace
from locoprop_optax._trace.transfer import Finding, find_transfer
from locoprop_optax._trace.uses import Use
from locoprop_optax.losses._transfers import (
    IDENTITY,
    Elementwise,
    Transfer,
    as_transfer,
    known_transfers,
)

Transfers = Mapping[str, str | Transfer | Elementwise]

_UNKNOWN = Finding(IDENTITY, "")


def layers(
    loss_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    transfers: Transfers | None = None,
    exclude: PathPattern | None = None,
) -> Callable[..., Layers]:
    """Finds the layers of a loss: the places where a parameter enters linearly.

    The loss is traced, without being run. A layer is a product of a parameter with
    something else, a matrix product in any number of axes or a convolution, together
    with what is added to all of its rows; a lookup in a parameter; or an elementwise
    factor or summand. Parameters are taken as they are or rearranged, in loops, under
    `jax.vmap` and `jax.checkpoint`, and whichever library calls them.

    Args:
      loss_fn: a function from params, a tree of arrays, and any other arguments to a
        scalar loss, or to (loss, aux).
      has_aux: whether `loss_fn` returns (loss, aux). Default: no.
      transfers: transfer functions by the path of a weight or a glob, which override
        what is found: names, `losses.Transfer`s or elementwise callables.
      exclude: parameters that are to be no layers: a glob over paths, several, or a
        predicate.

    Returns:
      A function with the arguments of `loss_fn` that returns the `Layers`. They are the
      same for batches of other sizes.

    Raises:
      TypeError: when called, if `loss_fn` returns no scalar loss.
      ValueError: when called, if a name in `transfers` is unknown or its path fits no
        layer, if there is no layer, or if the products of some matrices are hidden: in
        a `while` loop, a `shard_map` or a function with a derivative rule of its own,
        or because a kernel is computed from them. The message names them all, and what
        to exclude.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn
      >>> import locoprop_optax as loco
      >>> model = nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(1)])
      >>> x = jnp.ones((5, 3))
      >>> loss_fn = lambda params, x: jnp.mean(model.apply({"params": params}, x) ** 2)
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> layers = loco.layers(loss_fn)(params, x)
      >>> [(layer.path, layer.transfer.name) for layer in layers]
      [('layers_0/kernel', 'tanh'), ('layers_2/kernel', 'identity')]
    """
    given = {path: as_transfer(t) for path, t in (transfers or {}).items()}

    def find(params, *args, **kwargs):
        traced, _ = trace(loss_fn, has_aux, params, args, kwargs)
        return find_layers(traced, given, exclude)

    return find


def find_layers(
    traced: Trace, transfers: Mapping[str, Transfer], exclude: PathPattern | None
) -> Layers:
    """The layers of a traced loss."""
    chosen = own_uses(traced, exclude)
    findings = _findings(traced, chosen, transfers)
    found = tuple(
        layer_of(traced.paths, uses, findings[weight])
        for weight, uses in chosen.items()
    )
    parts = {path for layer in found for path in layer.paths.values()}
    others = tuple(
        (path, _why_not(traced, at, matches(exclude, path)))
        for at, path in enumerate(traced.paths)
        if path not in parts
    )
    _check_found(traced, found, others)
    for pattern in _globs(exclude):
        if not any(matches(pattern, path) for path in traced.paths):
            raise ValueError(
                f"exclude={pattern!r} fits no parameter. Parameters: "
                f"{', '.join(map(repr, traced.paths))}."
            )
    for pattern in transfers:
        if not any(matches(pattern, layer.path) for layer in found):
            raise ValueError(
                f"transfers={{{pattern!r}: ...}} fits no layer. Layers: "
                f"{', '.join(repr(layer.path) for layer in found)}."
            )
    cut = traced.cut(
        {
            uses[0].preactivation: findings[weight].transfer
            for weight, uses in chosen.items()
            if len(uses) == 1 and findings[weight].by_loss
        }
    )
    return Layers(found, others, cut, _curvature(traced, cut))


def _globs(exclude: PathPattern | None) -> Sequence[str]:
    if exclude is None or callable(exclude):
        return ()
    return (exclude,) if isinstance(exclude, str) else exclude


def own_uses(traced: Trace, exclude: PathPattern | None) -> dict[int, list[Use]]:
    """The uses of each parameter that are those of a layer.

    A layer computes the same in all its uses; of several things that a parameter is
    used for, a product with most rows, or else what has most. What else it does has a
    share in its gradient alone.
    """
    reading = traced.reading
    by_weight: dict[int, dict[Any, list[Use]]] = {}
    excluded = {at for at, path in enumerate(traced.paths) if matches(exclude, path)}
    no_weights = excluded | reading.computed
    for use in reading.uses:
        weight = use.linear.weight
        if weight in no_weights:
            continue
        kind = use.linear._replace(bias=None), use.stack
        by_weight.setdefault(weight, {}).setdefault(kind, []).append(use)
    chosen, taken = [], set()
    for alike in by_weight.values():
        uses = max(alike.values(), key=_worth)
        bias, *others = {u.linear.bias and u.linear.bias[0] for u in uses}
        if bias is None or others or bias in taken | excluded:
            uses = list(map(without_bias, uses))
        else:
            taken.add(bias)
        chosen.append(uses)
    chosen.sort(key=lambda uses: uses[0].position)
    by_number = {uses[0].linear.weight: uses for uses in chosen}
    return {number: uses for number, uses in by_number.items() if number not in taken}


def _worth(uses: Sequence[Use]) -> tuple[bool, int]:
    """Products come first, then what has more rows."""
    is_product = not uses[0].linear.linear_map.is_diagonal
    return is_product, sum(_sizes(use).rows for use in uses)


def without_bias(use: Use) -> Use:
    """A use whose bias, if there is one, is something by itself."""
    if use.linear.bias is None:
        return use
    equations = use.graph.equations
    (number,) = next(e.outputs for e in equations if e.position == use.position)
    return use._replace(linear=use.linear._replace(bias=None), preactivation=number)


def _findings(
    traced: Trace,
    chosen: Mapping[int, Sequence[Use]],
    transfers: Mapping[str, Transfer],
) -> dict[int, Finding]:
    """The transfer function of each layer."""
    known = list(known_transfers().values())
    products: dict[int, set[int]] = {}
    for use in (use for uses in chosen.values() for use in uses):
        if not use.linear.linear_map.is_diagonal:
            products.setdefault(id(use.graph), set()).add(use.preactivation)

    def finding(path: str, uses: Sequence[Use]) -> Finding:
        for pattern, transfer in transfers.items():
            if matches(pattern, path):
                return Finding(transfer, "given in transfers=")
        if uses[0].linear.linear_map.is_diagonal:
            return Finding(IDENTITY, "looked for behind products alone")
        found = [find_transfer(u, products[id(u.graph)], known) for u in uses]
        names = {other.transfer.name for other in found}
        if len(names) > 1:
            return Finding(IDENTITY, f"its calls differ: {' and '.join(sorted(names))}")
        return found[0]

    return {w: finding(traced.paths[w], uses) for w, uses in chosen.items()}


def layer_of(
    paths: Sequence[str], uses: Sequence[Use], finding: Finding = _UNKNOWN
) -> Layer:
    """A layer by its uses."""
    first = uses[0]
    linear = first.linear
    bias = {} if linear.bias is None else {"bias": linear.bias[1]}
    return Layer(
        path=paths[linear.weight],
        bias=None if linear.bias is None else paths[linear.bias[0]],
        forms={"kernel": linear.kernel, **bias},
        linear_map=linear.linear_map,
        stack=first.stack,
        transfer=finding.transfer,
        reason=finding.reason,
        calls=tuple(_sizes(use) for use in uses),
    )


def _sizes(use: Use) -> Call:
    stack, units = len(use.stack), use.linear.linear_map.outputs
    kernel, outputs = use.linear.kernel.result[stack:], use.outputs.shape[stack:]
    return Call(
        rows=math.prod(outputs[:-units]),
        inputs=math.prod(kernel[:-units]),
        outputs=math.prod(kernel[-units:]),
    )


_LOSSES = {
    "identity": "squared error",
    "sigmoid": "sigmoid cross-entropy",
    "softmax": "softmax cross-entropy",
}


def _curvature(traced: Trace, cut: Cut) -> str:
    """What is known of a loss's curvature."""
    if not cut.values:
        return (
            "none; the loss is curved upwards in nothing that its layers give, so that "
            "each batch's own cotangents stand for sampled ones"
        )

    graph = traced.graph

    def of(place: tuple[Any, int], transfer: Transfer | None) -> str:
        shape = "×".join(map(str, graph.avals[graph.places[place]].shape))
        if transfer is None:
            named = "sampled cotangents by its Hessian's diagonal"
        else:
            named = _LOSSES.get(transfer.name, f"matching loss of {transfer.name}")
        return f"outputs of shape {shape} ({named})"

    parts = [of(*pair) for pair in zip(cut.values, cut.transfers, strict=True)]
    penalized = [traced.paths[number] for number in cut.params]
    if penalized:
        more = f" and {len(penalized) - 1} more" if len(penalized) > 1 else ""
        parts.append(f"the parameters {penalized[0]!r}{more}")
    return f"the loss is convex in {', '.join(parts)}"


def _why_not(traced: Trace, number: int, is_excluded: bool) -> str:
    reading = traced.reading
    if is_excluded:
        return "excluded"
    if number in reading.hidden:
        return reading.hidden[number]
    ways = list(reading.otherwise.get(number, []))
    return ", ".join(ways) if ways else "the loss does not depend on it"


def _check_found(
    traced: Trace, found: Sequence[Layer], others: Sequence[tuple[str, str]]
) -> None:
    """Raises one error for all matrices whose products are not seen."""
    numbers = {path: at for at, path in enumerate(traced.paths)}
    shapes = [traced.graph.avals[n].shape for n in traced.graph.inputs]
    hidden = {
        path: why
        for path, why in others
        if traced.reading.hidden.get(numbers[path]) == why
        and len(shapes[numbers[path]]) > 1
    }
    if hidden:
        lines = "\n".join(f"- {path!r}: {why}" for path, why in hidden.items())
        globs = [escape(path) for path in hidden]
        raise ValueError(
            f"These parameters cannot be captured:\n{lines}\nUse them as they are, or "
            f"pass exclude={globs} to locoprop_optax.layers, to leave them to the "
            "fallback."
        )
    if not found:
        seen = "; ".join(f"{path!r}: {why}" for path, why in others) or "none"
        raise ValueError(
            "No layer was found: no parameter is multiplied with, added to or looked "
            f"up by anything that is no parameter. Parameters: {seen}."
        )
