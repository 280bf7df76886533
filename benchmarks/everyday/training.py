"""Training on an everyday problem: one compiled step for all rates and lengths."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

import locoprop_optax as loco
from benchmarks.contestants import kernels
from benchmarks.everyday.problem import Arrays, Problem
from benchmarks.problem import batches


def cosine(peak: Any, done: Any) -> Any:
    """A cosine decay from the peak to zero."""
    return peak * 0.5 * (1 + jnp.cos(jnp.pi * done))


class Contestant(NamedTuple):
    """An optimizer as users reach for it.

    Attributes:
      label: what tables and pictures call it.
      make: from a learning rate, a schedule, to the optimizer; if it captures, from
        the layers and that.
      rates: the peaks of the schedule that are tried; none if there is nothing to set.
      captures: whether it takes intermediates.
      schedule: from a peak and the share of the training that is done, both traced, to
        the learning rate.
    """

    label: str
    make: Callable[..., optax.GradientTransformation]
    rates: tuple[float, ...] = ()
    captures: bool = False
    schedule: Callable[[Any, Any], Any] = cosine


def _muon(schedule: Any) -> optax.GradientTransformation:
    return contrib.muon(
        schedule,
        adam_learning_rate=lambda count: 0.1 * schedule(count),
        muon_weight_dimension_numbers=kernels,
    )


CONTESTANTS = {
    "locoprop": Contestant(
        "locoprop", lambda layers, _: loco.locoprop(layers), captures=True
    ),
    "adamw": Contestant("AdamW", optax.adamw, (3e-4, 1e-3, 3e-3, 1e-2)),
    "muon": Contestant("Muon, Adam for the rest", _muon, (0.003, 0.01, 0.03, 0.1)),
    "momentum": Contestant(
        "SGD with momentum",
        lambda schedule: optax.sgd(schedule, momentum=0.9),
        (1e-3, 1e-2, 1e-1, 1.0),
    ),
}


class Run(NamedTuple):
    """What one training came to.

    Attributes:
      train: the loss of the training examples in the end.
      valid: that of the examples held out.
      start: that of the training examples before the first step.
      highest: the highest loss of a batch.
      finite: whether all weights are finite in the end.
      skipped: how many steps were not taken, if the optimizer counts them.
      seconds: what the steps took.
    """

    train: float
    valid: float
    start: float
    highest: float
    finite: bool
    skipped: int | None
    seconds: float


class Trainer:
    """A contestant on a problem, its step compiled once."""

    def __init__(self, problem: Problem, contestant: Contestant):
        self._problem, self._contestant = problem, contestant
        self._evaluate = jax.jit(problem.evaluate)
        self._start = jax.jit(self._init)
        self._data = [tuple(map(jnp.asarray, part)) for part in problem.data]
        rows = np.arange(problem.batch_size)
        self._layers = self._find(rows) if contestant.captures else None
        shapes = jax.eval_shape(self._start, jax.random.key(0))
        began = time.perf_counter()
        self._step = (
            jax.jit(self._advance, donate_argnums=0)
            .lower(shapes, self._data[0], rows, 0.0, 0.0)
            .compile()
        )
        self.compile_seconds = time.perf_counter() - began

    def _find(self, rows: Any) -> loco.Layers:
        params, others = jax.jit(self._problem.init)(jax.random.key(0))
        batch = tuple(part[rows] for part in self._data[0])
        return self._problem.layers(params, others, batch)

    def _optimizer(self, rate: Any, steps: Any) -> optax.GradientTransformation:
        def schedule(count):
            return self._contestant.schedule(rate, jnp.minimum(count / steps, 1))

        layers = () if self._layers is None else (self._layers,)
        return self._contestant.make(*layers, schedule)

    def _init(self, key: jax.Array) -> Any:
        params, others = self._problem.init(key)
        return params, others, self._optimizer(0.0, 1.0).init(params)

    def _advance(
        self, carry: Any, examples: Arrays, rows: Any, rate: Any, steps: Any
    ) -> tuple[Any, jax.Array]:
        params, others, state = carry
        batch = tuple(part[rows] for part in examples)
        tx = self._optimizer(rate, steps)
        problem, extra = self._problem, {}
        if self._layers is not None:
            loss, grads, extra["intermediates"], others = problem.capture(
                self._layers, params, others, batch
            )
        else:
            differentiate = jax.value_and_grad(problem.loss, has_aux=True)
            (loss, others), grads = differentiate(params, others, batch)
        updates, state = tx.update(grads, state, params, **extra)
        return (optax.apply_updates(params, updates), others, state), loss

    def run(self, seed: int, steps: int, rate: float = 0.0) -> Run:
        """Trains from the start; the seed draws weights and batches."""
        examples = self._data[0]
        count, size = len(examples[0]), self._problem.batch_size
        order = batches(count, steps=steps, batch_size=size, seed=seed)
        carry = jax.block_until_ready(self._start(jax.random.key(seed)))
        start = self._loss(carry, 0)
        losses, began = [], time.perf_counter()
        for rows in order:
            carry, loss = self._step(carry, examples, rows, rate, float(steps))
            losses.append(loss)
        jax.block_until_ready(carry)
        seconds = time.perf_counter() - began
        found = optax.tree.get_all_with_path(carry[2], "skipped_steps")
        leaves = jax.tree.leaves(carry[0])
        return Run(
            train=self._loss(carry, 0),
            valid=self._loss(carry, 1),
            start=start,
            highest=float(np.max(np.array(jax.device_get(losses)))),
            finite=all(bool(jnp.isfinite(leaf).all()) for leaf in leaves),
            skipped=int(found[0][1]) if found else None,
            seconds=seconds,
        )

    def _loss(self, carry: Any, part: int) -> float:
        return float(self._evaluate(*carry[:2], self._data[part]))
