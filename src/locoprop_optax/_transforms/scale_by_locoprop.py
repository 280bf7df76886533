"""The building block: local problems solved inside an Optax transformation."""

from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from locoprop_optax import losses, regularizers, solvers, targets
from locoprop_optax._problems.grouping import Grouped
from locoprop_optax._problems.problem import LocalProblems, pose
from locoprop_optax._records.fits import check_layers, check_params, match_layers
from locoprop_optax._records.intermediates import Intermediates
from locoprop_optax._records.layers import Layers
from locoprop_optax._transforms.diagnostics import (
    diagnose,
    mean_over_stacks,
    no_diagnostics,
)
from locoprop_optax._utils.counters import increased
from locoprop_optax._utils.every import every
from locoprop_optax._utils.hyperparams import check_count
from locoprop_optax._utils.reductions import all_finite, squares_are_finite
from locoprop_optax._utils.sharding import (
    check_axis,
    check_replicas,
    sharded_by_compiler,
)
from locoprop_optax.losses._transfers import IDENTITY


class ScaleByLocoPropState(NamedTuple):
    """State of `scale_by_locoprop`. No gradient that is not finite changes it.

    Attributes:
      count: the number of updates so far.
      target: the target's state of each layer, by path.
      solver: the solver's state.
      diagnostics: `LayerDiagnostics` of each layer, by path, or ().
    """

    count: Int[Array, ""]
    target: Any
    solver: Any
    diagnostics: Any

    stays_finite = True  # so that `keep_finite` need not restore it


def scale_by_locoprop(
    layers: Layers,
    *,
    loss: losses.LossFactory | None = None,
    target: targets.Target | None = None,
    regularizer: regularizers.Regularizer | None = None,
    solver: solvers.Solver | None = None,
    refresh_every: int = 1,
    stack_layers: bool | str | None = None,
    precision: str | None = None,
    diagnostics: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces each layer's gradient by the step that solves its problem.

    With a layer's parameters :math:`\theta_0`, it returns
    :math:`\theta_0 - \theta_\text{new}`, signed like a gradient, where

    .. math::
      \theta_\text{new} \approx \arg\min_\theta\
      \ell\big(a(\theta),\, t\big) + R(\theta - \theta_0) .

    Where the loss has a penalty on a layer's parameters, its gradient is a linear term
    of the problem for a solver with a learning rate, and is added to the step as it is
    for all others. The updates of all other parameters pass
    through. The local problems are made from `intermediates` alone, so what earlier
    transformations of a chain did to a layer's updates has no effect.

    Args:
      layers: what `layers(loss_fn)` found.
      loss: the local loss. Default: `losses.matching_loss()`.
      target: the local target. Default: `targets.normalized(0.05)`.
      regularizer: the local regularizer. Default: `regularizers.none()`.
      solver: how the problems are solved. Default: `solvers.majorized_newton()`.
      refresh_every: the number of steps from one refresh to the next. What target and
        solver know of the curvature (second moments, sampled cotangents, Gram matrices
        and their inverses) is made anew then, and costs nothing in between. At first it
        is each step, then at most an eighth of the steps so far. Solvers that take
        several steps in the curvature of the batch need 1. Default: 1.
      stack_layers: whether equal layers are solved together, stacked in one array: that
        is fewer kernels to launch, but copies what it stacks. Convolutions stay alone.
        The name of a mesh axis spreads stacked layers over it, where it divides their
        number, so that its devices solve different layers at the same time. Default:
        on all devices but a CPU, which is faster without.
      precision: of the matrix products in the solver, as
        `jax.default_matmul_precision` takes it: `"BF16_BF16_F32"`, `"TF32_TF32_F32"`
        and others of `jax.lax.DotAlgorithmPreset` round what enters a product, and sum
        in float32. Backprop, targets and inverses stay as they are. A CPU computes the
        first in float32 and refuses the second. Default: as all other products.
      diagnostics: whether the state holds each layer's `LayerDiagnostics` of the last
        step, to be read by `diagnostics_of`. They cost two passes forward through each
        layer. Default: no.

    Returns:
      A transformation whose `update` takes `params` and `intermediates`, the third
      result of `value_and_grad`.

    Raises:
      TypeError: if `layers`, `loss`, `target`, `regularizer` or `solver` is something
        else; from `update`, if `params` or `intermediates` is missing.
      ValueError: from `update`, if the intermediates do not fit the parameters; the
        message names the layer; if the mesh has no axis `stack_layers`; or inside a
        shard, if no `averaged` is around it.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, optax
      >>> import locoprop_optax as loco
      >>> model, x = nn.Dense(2), jnp.eye(3)
      >>> loss_fn = lambda params, x: jnp.mean((model.apply(params, x) - 1) ** 2)
      >>> params = model.init(jax.random.key(0), x)
      >>> layers = loco.layers(loss_fn)(params, x)
      >>> tx = optax.chain(loco.scale_by_locoprop(layers), optax.scale(-1.0))
      >>> state = tx.init(params)
      >>> loss, grads, intermediates = loco.value_and_grad(loss_fn, layers)(params, x)
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
    check_layers(layers)
    _check_parts(loss, target, penalty, solver)
    check_count("refresh_every", refresh_every)
    stacked = jax.default_backend() != "cpu" if stack_layers is None else stack_layers
    mesh_axis = stack_layers if isinstance(stack_layers, str) else None

    def at_precision():
        return jax.default_matmul_precision(precision) if precision else nullcontext()

    def init(params):
        check_params(params, layers)
        local = layers.split(params)
        found = {layer.path: layer for layer in layers}
        return ScaleByLocoPropState(
            count=jnp.zeros((), jnp.int32),
            target={
                path: target.init(found[path], part) for path, part in local.items()
            },
            solver=solver.init(local, found),
            diagnostics={p: no_diagnostics() for p in local} if diagnostics else (),
        )

    def group(records):
        return Grouped.of(
            records,
            stack_dims={path: r.stack_dims for path, r in records.items()},
            alone=[
                path
                for path, record in records.items()
                if not stacked or record.linear_map.is_convolution
            ],
            mesh_axis=mesh_axis,
        )

    def refreshed(make, before, count, sound):
        """What is made anew when it is due, if the gradients are sound and it, too."""

        def anew():
            made = make()
            finite = sound & all_finite(made)
            return jax.lax.cond(finite, lambda: made, lambda: before)

        return every(refresh_every, count, anew, lambda: before)

    def refresh_targets(records, state):
        """What the targets know of the curvature, made anew."""
        grouped = group(records)

        def refresh_layer(layer, target_state):
            local_loss = loss(layer.transfer)
            return target.refresh(layer, local_loss, target_state, state.count)

        return grouped.map(refresh_layer, grouped.like(state.target)).to_layers()

    def solve(records, local, state, sound):
        """The directions, and the state after them."""
        grouped = group(records)

        def pose_layer(layer, layer_params, target_state):
            return pose(
                layer,
                layer_params,
                target_state,
                state.count,
                loss=loss,
                target=target,
                regularizer=penalty.at(state.count),
                with_penalty=solver.scales_gradient,
            )

        posed = grouped.map(pose_layer, grouped.like(local), grouped.like(state.target))
        problems = LocalProblems(posed)
        with at_precision():
            known = refreshed(
                lambda: solver.refresh(problems, state.solver, state.count),
                state.solver,
                state.count,
                sound,
            )
            step, solver_state = solver.solve(problems, known, state.count)
        if solver_state is not known:
            finite = sound & all_finite(step)
            solver_state = optax.tree.where(finite, solver_state, known)

        def penalty_of(record, name):
            """The gradient of penalties, where the problems know nothing of them."""
            if solver.scales_gradient or record.penalty is None:
                return 0.0
            return record.penalty[name]

        directions = {
            path: {
                n: (penalty_of(records[path], n) - step[path][n]).astype(p.dtype)
                for n, p in part.items()
            }
            for path, part in local.items()
        }
        shown = state.diagnostics
        if diagnostics:
            seen = grouped.map(diagnose, posed, grouped.like(step)).to_layers()
            shown = {path: mean_over_stacks(s) for path, s in seen.items()}
            shown = optax.tree.where(sound, shown, state.diagnostics)
        return directions, ScaleByLocoPropState(
            count=increased(state.count, sound),
            target=state.target,
            solver=solver_state,
            diagnostics=shown,
        )

    def update(updates, state, params=None, *, intermediates=None, **extra_args):
        del extra_args
        if params is None:
            raise TypeError("scale_by_locoprop: update needs `params`.")
        check_replicas()
        if mesh_axis is not None:
            check_axis(mesh_axis)
        records = match_layers(intermediates, params, layers)
        local = layers.split(params)
        if not local:
            return updates, state

        def targets_anew():
            seen = records
            if target.samples and isinstance(intermediates, Intermediates):
                seen = match_layers(intermediates.sampled(), params, layers)
            return sharded_by_compiler(refresh_targets, like=state.target)(seen, state)

        sound = squares_are_finite([record.gradient for record in records.values()])
        if jax.tree.leaves(state.target):  # most targets remember nothing
            known = refreshed(targets_anew, state.target, state.count, sound)
            state = state._replace(target=known)
        directions, state = sharded_by_compiler(solve, like=(local, state))(
            records, local, state, sound
        )
        return layers.merge(updates, directions), state

    return optax.GradientTransformationExtraArgs(init, update)


def _check_parts(loss: Any, target: Any, regularizer: Any, solver: Any) -> None:
    """Raises a TypeError for a part that is something else."""
    try:
        is_loss = hasattr(loss(IDENTITY), "gradient")
    except (TypeError, AttributeError):
        is_loss = False
    is_regularizer = hasattr(regularizer, "gradient")
    for name, part, fits, example in (
        ("loss", loss, is_loss, "losses.matching_loss()"),
        ("target", target, isinstance(target, targets.Target), "targets.normalized(γ)"),
        ("regularizer", regularizer, is_regularizer, "regularizers.none()"),
        ("solver", solver, isinstance(solver, solvers.Solver), "solvers.exact()"),
    ):
        if not fits:
            raise TypeError(
                f"{name}= must be what a function such as locoprop_optax.{example} "
                f"returns, got {getattr(part, '__name__', repr(part))}."
            )
