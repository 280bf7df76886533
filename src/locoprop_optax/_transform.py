"""The building block: local problems solved inside an Optax transformation."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from locoprop_optax import losses, regularizers, solvers, targets
from locoprop_optax._grouping import Grouped
from locoprop_optax._layers import (
    LayerSelection,
    PathPattern,
    is_masked,
    layers_of,
    split_key_path,
    tree_map_with_key_path,
    visible,
    with_layers,
)
from locoprop_optax._local_problem import LocalProblems, pose
from locoprop_optax._matching import check_params, match_layers


class ScaleByLocoPropState(NamedTuple):
    """State of `scale_by_locoprop`.

    Attributes:
      count: the number of updates so far.
      target: the target's state, at the place of each local kernel.
      solver: the solver's state.
    """

    count: Int[Array, ""]
    target: Any
    solver: Any


def scale_by_locoprop(
    *,
    loss: losses.LossFactory | None = None,
    target: targets.Target | None = None,
    regularizer: regularizers.Regularizer | None = None,
    solver: solvers.Solver | None = None,
    include: PathPattern | None = None,
    exclude: PathPattern | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces each local layer's gradient by the step that solves its problem.

    With a layer's parameters :math:`\theta_0`, it returns
    :math:`\theta_0 - \theta_\text{new}`, signed like a gradient, where

    .. math::
      \theta_\text{new} \approx \arg\min_\theta\
      \ell\big(a(\theta),\, t\big) + R(\theta - \theta_0) .

    Layers are local if they own a `kernel`. All other updates pass through. The
    local problems are made from `intermediates` alone, so what earlier
    transformations of a chain did to a local layer's updates has no effect.

    Args:
      loss: the local loss. Default: `losses.matching_loss()`.
      target: the local target. Default: `targets.normalized(0.05)`.
      regularizer: the local regularizer. Default: `regularizers.none()`.
      solver: how the problems are solved. Default: `solvers.majorized_newton()`.
      include: layers that are local too: a glob over paths such as `"decoder/*"`,
        several globs, or a predicate on paths.
      exclude: layers that are not local although they own a `kernel`.

    Returns:
      A transformation whose `update` takes `params` and `intermediates`, the third
      result of `linen.value_and_grad`.

    Raises:
      TypeError: from `update`, if `params` or `intermediates` is missing.
      ValueError: from `update`, if the intermediates do not fit the parameters; the
        message names the layer.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, optax
      >>> import locoprop_optax as loco
      >>> model, x = nn.Dense(2), jnp.eye(3)
      >>> loss_fn = lambda params, x: jnp.mean((model.apply(params, x) - 1) ** 2)
      >>> params = model.init(jax.random.key(0), x)
      >>> tx = optax.chain(loco.scale_by_locoprop(), optax.scale(-1.0))
      >>> state = tx.init(params)
      >>> loss, grads, intermediates = loco.linen.value_and_grad(loss_fn)(params, x)
      >>> updates, state = tx.update(
      ...     grads, state, params, intermediates=intermediates)
      >>> bool(loss_fn(optax.apply_updates(params, updates), x) < loss)
      True

    References:
      Amid, Anil, Warmuth, `LocoProp: Enhancing BackProp via Local Loss Optimization
      <https://arxiv.org/abs/2106.06199>`_, 2022, algorithm 1.
    """
    loss = losses.matching_loss() if loss is None else loss
    target = targets.normalized(0.05) if target is None else target
    solver = solvers.majorized_newton() if solver is None else solver
    penalty = regularizers.none() if regularizer is None else regularizer
    selection = LayerSelection(include, exclude)

    def init(params):
        local = selection.mask(params)
        check_params(local)

        def target_state(key_path, leaf):
            _, name = split_key_path(key_path)
            is_kernel = name == "kernel" and not is_masked(leaf)
            return target.init(leaf) if is_kernel else optax.MaskedNode()

        return ScaleByLocoPropState(
            count=jnp.zeros((), jnp.int32),
            target=tree_map_with_key_path(target_state, local),
            solver=solver.init(local),
        )

    def update(updates, state, params=None, *, intermediates=None, **extra_args):
        del extra_args
        if params is None:
            raise TypeError("scale_by_locoprop: update needs `params`.")
        layers = match_layers(intermediates, params, selection)
        local = selection.mask(params)
        now = penalty.at(state.count)

        def pose_layer(layer, layer_params, target_state):
            return pose(
                layer,
                layer_params,
                target_state,
                state.count,
                loss=loss,
                target=target,
                regularizer=now,
            )

        grouped = Grouped.of(
            layers,
            stack_dims={path: layer.stack_dims for path, layer in layers.items()},
            alone=[p for p, layer in layers.items() if not layer.linear_map.stacks],
        )
        target_states = layers_of(state.target, like=local)
        posed, new_target_states = grouped.map(
            pose_layer,
            grouped.like(visible(layers_of(local))),
            grouped.like({p: target_states[p]["kernel"] for p in layers}),
        ).unzip()
        problems = LocalProblems(posed, tree=local)
        step, solver_state = solver.solve(problems, state.solver, state.count)

        moved = visible(layers_of(step))
        directions = {
            path: {n: -moved[path][n].astype(p.dtype) for n, p in leaves.items()}
            for path, leaves in visible(layers_of(local)).items()
        }
        new_state = ScaleByLocoPropState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            target=with_layers(
                state.target,
                {p: {"kernel": s} for p, s in new_target_states.to_layers().items()},
            ),
            solver=solver_state,
        )
        return with_layers(updates, directions), new_state

    return optax.GradientTransformationExtraArgs(init, update)
