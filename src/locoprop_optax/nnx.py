"""Capture of an NNX model's intermediates, without touching the model.

The loss runs on a copy of the model in which each layer carries a probe as one more
parameter, while the layers' classes pass each output by it. State that the loss
changes, such as batch statistics and random counts, is put back into the model, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
from flax import nnx

from locoprop_optax._capture import (
    Plan,
    Transfers,
    anchors_of,
    as_transfers,
    loss_in,
    plan,
    table,
    tapped,
)
from locoprop_optax._gauss_newton import ModelAndLoss
from locoprop_optax._intermediates import Intermediates
from locoprop_optax._layers import PathPattern, matches
from locoprop_optax._nnx_layers import linear_map_of, register_linear
from locoprop_optax._probes import recorded
from locoprop_optax._transfers import Transfer

__all__ = ["model_and_loss", "register_linear", "tabulate", "value_and_grad"]


class Probe(nnx.Param):
    """A layer's probe; a parameter, so that it is stacked and sliced as those are."""


def value_and_grad(
    loss_fn: Callable[..., Any],
    has_aux: bool = False,
    transfers: Transfers | None = None,
    exclude: PathPattern | None = None,
    curvature: bool = False,
) -> Callable[..., tuple[Any, nnx.State, Intermediates]]:
    r"""`nnx.value_and_grad` that also returns each layer's intermediates.

    From one forward and one backward pass of an unchanged model come the loss
    :math:`L`, its gradients with respect to the model's `nnx.Param`s, and for each
    layer with :math:`a = xW + b` its input :math:`x`, pre-activation :math:`a` and
    cotangent :math:`\partial L/\partial a`. The loss is also traced once, on a copy of
    the model, to find the transfer functions.

    Args:
      loss_fn: a function from a model and any other arguments to a scalar loss, or to
        (loss, aux).
      has_aux: whether `loss_fn` returns (loss, aux).
      transfers: transfer functions by layer path or glob, which override what is
        found: names, `losses.Transfer`s or elementwise callables.
      exclude: layers not to capture: a glob over paths, several, or a predicate. Name
        them in the optimizer's `exclude=` too.
      curvature: whether the intermediates hold the loss's Gauss-Newton model, and
        cotangents for sampled labels, as `locoprop` needs them. The loss must be a
        squared error, or a sigmoid or softmax cross-entropy, of the outputs of layers,
        plus penalties on parameters, which the model leaves out. Call it in the same
        `jax.jit` as the optimizer's update, which then shares its forward pass.
        Default: no.

    Returns:
      A function with the arguments of `loss_fn` that returns (loss, grads,
      intermediates), or ((loss, aux), grads, intermediates).

    Raises:
      ValueError: when called, if a name in `transfers` is unknown or its path fits no
        layer, if a layer's inputs are integers, or if a layer's records cannot be
        told apart, or with `curvature` if the loss is no matching loss of its last
        layers. The message names the layer.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import locoprop_optax as loco
      >>> model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, loco.locoprop(), wrt=nnx.Param)
      >>> loss_fn = lambda model, x: jnp.mean((model(x) - 0.5) ** 2)
      >>> capture = loco.nnx.value_and_grad(loss_fn, curvature=True)
      >>> @nnx.jit
      ... def train_step(model, optimizer, x):
      ...     loss, grads, intermediates = capture(model, x)
      ...     optimizer.update(model, grads, intermediates=intermediates)
      ...     return loss
      >>> losses = [float(train_step(model, optimizer, jnp.eye(3))) for _ in range(9)]
      >>> losses[-1] < losses[0]
      True
    """
    known = as_transfers(transfers)

    def loss_grads_and_intermediates(model, *args, **kwargs):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        found = _discover(
            loss_fn, has_aux, known, exclude, (graphdef, params, rest), args, kwargs
        )

        def probed_loss(params, probes):
            copy = _with_probes(nnx.merge(graphdef, params, rest, copy=True), probes)
            others = _copied(args), _copied(kwargs)
            with _intercepted(copy, _record):
                result = loss_fn(copy, *others[0].values(), **others[1])
            loss, aux = result if has_aux else (result, None)
            changed = nnx.state(copy, nnx.Not(nnx.Param)), *map(_states, others)
            return loss, (aux, changed)

        differentiate = partial(jax.value_and_grad, probed_loss, has_aux=True)
        (loss, (aux, changed)), (grads, records) = differentiate((0, 1))(
            params, found.probes()
        )
        back = differentiate(1)
        nnx.update(model, changed[0])
        for given, states in ((args, changed[1]), (kwargs, changed[2])):
            for key, state in states.items():
                nnx.update(given[key], state)
        seeded_records = (lambda probes: back(params, probes)[1]) if curvature else None
        intermediates = found.intermediates(params, grads, records, seeded_records)
        value = (loss, aux) if has_aux else loss
        return value, grads, intermediates

    return loss_grads_and_intermediates


def tabulate(
    loss_fn: Callable[..., Any],
    has_aux: bool = False,
    transfers: Transfers | None = None,
    exclude: PathPattern | None = None,
) -> Callable[..., str]:
    """Shows what `value_and_grad` captures: each layer, and its transfer function.

    Nothing is computed: the loss is traced, on a copy of the model.

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
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import locoprop_optax as loco
      >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.tanh)
      >>> loss_fn = lambda model, x: jnp.mean((model(x) - 0.5) ** 2)
      >>> print(loco.nnx.tabulate(loss_fn)(model, jnp.ones((5, 3))))
      layer     kind    inputs  preactivations  transfer  why
      layers/0  Linear  (5, 3)  (5, 4)          tanh      applied to the pre-activation
    """
    known = as_transfers(transfers)

    def show(model, *args, **kwargs):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        parts = (graphdef, params, rest)
        found = _discover(loss_fn, has_aux, known, exclude, parts, args, kwargs)
        return table(found.captures, params, exclude)

    return show


def model_and_loss(
    model: nnx.Module, loss_fn: Callable[[Any], jax.Array], *inputs: Any, **options: Any
) -> ModelAndLoss:
    """Parts a loss into a model and a loss of its outputs, for one batch.

    `curveball` and `scale_by_quadratic_model` take the two functions. The model itself
    is not changed; random counts stay the same in all passes of a step.

    Args:
      model: the model.
      loss_fn: from the model's outputs to a scalar.
      *inputs: what the model is called with.
      **options: what else it is called with, by name.

    Returns:
      The functions of the parameters, an `nnx.State`, and one to the state that a pass
      changes, to be put into the model by `nnx.update`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import locoprop_optax as loco
      >>> model, x = nnx.BatchNorm(3, rngs=nnx.Rngs(0)), jnp.ones((4, 3))
      >>> functions = loco.nnx.model_and_loss(model, lambda y: jnp.mean(y**2), x)
      >>> params = nnx.state(model, nnx.Param)
      >>> functions.model_fn(params).shape
      (4, 3)
      >>> nnx.update(model, functions.mutated(params))
      >>> [round(float(mean), 2) for mean in model.mean]
      [0.01, 0.01, 0.01]
    """
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)

    def run(params):
        copy: Any = nnx.merge(graphdef, params, rest, copy=True)
        outputs = copy(*inputs, **options)
        return outputs, nnx.state(copy, nnx.Not(nnx.Param))

    return ModelAndLoss(
        model_fn=lambda params: run(params)[0],
        loss_fn=loss_fn,
        mutated=lambda params: run(params)[1],
    )


def _discover(
    loss_fn: Callable[..., Any],
    has_aux: bool,
    transfers: Mapping[str, Transfer],
    exclude: PathPattern | None,
    parts: tuple[Any, nnx.State, nnx.State],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Plan:
    """Traces the loss to learn how each layer is captured."""
    graphdef, params, rest = parts
    anchors = {p: a for p, a in anchors_of(params).items() if not matches(exclude, p)}

    def discover(module, number, args, output):
        leaves = {
            name: value[...]
            for name, value in vars(module).items()
            if isinstance(value, nnx.Param) and not isinstance(value, Probe)
        }
        linear_map = linear_map_of(module, leaves, args)
        if linear_map is None:
            return output
        return tapped(
            type(module).__name__,
            linear_map,
            layer=module.locoprop_path,
            number=number,
            probe=module.locoprop_probe.get_value(),
            kernel=leaves["kernel"],
            inputs=args[0],
            preactivations=output,
        )

    def tapped_loss(params, probes):
        copy = _with_probes(nnx.merge(graphdef, params, rest, copy=True), probes)
        with _intercepted(copy, discover):
            result = loss_fn(copy, *_copied(args).values(), **_copied(kwargs))
        return loss_in(result, has_aux)

    closed = jax.make_jaxpr(tapped_loss)(params, anchors)
    return plan(closed, params, anchors, transfers)


def _copied(arguments: Any) -> dict[Any, Any]:
    """The arguments by position or name, copies of those that hold state."""
    items = arguments if isinstance(arguments, dict) else dict(enumerate(arguments))
    return {
        key: nnx.clone(value) if isinstance(value, nnx.Pytree) else value
        for key, value in items.items()
    }


def _states(arguments: dict[Any, Any]) -> dict[Any, nnx.State]:
    """The states of those arguments that hold any."""
    held = {k: v for k, v in arguments.items() if isinstance(v, nnx.Pytree)}
    return {key: nnx.state(value) for key, value in held.items()}


def _record(module: Any, number: int, args: tuple[Any, ...], output: Any) -> Any:
    """Handles a layer's call while the loss is differentiated."""
    probe = module.locoprop_probe.get_value().get(str(number))
    return output if probe is None else recorded(probe, args[0], output)


def _with_probes(model: Any, probes: Mapping[str, Any]) -> Any:
    """Gives each layer its probe, and the path that the probe is known by."""
    modules: list[tuple[Any, Any]] = list(nnx.iter_modules(model))
    for keys, module in modules:
        path = "/".join(map(str, keys))
        if path in probes:
            module.locoprop_path = path
            module.locoprop_probe = Probe(probes[path])
    return model


@contextmanager
def _intercepted(model: Any, handle: Callable[..., Any]) -> Iterator[None]:
    """Passes the output of each call of a probed layer through `handle`."""
    calls: dict[str, int] = {}
    active: set[str] = set()

    def intercept(call):
        def intercepted_call(self, *args, **kwargs):
            path = getattr(self, "locoprop_path", None)
            if path is None or path in active:  # not local, or a call of super()
                return call(self, *args, **kwargs)
            active.add(path)
            try:
                output = call(self, *args, **kwargs)
            finally:
                active.remove(path)
            calls[path] = number = calls.get(path, -1) + 1
            return handle(self, number, (*args, *kwargs.values()), output)

        return intercepted_call

    modules = (module for _, module in nnx.iter_modules(model))
    kinds = {type(m) for m in modules if hasattr(m, "locoprop_probe")}
    own_calls = {kind: kind.__call__ for kind in kinds}
    inherited = {kind for kind in kinds if "__call__" not in vars(kind)}
    try:
        for kind, call in own_calls.items():
            kind.__call__ = intercept(call)
        yield
    finally:
        for kind, call in own_calls.items():
            if kind in inherited:
                del kind.__call__
            else:
                kind.__call__ = call
