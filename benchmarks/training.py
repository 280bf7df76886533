"""Training the autoencoder with one contestant: in this process, or in a peer's."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

import locoprop_optax as loco
from benchmarks import datasets, peer
from benchmarks.contestants import CONTESTANTS
from benchmarks.network import Autoencoder, cross_entropy, reconstruction_loss


class Task(NamedTuple):
    """What all contestants have alike.

    Attributes:
      model: the network.
      params: where all start.
      images: for training and for testing.
      order: the rows of the training images in each batch, one row a step.
    """

    model: Autoencoder
    params: Any
    images: datasets.Images
    order: np.ndarray


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
        """`train_loss` and `test_loss`, the means over all images."""
        ...

    def described(self) -> dict[str, Any]:
        """What else is to be reported: memory, compilation, versions."""
        ...


def make_task(
    model: Autoencoder,
    images: datasets.Images,
    *,
    steps: int,
    batch_size: int,
    seed: int,
) -> Task:
    """Draws the first weights and all batches, epoch after epoch.

    Raises:
      ValueError: if there are fewer images than one batch holds.
    """
    batches = len(images.train) // batch_size
    if batches < 1:
        raise ValueError(f"{len(images.train)} images make no batch of {batch_size}.")
    params = model.init(jax.random.key(seed), images.train[:1])["params"]
    rng = np.random.default_rng(seed)
    epochs = [
        rng.permutation(len(images.train))[: batches * batch_size].reshape(batches, -1)
        for _ in range(math.ceil(steps / batches))
    ]
    return Task(model, params, images, np.concatenate(epochs)[:steps])


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
    if contestant.peer is None:
        yield _Local(name, task, settings)
        return
    interpreter = (interpreters or {}).get(contestant.peer)
    if interpreter is None:
        raise ValueError(
            f"{contestant.label} runs in an environment of its own: give "
            f"`--peer {contestant.peer}=PYTHON`, its interpreter."
        )
    made = contestant.make(len(task.order), **settings)
    with peer.start(
        interpreter,
        contestant.peer,
        task.params,
        task.images.train,
        task.order,
        test=task.images.test,
        transfer=task.model.transfer,
        settings=made,
    ) as running:
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

    def __init__(self, name: str, task: Task, settings: Mapping[str, Any]):
        contestant = CONTESTANTS[name]
        made = contestant.make(len(task.order), **settings)
        self._tx = optax.with_extra_args_support(made)
        self._contestant, self._task, self._done = contestant, task, 0
        self._images = jnp.asarray(task.images.train)
        start = (task.params, self._tx.init(task.params), jax.random.key(0))
        self._carry = jax.tree.map(jnp.copy, start)
        began = time.perf_counter()
        lowered = jax.jit(self._step, donate_argnums=0).lower(
            self._carry, self._images[task.order[0]]
        )
        self._compiled = lowered.compile()
        self._compile_seconds = time.perf_counter() - began
        self._loss = jax.jit(
            lambda p, images: reconstruction_loss(task.model, p, images)
        )

    def _step(self, carry: Any, images: jax.Array) -> tuple[Any, jax.Array]:
        params, state, key = carry
        key, now = jax.random.split(key)
        needs, model = self._contestant.needs, self._task.model
        part = images[: round(self._contestant.curvature_share * len(images))]

        def loss_fn(params):
            return reconstruction_loss(model, params, images)

        def sampled_loss_fn(params):
            logits = model.apply({"params": params}, part)
            sampled = jax.random.bernoulli(now, jax.nn.sigmoid(logits))
            return cross_entropy(logits, sampled.astype(logits.dtype))

        extra: dict[str, Any] = {}
        if "intermediates" in needs:
            loss, grads, intermediates = loco.linen.value_and_grad(loss_fn)(params)
            extra["intermediates"] = intermediates
        else:
            loss, grads = jax.value_and_grad(loss_fn)(params)
        if "sampled" in needs:
            _, _, sampled = loco.linen.value_and_grad(sampled_loss_fn)(params)
            both = loco.add_sampled_cotangents(extra["intermediates"], sampled)
            extra["intermediates"] = both
        if "functions" in needs:
            functions = loco.linen.model_and_loss(
                model.apply, lambda out: cross_entropy(out, part), part
            )
            extra |= {"model_fn": functions.model_fn, "loss_fn": functions.loss_fn}
        if "value" in needs:
            extra |= {"value": loss, "grad": grads, "value_fn": loss_fn}
        updates, state = self._tx.update(grads, state, params, **extra)
        return (optax.apply_updates(params, updates), state, key), loss

    def train(self, steps: int) -> Trained:
        """Takes the next steps."""
        trained = Trained([], [])
        for rows in self._task.order[self._done : self._done + steps]:
            batch = jax.block_until_ready(self._images[rows])
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
            "train_loss": self._mean_loss(self._task.images.train),
            "test_loss": self._mean_loss(self._task.images.test),
        }

    def _mean_loss(self, images: np.ndarray) -> float:
        size = len(self._task.order[0])
        parts = [images[i : i + size] for i in range(0, len(images), size)]
        losses = [float(self._loss(self._carry[0], part)) for part in parts]
        return float(np.average(losses, weights=[len(part) for part in parts]))

    def described(self) -> dict[str, Any]:
        """The state and the memory in multiples of the parameters, compilation."""
        params, state = map(_bytes, self._carry[:2])
        memory = self._compiled.memory_analysis()
        held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        return {
            "state_size": state / params,
            "peak_size": held / params,
            "compile_seconds": round(self._compile_seconds, 2),
        }


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
