"""Training with one contestant: in this process, or in a peer's."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

import locoprop_optax as loco
from benchmarks import lender, peer
from benchmarks.contestants import CONTESTANTS
from benchmarks.problem import Examples, Task


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
    first = {key: range_.first for key, range_ in contestant.space.items()}
    settings = first | dict(settings or {})
    made = contestant.make(len(task.order), **settings)
    if contestant.peer is None:
        yield _Local(name, task, made)
        return
    interpreter = (interpreters or {}).get(contestant.peer)
    if interpreter is None:
        raise ValueError(
            f"{contestant.label} runs in an environment of its own: give "
            f"`--peer {contestant.peer}=PYTHON`, its interpreter."
        )
    if contestant.lent:
        with lender.lent(interpreter, contestant.peer, task.params, made) as lent:
            yield _Local(name, task, lent.optimizer, lent.about)
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


class _Local:
    """An optimizer in this process, its step compiled."""

    def __init__(
        self,
        name: str,
        task: Task,
        tx: optax.GradientTransformation,
        about: Callable[[], dict[str, Any]] = dict,
    ):
        self._tx, self._about = optax.with_extra_args_support(tx), about
        self._contestant, self._task, self._done = CONTESTANTS[name], task, 0
        self._train, self._test = (
            Examples(*map(jnp.asarray, examples))
            for examples in (task.problem.train, task.problem.test)
        )
        start = (task.params, self._tx.init(task.params))
        self._carry = jax.tree.map(jnp.copy, start)
        began = time.perf_counter()
        lowered = jax.jit(self._step, donate_argnums=0).lower(
            self._carry, _at(self._train, task.order[0])
        )
        self._compiled = lowered.compile()
        self._compile_seconds = time.perf_counter() - began
        self._loss = jax.jit(self._loss_of)

    def _loss_of(self, params: Any, examples: Examples) -> jax.Array:
        problem = self._task.problem
        outputs = problem.model.apply({"params": params}, examples.inputs)
        return problem.cost(outputs, examples.targets)

    def _step(self, carry: Any, batch: Examples) -> tuple[Any, jax.Array]:
        params, state = carry
        needs, problem = self._contestant.needs, self._task.problem
        extra: dict[str, Any] = {}
        if "intermediates" in needs:
            capture = loco.linen.value_and_grad(self._loss_of)
            loss, grads, extra["intermediates"] = capture(params, batch)
        else:
            loss, grads = jax.value_and_grad(self._loss_of)(params, batch)
        if "curvature" in needs:
            quarter = Examples(*(part[: -(-len(part) // 4)] for part in batch))
            capture = loco.linen.value_and_grad(self._loss_of, curvature=True)
            _, _, part = capture(params, quarter)
            extra["intermediates"] = loco.add_curvature(extra["intermediates"], part)
        if "functions" in needs:
            functions = loco.linen.model_and_loss(
                problem.model.apply,
                lambda outputs: problem.cost(outputs, batch.targets),
                batch.inputs,
            )
            extra |= {"model_fn": functions.model_fn, "loss_fn": functions.loss_fn}
        if "value" in needs:
            value_fn = partial(self._loss_of, examples=batch)
            extra |= {"value": loss, "grad": grads, "value_fn": value_fn}
        updates, state = self._tx.update(grads, state, params, **extra)
        return (optax.apply_updates(params, updates), state), loss

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
