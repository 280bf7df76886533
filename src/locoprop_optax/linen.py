"""Capture of a Linen model's intermediates, without touching the model.

An interceptor probes each layer's output while the loss runs. The probes sit in
`params` beside the kernels, and so travel wherever the kernels do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import optax
from flax.training import train_state

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
from locoprop_optax._linen_layers import linear_map_of, register_linear
from locoprop_optax._probes import recorded
from locoprop_optax._transfers import Transfer

__all__ = [
    "TrainState",
    "model_and_loss",
    "register_linear",
    "tabulate",
    "value_and_grad",
]

_PROBE = "locoprop_probe:"


def value_and_grad(
    loss_fn: Callable[..., Any],
    has_aux: bool = False,
    transfers: Transfers | None = None,
    exclude: PathPattern | None = None,
    curvature: bool = False,
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
    known = as_transfers(transfers)

    def loss_grads_and_intermediates(params, *args, **kwargs):
        found = _discover(loss_fn, has_aux, known, exclude, params, args, kwargs)

        def probed_loss(params, probes):
            with _intercepted(_record):
                return loss_fn(_with_probes(params, probes), *args, **kwargs)

        differentiate = partial(jax.value_and_grad, probed_loss, has_aux=has_aux)
        value, (grads, records) = differentiate((0, 1))(params, found.probes())
        back = differentiate(1)
        seeded_records = (lambda probes: back(params, probes)[1]) if curvature else None
        intermediates = found.intermediates(params, grads, records, seeded_records)
        return value, grads, intermediates

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
    known = as_transfers(transfers)

    def show(params, *args, **kwargs):
        found = _discover(loss_fn, has_aux, known, exclude, params, args, kwargs)
        return table(found.captures, params, exclude)

    return show


def model_and_loss(
    apply_fn: Callable[..., Any],
    loss_fn: Callable[[Any], jax.Array],
    *inputs: Any,
    collections: Mapping[str, Any] | None = None,
    mutable: Sequence[str] = (),
    **options: Any,
) -> ModelAndLoss:
    """Parts a loss into a model and a loss of its outputs, for one batch.

    `curveball` and `scale_by_quadratic_model` take the two functions.

    Args:
      apply_fn: the model's `apply`.
      loss_fn: from the model's outputs to a scalar.
      *inputs: what the model is called with.
      collections: the collections beside `params`, such as batch statistics.
      mutable: those that a pass changes.
      **options: other options of `apply_fn`, such as `rngs`, which stay the same in all
        passes of a step.

    Returns:
      The functions of the parameters, and one to the changed collections.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn
      >>> import locoprop_optax as loco
      >>> model, x = nn.BatchNorm(use_running_average=False), jnp.ones((4, 3))
      >>> variables = model.init(jax.random.key(0), x)
      >>> functions = loco.linen.model_and_loss(
      ...     model.apply, lambda outputs: jnp.mean(outputs**2), x,
      ...     collections={"batch_stats": variables["batch_stats"]},
      ...     mutable=["batch_stats"])
      >>> functions.model_fn(variables["params"]).shape
      (4, 3)
      >>> list(functions.mutated(variables["params"]))
      ['batch_stats']
    """

    def run(params):
        variables = {"params": params, **(collections or {})}
        return apply_fn(variables, *inputs, mutable=list(mutable), **options)

    return ModelAndLoss(
        model_fn=lambda params: run(params)[0],
        loss_fn=loss_fn,
        mutated=lambda params: run(params)[1],
    )


class TrainState(train_state.TrainState):
    """Flax's `TrainState`, whose `apply_gradients` takes the intermediates.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn
      >>> import locoprop_optax as loco
      >>> model, x = nn.Dense(2), jnp.eye(3)
      >>> loss_fn = lambda params, x: jnp.mean((model.apply(params, x) - 1) ** 2)
      >>> state = loco.linen.TrainState.create(
      ...     apply_fn=model.apply, params=model.init(jax.random.key(0), x),
      ...     tx=loco.locoprop())
      >>> capture = loco.linen.value_and_grad(loss_fn, curvature=True)
      >>> loss, grads, intermediates = capture(state.params, x)
      >>> state = state.apply_gradients(grads=grads, intermediates=intermediates)
      >>> int(state.step)
      1
    """

    def apply_gradients(
        self, *, grads: Any, intermediates: Intermediates | None = None, **kwargs: Any
    ) -> TrainState:
        """Takes one step of the optimizer.

        Args:
          grads: the gradients.
          intermediates: each layer's intermediates, from `value_and_grad`.
          **kwargs: other fields to replace, as in Flax.

        Returns:
          The state after the step.
        """
        updates, opt_state = optax.with_extra_args_support(self.tx).update(
            grads, self.opt_state, self.params, intermediates=intermediates
        )
        params = optax.apply_updates(self.params, updates)
        return self.replace(
            step=self.step + 1, params=params, opt_state=opt_state, **kwargs
        )


def _record(
    module: nn.Module,
    path: str,
    number: int,
    owned: Mapping[str, Any],
    args: tuple[Any, ...],
    output: Any,
) -> jax.Array:
    """Handles a layer's call while the loss is differentiated."""
    del module
    probe = owned[_PROBE + path].get(str(number))
    return output if probe is None else recorded(probe, args[0], output)


@contextmanager
def _intercepted(handle: Callable[..., jax.Array]) -> Iterator[None]:
    """Passes the output of each call of a probed layer through `handle`."""
    calls: dict[str, int] = {}
    active: set[str] = set()

    def interceptor(next_fun, args, kwargs, context):
        scope = context.module.scope
        if context.method_name != "__call__" or scope is None:
            return next_fun(*args, **kwargs)
        owned = scope.variables().get("params", {})
        key = next((k for k in owned if k.startswith(_PROBE)), None)
        path = key and key.removeprefix(_PROBE)
        if path is None or path in active:  # not local, or a call of super()
            return next_fun(*args, **kwargs)
        active.add(path)
        try:
            output = next_fun(*args, **kwargs)
        finally:
            active.remove(path)
        calls[path] = number = calls.get(path, -1) + 1
        inputs = (*args, *kwargs.values())
        return handle(context.module, path, number, owned, inputs, output)

    with nn.intercept_methods(interceptor):
        yield


def _with_probes(tree: Any, probes: Mapping[str, Any], parent: str = "") -> Any:
    """Puts each layer's probe beside its parameters, under a key that says its path."""

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
        remake: Any = type(node)
        return remake(copy)

    is_mapping = lambda node: isinstance(node, Mapping)  # noqa: E731
    return jax.tree.map_with_path(visit, tree, is_leaf=is_mapping)


def _discover(
    loss_fn: Callable[..., Any],
    has_aux: bool,
    transfers: Mapping[str, Transfer],
    exclude: PathPattern | None,
    params: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Plan:
    """Traces the loss to learn how each layer is captured."""
    anchors = {p: a for p, a in anchors_of(params).items() if not matches(exclude, p)}

    def discover(module, path, number, owned, args, output):
        boxed = {n: leaf for n, leaf in owned.items() if not n.startswith(_PROBE)}
        leaves = nn.meta.unbox(boxed)
        linear_map = linear_map_of(module, leaves, args)
        if linear_map is None:
            return output
        return tapped(
            type(module).__name__,
            linear_map,
            layer=path,
            number=number,
            probe=owned[_PROBE + path],
            kernel=leaves["kernel"],
            inputs=args[0],
            preactivations=output,
        )

    def tapped_loss(params, probes):
        with _intercepted(discover):
            result = loss_fn(_with_probes(params, probes), *args, **kwargs)
        return loss_in(result, has_aux)

    closed = jax.make_jaxpr(tapped_loss)(params, anchors)
    return plan(closed, params, anchors, transfers)
