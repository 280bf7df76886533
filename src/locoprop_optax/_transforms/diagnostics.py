"""What the local problems of a step looked like, before and after."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from locoprop_optax._problems.problem import LocalProblem
from locoprop_optax._records.intermediates import LayerIntermediates
from locoprop_optax._records.linear_maps import LayerParams
from locoprop_optax._utils.errors import LayerError
from locoprop_optax.losses._transfers import Transfer

_FLAT = 0.01


class LayerDiagnostics(NamedTuple):
    r"""How one layer's local problem was solved in the last step.

    For a layer that is a stack of layers, means over the stack.

    Attributes:
      objective_before: the local objective at the old parameters, summed over examples.
      objective_after: the local objective at the solution. NaN, as the first, where the
        loss has no value.
      relative_update: :math:`\lVert \Delta \rVert / \lVert \theta_0 \rVert`.
      saturated: the share of pre-activations where :math:`f'` is below 1 % of its
        bound (of 1 if there is none); for a softmax, of rows with an output above 99 %.
    """

    objective_before: Float[Array, ""]
    objective_after: Float[Array, ""]
    relative_update: Float[Array, ""]
    saturated: Float[Array, ""]


def diagnostics_of(opt_state: Any) -> dict[str, LayerDiagnostics]:
    """Finds each local layer's diagnostics in the state of an optimizer.

    Args:
      opt_state: the state of any transformation that holds `scale_by_locoprop`, made
        with `diagnostics=True`.

    Returns:
      The diagnostics of the last step by layer path; zeros before the first.

    Raises:
      ValueError: if the state holds none.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn
      >>> import locoprop_optax as loco
      >>> model, x = nn.Dense(2), jnp.eye(3)
      >>> loss_fn = lambda params, x: jnp.mean((model.apply(params, x) - 1) ** 2)
      >>> params = model.init(jax.random.key(0), x)
      >>> layers = loco.layers(loss_fn)(params, x)
      >>> tx = loco.locoprop(layers, diagnostics=True)
      >>> state = tx.init(params)
      >>> loss, grads, intermediates = loco.value_and_grad(loss_fn, layers)(params, x)
      >>> _, state = tx.update(grads, state, params, intermediates=intermediates)
      >>> layer = loco.diagnostics_of(state)["params/kernel"]
      >>> bool(layer.objective_after < layer.objective_before)
      True
    """
    found: dict[str, dict[str, Any]] = {}
    for key_path, leaf in jax.tree.leaves_with_path(opt_state):
        keys = [jax.tree_util.keystr((key,), simple=True) for key in key_path]
        if "diagnostics" not in keys:
            continue
        start = keys.index("diagnostics") + 1
        at = max(keys.index(f) for f in LayerDiagnostics._fields if f in keys)
        found.setdefault(keys[start], {})[keys[at]] = leaf
    if not found:
        raise ValueError(
            "The optimizer's state holds no diagnostics. Make it with "
            "diagnostics=True, and pass the state that `update` returned."
        )
    return {path: LayerDiagnostics(**fields) for path, fields in found.items()}


def no_diagnostics() -> LayerDiagnostics:
    """The diagnostics before the first step."""
    return LayerDiagnostics(*(jnp.zeros((), jnp.float32) for _ in range(4)))


def diagnose(
    layer: LayerIntermediates, problem: LocalProblem, step: LayerParams
) -> LayerDiagnostics:
    """The diagnostics of one layer."""
    size, length = optax.tree.norm(problem.params), optax.tree.norm(step)
    return LayerDiagnostics(
        objective_before=_value(problem, problem.no_step()),
        objective_after=_value(problem, step),
        relative_update=jnp.where(size > 0, length / size, jnp.inf),
        saturated=_saturated(layer.transfer, problem.preactivations),
    )


def mean_over_stacks(diagnostics: LayerDiagnostics) -> LayerDiagnostics:
    """One number each, in float32."""
    return jax.tree.map(lambda x: jnp.mean(x, dtype=jnp.float32), diagnostics)


def _value(problem: LocalProblem, step: LayerParams) -> Array:
    try:
        return problem.value(step)
    except LayerError:
        return jnp.asarray(jnp.nan)


def _saturated(transfer: Transfer, preactivations: Array) -> Array:
    if transfer.over_last_axis:
        largest = jnp.max(transfer.function(preactivations), axis=-1)
        return jnp.mean(largest > 1 - _FLAT)
    ones = jnp.ones_like(preactivations)
    _, slope = jax.jvp(transfer.function, (preactivations,), (ones,))
    return jnp.mean(jnp.abs(slope) < _FLAT * (transfer.derivative_bound or 1.0))
