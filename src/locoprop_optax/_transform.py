"""The building block: local problems solved inside an Optax transformation."""

from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from locoprop_optax import losses, regularizers, solvers, targets
from locoprop_optax._diagnostics import diagnose, mean_over_stacks, no_diagnostics
from locoprop_optax._grouping import Grouped
from locoprop_optax._intermediates import LayerIntermediates
from locoprop_optax._layers import (
    LayerSelection,
    PathPattern,
    anchor,
    layer_values,
    layers_of,
    per_layer,
    visible,
    with_layers,
)
from locoprop_optax._local_problem import LocalProblems, pose
from locoprop_optax._matching import check_params, match_layers
from locoprop_optax._sharding import check_axis, sharded_by_compiler
from locoprop_optax._transfers import IDENTITY


class ScaleByLocoPropState(NamedTuple):
    """State of `scale_by_locoprop`.

    Attributes:
      count: the number of updates so far.
      target: the target's state, at the place of each local kernel.
      solver: the solver's state.
      diagnostics: `LayerDiagnostics` at the place of each local kernel, or ().
    """

    count: Int[Array, ""]
    target: Any
    solver: Any
    diagnostics: Any


def scale_by_locoprop(
    *,
    loss: losses.LossFactory | None = None,
    target: targets.Target | None = None,
    regularizer: regularizers.Regularizer | None = None,
    solver: solvers.Solver | None = None,
    include: PathPattern | None = None,
    exclude: PathPattern | None = None,
    stack_layers: bool | str | None = None,
    precision: str | None = None,
    diagnostics: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces each local layer's gradient by the step that solves its problem.

    With a layer's parameters :math:`\theta_0`, it returns
    :math:`\theta_0 - \theta_\text{new}`, signed like a gradient, where

    .. math::
      \theta_\text{new} \approx \arg\min_\theta\
      \ell\big(a(\theta),\, t\big) + R(\theta - \theta_0) .

    Where the loss has a penalty on a layer's parameters, its gradient is added as it
    is: the problem knows nothing of it. Layers are local if they own a `kernel`. All
    other updates pass through. The
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
      result of `linen.value_and_grad`.

    Raises:
      TypeError: if `loss`, `target`, `regularizer` or `solver` is something else; from
        `update`, if `params` or `intermediates` is missing.
      ValueError: from `update`, if the intermediates do not fit the parameters; the
        message names the layer; or if the mesh has no axis `stack_layers`.

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
    _check_parts(loss, target, penalty, solver)
    selection = LayerSelection(include, exclude)
    stacked = jax.default_backend() != "cpu" if stack_layers is None else stack_layers
    mesh_axis = stack_layers if isinstance(stack_layers, str) else None

    def init(params):
        local = selection.mask(params)
        check_params(local)
        layers = visible(layers_of(local))
        states = {path: target.init(la[anchor(la)]) for path, la in layers.items()}
        nothing = {path: no_diagnostics() for path in layers}
        return ScaleByLocoPropState(
            count=jnp.zeros((), jnp.int32),
            target=per_layer(states, local),
            solver=solver.init(local),
            diagnostics=per_layer(nothing, local) if diagnostics else (),
        )

    def update(updates, state, params=None, *, intermediates=None, **extra_args):
        del extra_args
        if params is None:
            raise TypeError("scale_by_locoprop: update needs `params`.")
        if mesh_axis is not None:
            check_axis(mesh_axis)
        layers = match_layers(intermediates, params, selection)
        local = selection.mask(params)

        def solve(layers, local, state):
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
                alone=[
                    path
                    for path, layer in layers.items()
                    if not (stacked and layer.linear_map.is_product)
                ],
                mesh_axis=mesh_axis,
            )
            posed, new_target_states = grouped.map(
                pose_layer,
                grouped.like(visible(layers_of(local))),
                grouped.like(layer_values(state.target, local)),
            ).unzip()
            problems = LocalProblems(posed, tree=local)
            with (
                jax.default_matmul_precision(precision) if precision else nullcontext()
            ):
                step, solver_state = solver.solve(problems, state.solver, state.count)

            moved = visible(layers_of(step))
            directions = {
                path: {
                    n: (_penalty(layers[path], n) - moved[path][n]).astype(p.dtype)
                    for n, p in leaves.items()
                }
                for path, leaves in visible(layers_of(local)).items()
            }
            shown = state.diagnostics
            if diagnostics:
                seen = grouped.map(diagnose, posed, grouped.like(moved)).to_layers()
                shown = per_layer(
                    {p: mean_over_stacks(s) for p, s in seen.items()}, local
                )
            new_state = ScaleByLocoPropState(
                count=jnp.asarray(optax.safe_increment(state.count)),
                target=per_layer(new_target_states.to_layers(), local),
                solver=solver_state,
                diagnostics=shown,
            )
            return directions, new_state

        run = sharded_by_compiler(solve, like=(visible(layers_of(local)), state))
        directions, new_state = run(layers, local, state)
        return with_layers(updates, directions), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _penalty(layer: LayerIntermediates, name: str) -> Any:
    """The gradient of penalties, which are no part of the local problem."""
    return 0.0 if layer.penalty is None else layer.penalty[name]


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
