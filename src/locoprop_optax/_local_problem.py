r"""The local problem of a layer: what its solver makes small.

The unknown is the step :math:`\Delta = \theta - \theta_0`. A layer is linear in its
parameters, so the pre-activation at the step is :math:`a_0 + A(x) \Delta` and no old
parameter is read; small steps lose no digits to large weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from locoprop_optax._grouping import Grouped
from locoprop_optax._intermediates import LayerIntermediates
from locoprop_optax._layers import LayerParams, layers_of, visible, with_layers
from locoprop_optax._linear_maps import LinearMap
from locoprop_optax.losses import Loss, LossFactory
from locoprop_optax.regularizers import Regularizer
from locoprop_optax.targets import Displacement, Target


def at_least_float32(tree: Any) -> Any:
    """Casts arrays of fewer bits to float32."""
    return jax.tree.map(
        lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), tree
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LocalProblem:
    r"""Minimize :math:`\ell(a_0 + A(x)\Delta,\, t) + R(\Delta)` over the step.

    Attributes:
      params: :math:`\theta_0`, by name.
      inputs: :math:`x`.
      preactivations: :math:`a_0`.
      targets: :math:`t`.
      initial_gradient: the gradient of the loss at :math:`\Delta = 0`.
      regularizer: :math:`R`.
      loss: :math:`\ell`.
      linear_map: :math:`A`.
    """

    params: LayerParams
    inputs: Float[Array, "*n d_in"]
    preactivations: Float[Array, "*n d_out"]
    targets: Float[Array, "*n d_out"]
    initial_gradient: LayerParams
    regularizer: Regularizer
    loss: Loss = field(metadata={"static": True})
    linear_map: LinearMap = field(metadata={"static": True})

    def value(self, step: LayerParams) -> Float[Array, ""]:
        """The local objective after a step."""
        preactivations = self.preactivations + self.linear_map(step, self.inputs)
        loss = self.loss.value(preactivations, self.targets)
        return loss + self.regularizer.value(step, self.params)

    def gradient(self, step: LayerParams) -> LayerParams:
        """The gradient of the local objective after a step."""
        change, pull_back = jax.vjp(lambda s: self.linear_map(s, self.inputs), step)
        preactivations = self.preactivations + change
        residual = self.loss.gradient(preactivations, self.targets)
        (gradient,) = pull_back(residual.astype(change.dtype))
        return self._regularized(gradient, step)

    def gradient_at_start(self) -> LayerParams:
        """The gradient of the local objective before the first step, at no cost."""
        return self._regularized(self.initial_gradient, self.no_step())

    def no_step(self) -> LayerParams:
        """The step of length zero."""
        return {name: jnp.zeros_like(p) for name, p in self.params.items()}

    def _regularized(self, gradient: LayerParams, step: LayerParams) -> LayerParams:
        penalty = self.regularizer.gradient(step, self.params)
        return {name: gradient[name] + penalty[name] for name in step}


def pose(
    layer: LayerIntermediates,
    params: LayerParams,
    target_state: Any,
    count: Array,
    *,
    loss: LossFactory,
    target: Target,
    regularizer: Regularizer,
) -> tuple[LocalProblem, Any]:
    """Poses one layer's local problem, and moves its target's state on."""
    layer = replace(
        layer,
        preactivations=at_least_float32(layer.preactivations),
        cotangents=at_least_float32(layer.cotangents),
        gradient=at_least_float32(dict(layer.gradient)),
    )
    local_loss = loss(layer.transfer)
    displacement, target_state = target.update(layer, target_state, count)
    if layer.targets is not None:
        outputs = local_loss.output(layer.preactivations) - layer.targets
        displacement = Displacement(outputs)
    start = local_loss.output(layer.preactivations)
    problem = LocalProblem(
        params=at_least_float32(dict(params)),
        inputs=layer.inputs,
        preactivations=layer.preactivations,
        targets=start - displacement.outputs,
        initial_gradient=_initial_gradient(layer, params, displacement),
        regularizer=regularizer,
        loss=local_loss,
        linear_map=layer.linear_map,
    )
    return problem, target_state


def _initial_gradient(
    layer: LayerIntermediates, params: LayerParams, displacement: Displacement
) -> LayerParams:
    if displacement.gradient is not None:
        return {name: displacement.gradient[name] for name in params}
    zeros = at_least_float32({name: jnp.zeros_like(p) for name, p in params.items()})
    _, pull_back = jax.vjp(lambda step: layer.linear_map(step, layer.inputs), zeros)
    return pull_back(displacement.outputs)[0]


@dataclass(frozen=True)
class LocalProblems:
    """All layers' local problems, side by side.

    Steps and gradients are trees like the parameters, so that any Optax
    transformation can work on them.

    Attributes:
      grouped: the problems, those of equal layers stacked.
      tree: the parameter tree that steps and gradients take the form of.
    """

    grouped: Grouped[LocalProblem]
    tree: Any

    def map(self, function: Callable[..., Any], *trees: Any) -> Any:
        """Applies a function of a problem and its layer's part of each tree."""
        others = [self.grouped.like(visible(layers_of(tree))) for tree in trees]
        return with_layers(self.tree, self.grouped.map(function, *others).to_layers())

    def params(self) -> Any:
        """The parameters at the start."""
        return self.map(lambda problem: problem.params)

    def no_step(self) -> Any:
        """The step of length zero."""
        return self.map(LocalProblem.no_step)

    def gradient_at_start(self) -> Any:
        """The gradient before the first step."""
        return self.map(LocalProblem.gradient_at_start)

    def gradient(self, step: Any) -> Any:
        """The gradient after a step."""
        return self.map(LocalProblem.gradient, step)
