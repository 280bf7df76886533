"""Training with one contestant: in this process, or in a peer's."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

import locoprop_optax as loco
from benchmarks import lender, peer
from benchmarks.contestants import CONTESTANTS, Contestant
from benchmarks.problem import Examples, Problem, Task


class Trained(NamedTuple):
    """What some steps took, and the losses before each."""

    seconds: list[float]
    losses: list[float]


class Trainer(Protocol):
    """A contestant on its way through a task."""

    def train(self, steps: int) -> Trained:
        """Takes the next steps."""
        ...

    def evaluate(self) -> dict[str, float]:
        """`train_loss` and `test_loss`, means over examples."""
        ...

    def described(self) -> dict[str, Any]:
        """What else is to be reported: memory, compilation, versions."""
        ...


@contextmanager
def start(
    name: str,
    task: Task,
    settings: Mapping[str, Any] | None = None,
    interpreters: Mapping[str, Path] | None = None,
) -> Iterator[Trainer]:
    """A contestant at its start; a peer ends with the block.

    Args:
      name: a key of `CONTESTANTS`.
      task: what to train on.
      settings: of the contestant; those not given are what its space tries first.
      interpreters: for each script of peers, the interpreter of its environment.

    Raises:
      ValueError: if a peer has no interpreter.
    """
    contestant = CONTESTANTS[name]
    if contestant.peer is None:
        yield _Local(Step.of(contestant, task, settings), task)
        return
    made = contestant.made(len(task.order), settings)
    interpreter = (interpreters or {}).get(contestant.peer)
    if interpreter is None:
        raise ValueError(
            f"{contestant.label} runs in an environment of its own: give "
            f"`--peer {contestant.peer}=PYTHON`, its interpreter."
        )
    if contestant.lent:
        with lender.lent(interpreter, contestant.peer, task.params, made) as lent:
            step = Step(contestant, task.problem, lent.optimizer)
            yield _Local(step, task, lent.about)
        return
    with peer.start(interpreter, contestant.peer, task, made) as running:
        yield _Remote(running)


class _Remote:
    """A peer, asked for each thing."""

    def __init__(self, running: peer.Peer):
        self._peer = running
        self._about: dict[str, Any] = {}

    def train(self, steps: int) -> Trained:
        """Takes the next steps."""
        return Trained(**self._peer.ask(steps=steps))

    def evaluate(self) -> dict[str, float]:
        """The mean losses."""
        answer = self._peer.ask(evaluate=True)
        self._about = answer.pop("about")
        return answer

    def described(self) -> dict[str, Any]:
        """What the peer last said of itself, and its versions."""
        return {**self._about, "peer_versions": self._peer.versions}


@dataclass(frozen=True, eq=False)
class Step:
    """A step of training, before it is compiled.

    Attributes:
      contestant: says what the optimizer needs.
      problem: what to learn.
      tx: the optimizer.
      layers: of the loss, if the optimizer takes intermediates.
    """

    contestant: Contestant
    problem: Problem
    tx: optax.GradientTransformation
    layers: loco.Layers | None = None

    @classmethod
    def of(
        cls, contestant: Contestant, task: Task, settings: Mapping[str, Any] | None
    ) -> "Step":
        """That of an optimizer of this process, made for the layers of the loss."""
        problem, layers = task.problem, None
        if "intermediates" in contestant.needs:
            batch = Examples(*(jnp.asarray(p[task.order[0]]) for p in problem.train))
            layers = loco.layers(problem.loss)(task.params, batch)
        tx = contestant.made(len(task.order), settings, layers)
        return cls(contestant, problem, tx, layers)

    def init(self, params: Any) -> tuple[Any, Any]:
        """The parameters and the optimizer's state."""
        return params, self.tx.init(params)

    def __call__(self, carry: Any, batch: Examples) -> tuple[Any, jax.Array]:
        """From parameters and state to the next, and the loss before."""
        params, state = carry
        needs, problem = self.contestant.needs, self.problem
        extra: dict[str, Any] = {}
        if self.layers is None:
            loss, grads = jax.value_and_grad(problem.loss)(params, batch)
        else:
            capture = loco.value_and_grad(problem.loss, self.layers)
            loss, grads, intermediates = capture(params, batch)
            if "a quarter" in needs:
                quarter = Examples(*(part[: -(-len(part) // 4)] for part in batch))
                _, _, part = capture(params, quarter)
                intermediates = loco.add_curvature(intermediates, part)
            extra["intermediates"] = intermediates
        if "functions" in needs:
            functions = loco.linen.model_and_loss(
                problem.model.apply,
                lambda outputs: problem.cost(outputs, batch.targets),
                batch.inputs,
            )
            extra |= {"model_fn": functions.model_fn, "loss_fn": functions.loss_fn}
        if "value" in needs:
            value_fn = partial(problem.loss, examples=batch)
            extra |= {"value": loss, "grad": grads, "value_fn": value_fn}
        tx = optax.with_extra_args_support(self.tx)
        updates, state = tx.update(grads, state, params, **extra)
        return (optax.apply_updates(params, updates), state), loss

    def compile(self, carry: Any, batch: Examples) -> Any:
        """Compiled for the devices of what is given, which may be shapes alone."""
        return jax.jit(self, donate_argnums=0).lower(carry, batch).compile()


class _Local:
    """An optimizer in this process, its step compiled."""

    def __init__(
        self,
        step: Step,
        task: Task,
        about: Callable[[], dict[str, Any]] = dict,
    ):
        self._about, self._task, self._done = about, task, 0
        self._train, self._test = (
            Examples(*map(jnp.asarray, examples))
            for examples in (task.problem.train, task.problem.test)
        )
        self._carry = jax.tree.map(jnp.copy, step.init(task.params))
        began = time.perf_counter()
        self._compiled = step.compile(self._carry, _at(self._train, task.order[0]))
        self._compile_seconds = time.perf_counter() - began
        self._loss = jax.jit(task.problem.loss)

    def train(self, steps: int) -> Trained:
        """Takes the next steps."""
        trained = Trained([], [])
        for rows in self._task.order[self._done : self._done + steps]:
            batch = jax.block_until_ready(_at(self._train, rows))
            began = time.perf_counter()
            self._carry, loss = jax.block_until_ready(
                self._compiled(self._carry, batch)
            )
            trained.seconds.append(time.perf_counter() - began)
            trained.losses.append(float(loss))
        self._done += steps
        return trained

    def evaluate(self) -> dict[str, float]:
        """The mean losses."""
        return {
            "train_loss": self._mean_loss(self._train, self._task.problem.measured),
            "test_loss": self._mean_loss(self._test, len(self._test.inputs)),
        }

    def _mean_loss(self, examples: Examples, count: int) -> float:
        """The mean loss of the first examples, in batches of the training's size."""
        size = len(self._task.order[0])
        batches = np.split(np.arange(count), range(size, count, size))
        losses = [self._loss(self._carry[0], _at(examples, rows)) for rows in batches]
        weights = [len(rows) for rows in batches]
        return float(np.average(jax.device_get(losses), weights=weights))

    def described(self) -> dict[str, Any]:
        """The state and the memory in multiples of the parameters, compilation."""
        params, state = map(_bytes, self._carry)
        memory = self._compiled.memory_analysis()
        held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        return {
            "state_size": state / params,
            "peak_size": held / params,
            "compile_seconds": round(self._compile_seconds, 2),
            **self._about(),
        }


@jax.jit
def _at(examples: Examples, rows: Any) -> Examples:
    """Some of the examples, in one call: on a GPU each operation's start takes time."""
    return Examples(*(part[rows] for part in examples))


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
