r"""The local problem of a layer: what its solver makes small.

The unknown is the step :math:`\Delta = \theta - \theta_0`. A layer is linear in its
parameters, so the pre-activation at the step is :math:`a_0 + A(x) \Delta` and no old
parameter is read; small steps lose no digits to large weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from locoprop_optax._problems.gram import DiagonalGram, Gram, gram_of
from locoprop_optax._problems.grouping import Grouped
from locoprop_optax._records.intermediates import LayerIntermediates
from locoprop_optax._records.linear_maps import LayerParams, LinearMap, Product
from locoprop_optax._utils.dtypes import at_least_float32
from locoprop_optax._utils.errors import LayerError
from locoprop_optax._utils.reductions import inner
from locoprop_optax.losses import Loss, LossFactory, MatchingLoss
from locoprop_optax.losses._transfers import IDENTITY
from locoprop_optax.regularizers import Regularizer
from locoprop_optax.regularizers._regularizer import NoRegularizer
from locoprop_optax.targets import Displacement, Target

T = TypeVar("T")
SQUARED_LOSS = MatchingLoss(IDENTITY)


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
      residual: the gradient of the loss in the pre-activations at :math:`\Delta = 0`,
        if `initial_gradient` is known to be its pull-back and nothing else.
      linear: the gradient of what else the loss does with the parameters, scaled as the
        targets scale cotangents, a linear term; None if there is nothing.
      gram: the matrices :math:`x^\top x`, if the gradient is to be made of them instead
        of the examples. Only for the squared loss.
      weight: what the loss of the examples is multiplied by.
    """

    params: LayerParams
    inputs: Float[Array, "*n d_in"]
    preactivations: Float[Array, "*n d_out"]
    targets: Float[Array, "*n d_out"]
    initial_gradient: LayerParams
    regularizer: Regularizer
    loss: Loss = field(metadata={"static": True})
    linear_map: LinearMap = field(metadata={"static": True})
    residual: Float[Array, "*n d_out"] | None = None
    linear: LayerParams | None = None
    gram: Gram | None = None
    weight: float = field(default=1.0, metadata={"static": True})

    def value(self, step: LayerParams) -> Float[Array, ""]:
        """The local objective after a step."""
        return self.value_after(self.linear_map(step, self.inputs), step)

    def value_after(self, change: Array, step: LayerParams) -> Float[Array, ""]:
        """The local objective after a step that changes the pre-activations so."""
        loss = self.loss.value(self.preactivations + change, self.targets)
        linear = 0.0 if self.linear is None else inner(self.linear, step)
        return self.weight * loss + linear + self.regularizer.value(step, self.params)

    def gradient(self, step: LayerParams) -> LayerParams:
        """The gradient of the local objective after a step."""
        return self._regularized(self.loss_gradient(step), step)

    def loss_gradient(self, step: LayerParams) -> LayerParams:
        """The gradient of the loss alone after a step."""
        if self.gram is not None:
            change = self.gram @ self.linear_map.to_matrix(step)
            rise = self.linear_map.from_matrix(change, like=step)
            return {n: self.initial_gradient[n] + rise[n] for n in step}
        change, pull_back = jax.vjp(lambda s: self.linear_map(s, self.inputs), step)
        preactivations = self.preactivations + change
        residual = self.loss.gradient(preactivations, self.targets)
        (gradient,) = pull_back((self.weight * residual).astype(change.dtype))
        return _added(gradient, self.linear)

    def gradient_at_start(self) -> LayerParams:
        """The gradient of the local objective before the first step, at no cost."""
        return self._regularized(self.initial_gradient, self.no_step())

    def factors_at_start(self) -> tuple[Array, Array] | None:
        r"""The gradient before the first step as a product of two matrices.

        Solved by an inverse on either side, the gradient takes :math:`2 d o (d + o)`
        operations. Where rows are few, it takes fewer to solve the columns of
        :math:`x^\top` and the rows of the residual, which are then multiplied:
        :math:`2 n (d^2 + o^2 + d o)`.

        Returns:
          :math:`x^\top`, and the residual; None where that takes more operations.
        """
        n, d, o = self.sizes()
        few = n * (d * d + o * o + d * o) < d * o * (d + o)
        is_free = isinstance(self.regularizer, NoRegularizer)
        if self.residual is None or not (is_free and few):
            return None
        if not isinstance(self.linear_map, Product):
            return None
        design = self.linear_map.design(self.params, self.inputs)
        residual = self.residual.reshape(1, n, o)
        return jnp.swapaxes(design, 1, 2).astype(residual.dtype), residual

    def no_step(self) -> LayerParams:
        """The step of length zero."""
        return {name: jnp.zeros_like(p) for name, p in self.params.items()}

    def to_gram(self, stride: int = 1) -> Gram | DiagonalGram:
        """The Gram matrices of the layer's design, as every `stride`-th example has it.

        Where fewer rows than columns would remain, the stride is shorter. A diagonal
        one costs little and is of all examples.

        Raises:
          LayerError: if the first axis does not count examples, but a stride is given.
        """
        if self.gram is not None and stride == 1:
            return self.gram
        if stride == 1 or self.linear_map.is_diagonal:
            return gram_of(self.linear_map, self.params, self.inputs)
        self._check_counts_examples("stride takes entries")
        rows, columns, _ = self.sizes()
        inputs = self.inputs[:: min(stride, max(1, rows // columns))]
        seen = gram_of(self.linear_map, self.params, inputs)
        return seen._replace(rows=len(self.inputs) / len(inputs) * seen.rows)

    def sizes(self) -> tuple[int, int, int]:
        """Rows, inputs and outputs of the matrices that the layer is a product of."""
        matrix = jax.eval_shape(self.linear_map.to_matrix, self.params)
        _, d, o = matrix.shape
        rows = self.preactivations.shape[: -self.linear_map.outputs]
        return math.prod(rows), d, o

    def prefers_gram(self, num_gradients: int) -> bool:
        """Whether so many gradients take fewer operations by the Gram matrix.

        A gradient takes :math:`4 n d o` operations by the examples and :math:`2 d^2 o`
        by the Gram matrix, which itself takes :math:`2 n d^2`.
        """
        if self.loss != SQUARED_LOSS or not isinstance(self.linear_map, Product):
            return False
        n, d, o = self.sizes()
        gram = 2 * n * d * d
        return gram + num_gradients * 2 * d * d * o < num_gradients * 4 * n * d * o

    def of_examples(self, number: Array | int, count: int) -> LocalProblem:
        """The problem of the number-th slice of so many examples, in its place.

        One with a diagonal Gram matrix costs little and is left whole.

        Raises:
          LayerError: if there are fewer examples, or the first axis counts none.
        """
        if self.linear_map.is_diagonal:
            return self
        whole = (self.inputs, self.preactivations, self.targets)
        self._check_counts_examples("local_batch_size takes slices")
        total = self.inputs.shape[0]
        if count > total:
            raise LayerError(
                f"local_batch_size is {count}, expected at most the number of its "
                f"examples, {total}."
            )
        start = number % (total // count) * count
        x, a, t = (jax.lax.dynamic_slice_in_dim(w, start, count) for w in whole)
        return replace(
            self, inputs=x, preactivations=a, targets=t, weight=total / count
        )

    def _check_counts_examples(self, option: str) -> None:
        if self.inputs.ndim <= self.linear_map.summed:
            raise LayerError(
                f"{option} of the first axis of its inputs, which does not count "
                f"examples in a {self.linear_map} of inputs of shape "
                f"{self.inputs.shape}. Name the layer in `exclude=`."
            )

    def _regularized(self, gradient: LayerParams, step: LayerParams) -> LayerParams:
        held = self.regularizer.gradient(step, self.params)
        return {name: gradient[name] + held[name] for name in step}


def pose(
    layer: LayerIntermediates,
    params: LayerParams,
    target_state: Any,
    count: Array,
    *,
    loss: LossFactory,
    target: Target,
    regularizer: Regularizer,
    with_penalty: bool = False,
) -> LocalProblem:
    """Poses one layer's local problem.

    What else the model does with its parameters is a linear term; its penalty is left
    out unless it is asked for.
    """
    layer = replace(
        layer,
        preactivations=at_least_float32(layer.preactivations),
        cotangents=at_least_float32(layer.cotangents),
        gradient=at_least_float32(dict(layer.gradient)),
    )
    local_loss = loss(layer.transfer)
    displacement = target.displace(layer, local_loss, target_state, count)
    start = local_loss.output(layer.preactivations)
    if layer.targets is not None:
        displacement = Displacement(start - layer.targets)
    goal = start - displacement.outputs
    terms = [layer.elsewhere, layer.penalty if with_penalty else None]
    linear = None
    for term in (term for term in terms if term is not None):
        linear = _added(at_least_float32(dict(term)), linear)
    if linear is not None:
        other = replace(layer, gradient=linear)
        scaled = target.displace(other, local_loss, target_state, count)
        linear = linear if scaled.gradient is None else scaled.gradient
    params = at_least_float32(dict(params))
    known = displacement.gradient if local_loss.is_matching else None
    residual = displacement.outputs
    if known is None:
        residual = local_loss.gradient(layer.preactivations, goal)
        known = _pull_back(layer, params, residual)
    return LocalProblem(
        params=params,
        inputs=layer.inputs,
        preactivations=layer.preactivations,
        targets=goal,
        initial_gradient=_added({name: known[name] for name in params}, linear),
        regularizer=regularizer,
        loss=local_loss,
        linear_map=layer.linear_map,
        residual=residual if linear is None else None,
        linear=linear,
    )


def _added(gradient: LayerParams, other: LayerParams | None) -> LayerParams:
    if other is None:
        return gradient
    return {name: g + other[name] for name, g in gradient.items()}


def _pull_back(
    layer: LayerIntermediates, params: LayerParams, residual: Array
) -> LayerParams:
    zeros = {name: jnp.zeros_like(p) for name, p in params.items()}
    change, pull_back = jax.vjp(lambda s: layer.linear_map(s, layer.inputs), zeros)
    return pull_back(residual.astype(change.dtype))[0]


@dataclass(frozen=True)
class LocalProblems:
    """All layers' local problems, side by side.

    Steps and gradients are dictionaries of each layer's part, by path and then by name,
    so that any Optax transformation can work on them.

    Attributes:
      grouped: the problems, those of equal layers stacked.
    """

    grouped: Grouped[LocalProblem]

    def each(self, function: Callable[..., T], *parts: Mapping[str, Any]) -> Grouped[T]:
        """Applies a function of a problem and its layer's part of dictionaries."""
        return self.grouped.map(function, *map(self.grouped.like, parts))

    def map(
        self, function: Callable[..., T], *parts: Mapping[str, Any]
    ) -> dict[str, T]:
        """The same, to a new dictionary."""
        return self.each(function, *parts).to_layers()

    def with_gram(self, num_gradients: int) -> LocalProblems:
        """The same problems, by the Gram matrix where so many gradients prefer it."""

        def prepare(problem):
            if not problem.prefers_gram(num_gradients):
                return problem
            return replace(problem, gram=problem.to_gram())

        return LocalProblems(self.grouped.map(prepare))

    def params(self) -> dict[str, LayerParams]:
        """The parameters at the start."""
        return self.map(lambda problem: problem.params)

    def no_step(self) -> dict[str, LayerParams]:
        """The step of length zero."""
        return self.map(LocalProblem.no_step)

    def gradient_at_start(self) -> dict[str, LayerParams]:
        """The gradient before the first step."""
        return self.map(LocalProblem.gradient_at_start)
