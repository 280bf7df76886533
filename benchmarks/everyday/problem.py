"""What an everyday problem is, in Linen or in NNX."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax import nnx

import locoprop_optax as loco

Arrays = tuple[np.ndarray, ...]
Cost = Callable[..., jax.Array]  # from outputs and the rest of a batch to the loss


class Data(NamedTuple):
    """Examples to learn from and examples held out, one a row of each array.

    The first array is what the model sees.
    """

    train: Arrays
    valid: Arrays


class Problem(NamedTuple):
    """A model, its loss and its data, with what training is to look like.

    Attributes:
      name: of the problem.
      data: the examples.
      batch_size: how many a step sees.
      steps: how many are taken.
      init: from a key to (parameters, other variables).
      loss: from (parameters, others, batch) to (loss, others), as in training.
      evaluate: from (parameters, others, examples) to the loss, as in use.
      layers: as `loss`, to the layers.
      capture: from (layers, parameters, others, batch) to (loss, gradients,
        intermediates, others).
      apart: whether no constant was chosen on it.
    """

    name: str
    data: Data
    batch_size: int
    steps: int
    init: Callable[[jax.Array], tuple[Any, Any]]
    loss: Callable[..., tuple[jax.Array, Any]]
    evaluate: Callable[..., jax.Array]
    layers: Callable[..., loco.Layers]
    capture: Callable[..., tuple[jax.Array, Any, loco.Intermediates, Any]]
    apart: bool = False


def in_linen(
    name: str,
    model: nn.Module,
    cost: Cost,
    data: Data,
    *,
    batch_size: int,
    steps: int,
    penalty: Callable[[Any], Any] = lambda params: 0.0,
    normalizes: bool = False,
    apart: bool = False,
) -> Problem:
    """A problem whose model is a Linen module.

    Args:
      name: as in `Problem`, as `batch_size`, `steps` and `apart`.
      model: called with a batch's first array.
      cost: called with the outputs and the batch's other arrays.
      data: the examples.
      batch_size: as there.
      steps: as there.
      penalty: what the parameters add to the loss in training.
      normalizes: whether the model has batch norms, and takes `train=`.
      apart: as there.
    """

    def options(train):
        return {"train": train} if normalizes else {}

    def init(key):
        variables = model.init(key, data.train[0][:2], **options(True))
        return variables["params"], {
            name: value for name, value in variables.items() if name != "params"
        }

    def loss(params, others, batch):
        outputs, changed = model.apply(
            {"params": params, **others}, batch[0], **options(True), mutable=[*others]
        )
        return cost(outputs, *batch[1:]) + penalty(params), changed

    def evaluate(params, others, batch):
        outputs = model.apply({"params": params, **others}, batch[0], **options(False))
        return cost(outputs, *batch[1:])

    def capture(layers, params, others, batch):
        differentiate = loco.value_and_grad(loss, layers, has_aux=True)
        (value, changed), grads, intermediates = differentiate(params, others, batch)
        return value, grads, intermediates, changed

    layers = loco.layers(loss, has_aux=True)
    functions = init, loss, evaluate, layers, capture
    return Problem(name, data, batch_size, steps, *functions, apart)


def in_nnx(
    name: str,
    make: Callable[[nnx.Rngs], nnx.Module],
    cost: Cost,
    data: Data,
    *,
    batch_size: int,
    steps: int,
) -> Problem:
    """A problem whose model is an NNX module.

    Args:
      name: as in `Problem`, as `batch_size` and `steps`.
      make: from random streams to the model, called with a batch's first array.
      cost: called with the outputs and the batch's other arrays.
      data: the examples.
      batch_size: as there.
      steps: as there.
    """
    graph = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param, ...)[0]

    def init(key):
        _, params, others = nnx.split(make(nnx.Rngs(key)), nnx.Param, ...)
        return params, others

    def cost_of(model, batch):
        return cost(model(batch[0]), *batch[1:])

    def evaluate(params, others, batch):
        return cost_of(nnx.merge(graph, params, others), batch)

    def loss(params, others, batch):
        return evaluate(params, others, batch), others

    def layers(params, others, batch):
        return loco.nnx.layers(cost_of)(nnx.merge(graph, params, others), batch)

    def capture(layers, params, others, batch):
        differentiate = loco.nnx.value_and_grad(cost_of, layers)
        return *differentiate(nnx.merge(graph, params, others), batch), others

    functions = init, loss, evaluate, layers, capture
    return Problem(name, data, batch_size, steps, *functions)
