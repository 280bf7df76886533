"""What flows from a captured forward and backward pass to an optimizer's update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import jax
from jaxtyping import Array, Float

from locoprop_optax._quadratic.linearization import Linearization
from locoprop_optax._records.linear_maps import DENSE, LayerParams, LinearMap
from locoprop_optax.losses._transfers import IDENTITY, Transfer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerIntermediates:
    r"""One layer's part in a forward and backward pass.

    With loss :math:`L` and pre-activation :math:`a = xW + b`; n counts examples times
    positions, and a mean over the batch stays inside the cotangents.

    Attributes:
      inputs: the layer's input :math:`x`.
      preactivations: :math:`a`, at the parameters where the pass was made.
      cotangents: :math:`g = \partial L / \partial a`.
      gradient: :math:`x^\top g` of each of the layer's parameters by name, the
        gradient through the layer, so that the first local step costs nothing.
      elsewhere: the gradient through all else that the model does with the layer's
        parameters, by name. None (the default) if there is nothing.
      targets: the local targets, in the space that the local loss compares; None
        (the default) leaves them to the optimizer's `target`.
      sampled_cotangents: random cotangents of the same layer, of which the sum of
        :math:`g g^\top` over the rows has the Gauss-Newton matrix as its expectation,
        that of the loss in the layer's output, summed over the rows. Default: None.
      penalty: the gradient of what the loss has in the layer's parameters apart from
        the model, by name; the sum of the three is
        :math:`\partial L / \partial \theta`. None (the default) if there is nothing.
      transfer: the function applied to the pre-activation. Default: identity.
      linear_map: how the pre-activation depends on the parameters. Default: a
        product with the kernel plus a bias.
      stack_dims: how many leading axes of all arrays count layers of a stack that
        are solved each on its own. Default: 0.
    """

    inputs: Float[Array, "*n d_in"]
    preactivations: Float[Array, "*n d_out"]
    cotangents: Float[Array, "*n d_out"]
    gradient: Mapping[str, Array]
    targets: Float[Array, "*n d_out"] | None = None
    sampled_cotangents: Float[Array, "*m d_out"] | None = None
    elsewhere: Mapping[str, Array] | None = None
    penalty: Mapping[str, Array] | None = None
    transfer: Transfer = field(default=IDENTITY, metadata={"static": True})
    linear_map: LinearMap = field(default=DENSE, metadata={"static": True})
    stack_dims: int = field(default=0, metadata={"static": True})

    def pull_back(self, params: LayerParams) -> LayerParams:
        """The gradient through the layer, from its records; `params` gives shapes."""

        def one(params, inputs, cotangents):
            preactivations, pull = jax.vjp(lambda p: self.linear_map(p, inputs), params)
            return pull(cotangents.astype(preactivations.dtype))[0]

        for _ in range(self.stack_dims):
            one = jax.vmap(one)
        return one(dict(params), self.inputs, self.cotangents)

    def whole_gradient(self) -> LayerParams:
        """The gradient of the loss in the layer's parameters."""
        whole = dict(self.gradient)
        for part in (self.elsewhere, self.penalty):
            if part is not None:
                whole = {name: g + part[name] for name, g in whole.items()}
        return whole


class GaussNewton(Protocol):
    """The Gauss-Newton model of a loss; what it costs is paid when it is asked."""

    @property
    def value(self) -> Any:
        """The loss."""
        ...

    @property
    def gradient(self) -> Any:
        """The gradient of the loss, in the order of the parameters' leaves."""
        ...

    def gradient_of(self, params: Any) -> Any:
        """The gradient in the form of the parameters, of which some may be masked."""
        ...

    def linearize(self, params: Any) -> Linearization:
        """The loss near the parameters, of which some may be masked."""
        ...

    def sampled_cotangents(self) -> Sequence[Mapping[str, Array]]:
        """Cotangents of all layers for sampled labels, for each batch it is made of.

        None where the loss has no curvature in anything that a layer gives.
        """
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Intermediates:
    """All layers' parts in a forward and backward pass.

    Attributes:
      layers: the layers by the path of their weight, the keys of the parameter tree
        joined by "/".
      gauss_newton: the Gauss-Newton model of the loss. Default: None, if the
        intermediates are made by hand.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn
      >>> import locoprop_optax as loco
      >>> model, x = nn.Dense(2), jnp.ones((5, 3))
      >>> loss_fn = lambda params, x: jnp.mean(model.apply(params, x) ** 2)
      >>> params = model.init(jax.random.key(0), x)
      >>> layers = loco.layers(loss_fn)(params, x)
      >>> loss, grads, intermediates = loco.value_and_grad(loss_fn, layers)(params, x)
      >>> intermediates.layers["params/kernel"].cotangents.shape
      (5, 2)
    """

    layers: Mapping[str, LayerIntermediates]
    gauss_newton: GaussNewton | None = None

    def sampled(self) -> Intermediates:
        """The same with sampled cotangents in each layer, as far as there are any."""
        known = any(la.sampled_cotangents is not None for la in self.layers.values())
        if known or self.gauss_newton is None:
            return self
        parts = self.gauss_newton.sampled_cotangents()
        if not parts:
            return self
        return _with_sampled(
            self,
            {
                path: _joined_outputs(layer, [p[path] for p in parts])
                / len(parts) ** 0.5
                for path, layer in self.layers.items()
            },
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MeanGaussNewton:
    """The model of the mean of some losses."""

    parts: list[Any]
    gradient: Any

    @property
    def value(self) -> Any:
        """The mean of the losses."""
        return sum(part.value for part in self.parts) / len(self.parts)

    def gradient_of(self, params: Any) -> Any:
        """The gradient in the form of the parameters."""
        return replace(self.parts[0], gradient=self.gradient).gradient_of(params)

    def linearize(self, params: Any) -> Linearization:
        """The mean of the losses near the parameters."""
        return Linearization.mean([part.linearize(params) for part in self.parts])

    def sampled_cotangents(self) -> Sequence[Mapping[str, Array]]:
        """Those of all parts."""
        return [found for part in self.parts for found in part.sampled_cotangents()]


def join_intermediates(*parts: Intermediates) -> Intermediates:
    r"""Joins the intermediates of micro-batches into those of one large batch.

    For a loss that is a mean over examples and micro-batches of equal size, so that
    gradients are averaged, this is gradient accumulation done right: with :math:`m`
    parts, cotangents are divided by :math:`m`, gradients are averaged, and the
    examples of all parts stand one after another. All parts belong to the same
    parameters. (`optax.MultiSteps` keeps only the last part's intermediates.)

    Args:
      *parts: the intermediates of each micro-batch, examples on their first axis.

    Returns:
      The intermediates of the large batch.

    Raises:
      ValueError: if there is no part, the parts' layers differ, or their sizes do.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn
      >>> import locoprop_optax as loco
      >>> model, x = nn.Dense(2), jnp.eye(4)
      >>> loss_fn = lambda params, x: jnp.mean((model.apply(params, x) - 1) ** 2)
      >>> params = model.init(jax.random.key(0), x)
      >>> layers = loco.layers(loss_fn)(params, x)
      >>> capture = loco.value_and_grad(loss_fn, layers)
      >>> parts = [capture(params, part)[2] for part in (x[:2], x[2:])]
      >>> loco.join_intermediates(*parts).layers["params/kernel"].inputs.shape
      (4, 4)
    """
    if not parts:
        raise ValueError("join_intermediates needs at least one part.")
    _check_same_layers(*parts)
    for path in parts[0].layers:
        shapes = {part.layers[path].preactivations.shape for part in parts}
        if len(shapes) > 1:
            raise ValueError(
                f"Layer {path!r}: the parts have pre-activations of the shapes "
                f"{', '.join(map(str, sorted(shapes)))}, expected equal ones: the mean "
                "of the gradients of parts of unequal size is not that of the batch."
            )
    models = [p.gauss_newton for p in parts if p.gauss_newton is not None]
    joined = None
    if len(models) == len(parts):
        gradients = zip(*(model.gradient for model in models), strict=True)
        joined = MeanGaussNewton(models, [sum(g) / len(g) for g in gradients])
    return Intermediates(
        {path: _join([p.layers[path] for p in parts]) for path in parts[0].layers},
        joined,
    )


def add_sampled_cotangents(
    intermediates: Intermediates, sampled: Intermediates
) -> Intermediates:
    r"""Adds cotangents for labels that are sampled from the model's own output.

    Their second moment is the Fisher matrix of the layer's output, which for a
    likelihood in its natural parameters is the Gauss-Newton matrix,

    .. math::
      n \operatorname{E}_{y \sim p(\cdot | x)} \Big[ \sum_i g_i\, g_i^\top \Big],

    for a loss that is a mean over :math:`n` examples, where that of the cotangents for
    the true labels is only the empirical one. `targets.natural_gradient` uses them.
    Under `jit` the forward pass of both captures is computed once.

    Args:
      intermediates: from the loss.
      sampled: from the loss with sampled labels, at the same parameters. It may hold
        other examples, or several labels for each. Each row of a layer counts as an
        example, those of a convolution's positions together.

    Returns:
      The first with the second's cotangents, times :math:`\sqrt n`, beside its own.

    Raises:
      ValueError: if the layers differ.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn
      >>> import locoprop_optax as loco
      >>> model, x, y = nn.Dense(2), jnp.eye(4, 3), jnp.ones((4, 2))
      >>> loss_fn = lambda params, x, y: 0.5 * jnp.mean(
      ...     jnp.sum((model.apply(params, x) - y) ** 2, axis=-1))
      >>> params = model.init(jax.random.key(0), x)
      >>> layers = loco.layers(loss_fn)(params, x, y)
      >>> capture = loco.value_and_grad(loss_fn, layers)
      >>> _, _, intermediates = capture(params, x, y)
      >>> labels = model.apply(params, x) + jax.random.normal(jax.random.key(1), (4, 2))
      >>> _, _, sampled = capture(params, x, labels)
      >>> both = loco.add_sampled_cotangents(intermediates, sampled)
      >>> both.layers["params/kernel"].sampled_cotangents.shape
      (4, 2)

    References:
      Martens, Grosse, `Optimizing Neural Networks with Kronecker-factored Approximate
      Curvature <https://arxiv.org/abs/1503.05671>`_, 2015, section 2.
    """
    _check_same_layers(intermediates, sampled)
    cotangents = {
        path: layer.linear_map.examples(layer.cotangents) ** 0.5 * layer.cotangents
        for path, layer in sampled.layers.items()
    }
    return _with_sampled(intermediates, cotangents)


def add_curvature(intermediates: Intermediates, part: Intermediates) -> Intermediates:
    """Takes the curvature from a part of the batch.

    A quarter of the batch is often enough for the sampled cotangents and the
    Gauss-Newton model, at a quarter of their cost. The gradients stay those of the
    whole batch; whether a step makes the loss rise is seen on the part.

    Args:
      intermediates: from the whole batch.
      part: from a part of it, at the same parameters.

    Returns:
      The first with the second's Gauss-Newton model, which also samples cotangents.

    Raises:
      ValueError: if the layers differ, or either has no Gauss-Newton model.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn
      >>> import locoprop_optax as loco
      >>> model, x = nn.Dense(2), jnp.ones((8, 3))
      >>> loss_fn = lambda params, x: jnp.mean((model.apply(params, x) - 1) ** 2)
      >>> params = model.init(jax.random.key(0), x)
      >>> capture = loco.value_and_grad(loss_fn, loco.layers(loss_fn)(params, x))
      >>> loss, grads, whole = capture(params, x)
      >>> _, _, part = capture(params, x[:2])
      >>> intermediates = loco.add_curvature(whole, part)
    """
    _check_same_layers(intermediates, part)
    whole: Any = intermediates.gauss_newton
    of_part: Any = part.gauss_newton
    if whole is None or of_part is None:
        raise ValueError(
            "There is no Gauss-Newton model. Take both from "
            "locoprop_optax.value_and_grad(loss_fn, layers)."
        )
    model = replace(of_part, gradient=whole.gradient)
    return replace(intermediates, gauss_newton=model)


def _with_sampled(
    intermediates: Intermediates, cotangents: Mapping[str, Array | None]
) -> Intermediates:
    layers = {
        path: replace(layer, sampled_cotangents=cotangents[path])
        for path, layer in intermediates.layers.items()
    }
    return replace(intermediates, layers=layers)


def _check_same_layers(*parts: Intermediates) -> None:
    paths = [set(part.layers) for part in parts]
    if any(other != paths[0] for other in paths):
        differing = set.union(*paths) - set.intersection(*paths)
        raise ValueError(
            "The parts hold different layers; not in all of them: "
            f"{', '.join(map(repr, sorted(differing)))}."
        )


def _join(layers: list[LayerIntermediates]) -> LayerIntermediates:
    first = layers[0]
    for field_name in ("targets", "sampled_cotangents", "elsewhere", "penalty"):
        missing = [getattr(layer, field_name) is None for layer in layers]
        if any(missing) and not all(missing):
            raise ValueError(f"Some of the parts hold {field_name}, others do not.")

    x = first.linear_map.join_inputs([la.inputs for la in layers], first.stack_dims)
    outputs = {
        name: _joined_outputs(first, [getattr(la, name) for la in layers])
        for name in ("preactivations", "cotangents", "targets", "sampled_cotangents")
        if getattr(first, name) is not None
    }
    outputs["cotangents"] = outputs["cotangents"] / len(layers)
    if "sampled_cotangents" in outputs:
        outputs["sampled_cotangents"] = (
            outputs["sampled_cotangents"] / len(layers) ** 0.5
        )

    def mean(*arrays):
        return sum(arrays) / len(arrays)

    return replace(
        first,
        inputs=x,
        gradient=jax.tree.map(mean, *(la.gradient for la in layers)),
        elsewhere=jax.tree.map(mean, *(la.elsewhere for la in layers)),
        penalty=jax.tree.map(mean, *(la.penalty for la in layers)),
        **outputs,
    )


def _joined_outputs(layer: LayerIntermediates, parts: list[Any]) -> Array:
    return layer.linear_map.join_outputs(parts, layer.stack_dims)
