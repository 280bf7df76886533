"""CurveBall on minibatches, and LocoProp without a learning rate.

Three tasks on MNIST: a classifier 784-128-64-32-10 with tanh at batch 64, the same with
batch normalization, and the deep autoencoder at batch 1000. All optimizers start from
the same weights, see the same batches, and take turns, so that their times are measured
under the same conditions. The rates of SGD with momentum and of Adam, and the damping
of CurveBall, are the best of a few after a short run.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import locoprop_optax as loco
from benchmarks import datasets, report
from benchmarks.networks import Autoencoder
from benchmarks.provenance import provenance


class Classifier(nn.Module):
    """Dense layers with tanh, batch-normalized or not."""

    normalized: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """From pixels to logits, with the statistics of the batch."""
        for width in (128, 64, 32):
            x = nn.Dense(width)(x)
            if self.normalized:
                x = nn.BatchNorm(use_running_average=False)(x)
            x = nn.tanh(x)
        return nn.Dense(10)(x)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over a batch."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses)


def reconstruction(logits: jax.Array, images: jax.Array) -> jax.Array:
    """Summed over pixels, averaged over a batch."""
    losses = optax.sigmoid_binary_cross_entropy(logits, images)
    return jnp.mean(jnp.sum(losses, axis=-1))


class Task(NamedTuple):
    """What is learnt.

    Attributes:
      label: what tables call it.
      model: the model.
      loss: from (outputs, targets) to a scalar.
      train: inputs and targets to learn from.
      test: inputs and targets to be tested on.
      batch: the size of a batch.
      steps: how many steps to take.
    """

    label: str
    model: nn.Module
    loss: Callable[[jax.Array, jax.Array], jax.Array]
    train: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]
    batch: int
    steps: int


def tasks(data_dir: Path, steps: int, autoencoder_steps: int) -> list[Task]:
    """The three tasks."""
    images = datasets.load("mnist", data_dir)
    labels = datasets.read_labels(data_dir)
    train, test = (
        tuple(map(jnp.asarray, pair)) for pair in zip(images, labels, strict=True)
    )
    pictures = train[0][:20_000]
    return [
        Task("classifier", Classifier(), cross_entropy, train, test, 64, steps),
        Task(
            "classifier with BatchNorm",
            Classifier(normalized=True),
            cross_entropy,
            train,
            test,
            64,
            steps,
        ),
        Task(
            "deep autoencoder",
            Autoencoder(),
            reconstruction,
            (pictures, pictures),
            (test[0], test[0]),
            1000,
            autoencoder_steps,
        ),
    ]


def locoprop_and_model(num_steps: int, layers: loco.Layers, gamma: float) -> Any:
    """LocoProp's direction, its length and momentum from the quadratic model."""
    return optax.chain(
        loco.scale_by_locoprop(
            layers,
            target=loco.targets.normalized(gamma),
            solver=loco.solvers.majorized_newton(num_steps),
        ),
        loco.scale_by_quadratic_model(damping=1.0, damping_decay=0.95),
    )


OPTIMIZERS: dict[str, tuple[Callable[[float], Any], Sequence[float]]] = {
    "SGD with momentum 0.9": (
        lambda rate: optax.sgd(rate, momentum=0.9),
        (1e-4, 1e-3, 1e-2, 1e-1),
    ),
    "Adam": (optax.adam, (1e-4, 3e-4, 1e-3, 3e-3)),
    "CurveBall": (lambda damping: loco.curveball(damping=damping), (1.0, 10.0)),
}
RECIPES: dict[str, tuple[Callable[[loco.Layers, float], Any], Sequence[float]]] = {
    "LocoProp, 1 step, quadratic model": (partial(locoprop_and_model, 1), (0.5,)),
    "LocoProp, 2 steps, quadratic model": (partial(locoprop_and_model, 2), (0.5,)),
}


class Run:
    """One optimizer's training, its compiled step and its curve so far."""

    def __init__(self, task: Task, name: str, setting: float, seed: int):
        self.name, self.setting, self.task = name, setting, task
        first = task.train[0][: task.batch]
        variables = dict(task.model.init(jax.random.key(seed), first))
        params = variables.pop("params")
        batch = (first, task.train[1][: task.batch])
        if name in RECIPES:
            self.layers = loco.layers(self._loss)(params, variables, batch)
            tx = RECIPES[name][0](self.layers, setting)
        else:
            tx = optax.with_extra_args_support(OPTIMIZERS[name][0](setting))
        self.carry = (params, variables, tx.init(params))
        step = jax.jit(partial(self._step, tx), donate_argnums=0)
        self.step = step.lower(self.carry, batch).compile()
        self.curve: list[dict[str, float]] = []
        self.seconds: list[float] = []

    def _functions(self, collections: Any, batch: Any) -> Any:
        return loco.linen.model_and_loss(
            self.task.model.apply,
            lambda outputs: self.task.loss(outputs, batch[1]),
            batch[0],
            collections=collections,
            mutable=list(collections),
        )

    def _loss(self, params: Any, collections: Any, batch: Any) -> jax.Array:
        functions = self._functions(collections, batch)
        return functions.loss_fn(functions.model_fn(params))

    def _step(self, tx: Any, carry: Any, batch: Any) -> tuple[Any, jax.Array]:
        params, collections, state = carry
        functions = self._functions(collections, batch)
        extra: dict[str, Any] = {
            "model_fn": functions.model_fn,
            "loss_fn": functions.loss_fn,
        }
        if self.name in RECIPES:
            capture = loco.value_and_grad(self._loss, self.layers)
            found = capture(params, collections, batch)
            loss, grads, extra["intermediates"] = found
        elif self.name == "CurveBall":
            loss, grads = self._loss(params, collections, batch), None
        else:
            differentiate = jax.value_and_grad(self._loss)
            loss, grads = differentiate(params, collections, batch)
        collections = functions.mutated(params)
        updates, state = tx.update(grads, state, params, **extra)
        return (optax.apply_updates(params, updates), collections, state), loss

    def take(self, batch: Any) -> None:
        """Takes one step and measures its time."""
        began = time.perf_counter()
        self.carry, _ = jax.block_until_ready(self.step(self.carry, batch))
        self.seconds.append(time.perf_counter() - began)

    def record(self) -> None:
        """Adds the losses to the curve."""
        params, collections, _ = self.carry

        task = self.task
        point = {"steps": len(self.seconds), "seconds": float(np.sum(self.seconds))}
        for part in ("train", "test"):
            inputs, targets = (array[:3000] for array in getattr(task, part))
            loss = _evaluate(
                task.model, task.loss, params, collections, inputs, targets
            )
            point[f"{part}_loss"] = float(loss)
        self.curve.append(point)


@partial(jax.jit, static_argnums=(0, 1))
def _evaluate(model, loss, params, collections, inputs, targets):
    variables = {"params": params, **collections}
    outputs, _ = model.apply(variables, inputs, mutable=list(collections))
    return loss(outputs, targets)


def batches(task: Task, seed: int) -> Iterator[Any]:
    """Batches in a random order, epoch after epoch."""
    rng = np.random.default_rng(seed)
    inputs, targets = task.train
    while True:
        order = rng.permutation(len(inputs))
        for i in range(0, len(order) - task.batch + 1, task.batch):
            rows = order[i : i + task.batch]
            yield jax.block_until_ready((inputs[rows], targets[rows]))


def choose(task: Task, name: str, seed: int) -> float:
    """The setting with the lowest training loss after a quarter of the steps."""
    settings = {**OPTIMIZERS, **RECIPES}[name][1]
    if len(settings) == 1:
        return settings[0]
    losses = {}
    for setting in settings:
        run = Run(task, name, setting, seed)
        for _, batch in zip(range(task.steps // 4), batches(task, seed), strict=False):
            run.take(batch)
        run.record()
        loss = run.curve[-1]["train_loss"]
        losses[setting] = loss if np.isfinite(loss) else np.inf
    return min(losses, key=lambda setting: losses[setting])


def train(task: Task, seed: int, progress: Progress) -> list[dict[str, Any]]:
    """Trains with all optimizers in turns."""
    names = [*OPTIMIZERS, *(RECIPES if task.label == "deep autoencoder" else ())]
    tuning = progress.add_task(f"{task.label}: settings", total=len(names))
    runs = []
    for name in names:
        runs.append(Run(task, name, choose(task, name, seed + 1), seed))
        progress.advance(tuning)
    bar = progress.add_task(task.label, total=task.steps)
    points = {round(task.steps * share) for share in np.linspace(0, 1, 21)}
    for k, batch in zip(range(task.steps), batches(task, seed), strict=False):
        for run in runs:
            if k in points:
                run.record()
            run.take(batch)
        progress.advance(bar)
    for run in runs:
        run.record()
    return [
        {
            "task": task.label,
            "optimizer": run.name,
            "setting": run.setting,
            "batch": task.batch,
            "median_step_seconds": float(np.median(run.seconds)),
            "curve": run.curve,
        }
        for run in runs
    ]


def rows(results: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Task, optimizer, setting, losses at the end, time per step relative to SGD's."""
    sgd = {
        r["task"]: r["median_step_seconds"]
        for r in results
        if r["optimizer"].startswith("SGD")
    }
    return [
        (
            r["task"],
            r["optimizer"],
            f"{r['setting']:g}",
            f"{r['curve'][-1]['train_loss']:.4g}",
            f"{r['curve'][-1]['test_loss']:.4g}",
            str(r["curve"][-1]["steps"]),
            f"{r['median_step_seconds'] / sgd[r['task']]:.2f}",
        )
        for r in results
    ]


COLUMNS = ("task", "optimizer", "setting", "train", "test", "steps", "× SGD's step")


def show(results: Sequence[dict[str, Any]], path: Path) -> None:
    """The table, and a picture of the curves."""
    table = Table(*COLUMNS)
    for row in rows(results):
        table.add_row(*row)
    Console().print(table)
    labels = list(dict.fromkeys(r["task"] for r in results))
    figure = Figure(figsize=(4 * len(labels), 3.6), layout="constrained")
    for axes, label in zip(
        np.atleast_1d(figure.subplots(1, len(labels))), labels, strict=True
    ):
        for r in results:
            if r["task"] == label:
                at = [point["steps"] for point in r["curve"]]
                axes.plot(
                    at, [p["train_loss"] for p in r["curve"]], label=r["optimizer"]
                )
        axes.set(title=label, xlabel="steps", ylabel="training loss", yscale="log")
        axes.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, writes the results, and shows a table and a picture of them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.curveball_minibatch",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--data-dir", type=Path, required=True, help="MNIST's IDX files"
    )
    parser.add_argument("--steps", type=int, default=2000, help="of the classifiers")
    parser.add_argument("--autoencoder-steps", type=int, default=200, help="of it")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    parser.add_argument("--output", type=Path, default=Path("out"), help="the folder")
    options = parser.parse_args(arguments)
    made, results = provenance(), []
    with Progress() as progress:
        for task in tasks(options.data_dir, options.steps, options.autoencoder_steps):
            for result in train(task, options.seed, progress):
                results.append({**result, "made": made})
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / "curveball_minibatch"
    report.write_results(results, stem.with_suffix(".jsonl"))
    show(results, stem.with_suffix(".png"))


if __name__ == "__main__":
    main()
