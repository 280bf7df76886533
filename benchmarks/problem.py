"""What is to be learned, and in which order."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np


class Examples(NamedTuple):
    """Inputs and targets, one example a row."""

    inputs: np.ndarray
    targets: np.ndarray


class Problem(NamedTuple):
    """What is to be learned.

    Attributes:
      model: from inputs to outputs.
      cost: from outputs and targets to the loss, a mean over examples.
      train: the training examples.
      test: examples that are held out.
      measured: on how many of the training examples, the first, their loss is measured.
    """

    model: nn.Module
    cost: Callable[[Any, Any], jax.Array]
    train: Examples
    test: Examples
    measured: int

    def loss(self, params: Any, examples: Examples) -> jax.Array:
        """The mean loss."""
        return self.cost(
            self.model.apply({"params": params}, examples.inputs), examples.targets
        )


class Task(NamedTuple):
    """What all contestants have alike.

    Attributes:
      problem: what is to be learned.
      params: where all start.
      order: the rows of the training examples in each batch, one row a step.
    """

    problem: Problem
    params: Any
    order: np.ndarray


def make_task(problem: Problem, *, steps: int, batch_size: int, seed: int) -> Task:
    """Draws the first weights and all batches, epoch after epoch.

    Raises:
      ValueError: if there are fewer examples than one batch holds.
    """
    inputs = problem.train.inputs
    order = batches(len(inputs), steps=steps, batch_size=batch_size, seed=seed)
    params = problem.model.init(jax.random.key(seed), inputs[:1])["params"]
    return Task(problem, params, order)


def batches(count: int, *, steps: int, batch_size: int, seed: int) -> np.ndarray:
    """The rows of each batch, drawn epoch after epoch, one row a step.

    Raises:
      ValueError: if there are fewer examples than one batch holds.
    """
    each = count // batch_size
    if each < 1:
        raise ValueError(f"{count} examples make no batch of {batch_size}.")
    rng = np.random.default_rng(seed)
    epochs = [
        rng.permutation(count)[: each * batch_size].reshape(each, -1)
        for _ in range(math.ceil(steps / each))
    ]
    return np.concatenate(epochs)[:steps]
