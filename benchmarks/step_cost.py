"""What a training step costs: operations by hand and by XLA, time, memory, growth.

The network is the deep autoencoder of the paper. All variants take turns in one
process; times are medians, and only their ratios mean something. A unit is a forward
pass, 2 n Σ d_in d_out operations. Peers take turns, too: `--peer NAME=PYTHON` names
a script of `benchmarks/peers` and the interpreter of the environment it asks for. The
same command runs on a GPU; it measures what the device can do at most, and counts
kernels.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib
from rich.progress import track

import locoprop_optax as loco
from benchmarks.autoencoder import problem_of
from benchmarks.ceilings import ceilings, launches
from benchmarks.datasets import Images
from benchmarks.networks import HIDDEN, Autoencoder, reconstruction_loss
from benchmarks.operations import operations
from benchmarks.peer import start
from benchmarks.problem import Task
from benchmarks.provenance import provenance
from benchmarks.step_report import show

PIXELS = 784
GROWTH = {
    "width": (0.5, 1, 2, 4),  # times the usual one
    "depth": (1, 2, 4, 8),
    "batch": (100, 1000, 4000, 16000),  # thousandths of the usual one
    "steps": (1, 5, 10, 20),
}
GROWN = ("adam", "locoprop_m", "locoprop_s", "scale_by_locoprop")
PEER_SETTINGS = {
    "torch_locoprop": ({"correction": 0.0}, {"correction": 0.1}),
    "kfac": ({"adaptive": True}, {"adaptive": False}),
}


def _with_momentum(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    behind = optax.trace(0.9), optax.scale_by_learning_rate(0.1)
    return loco.keep_finite(optax.chain(tx, *behind))


Make = Callable[[int, loco.Layers], optax.GradientTransformation]
VARIANTS: dict[str, Make] = {
    "adam": lambda steps, layers: optax.adam(1e-3),
    "muon": lambda steps, layers: contrib.muon(1e-3),
    "locoprop_m": lambda steps, layers: loco.locoprop_m(
        layers, 1e-5, num_local_steps=steps
    ),
    "locoprop_s": lambda steps, layers: loco.locoprop_s(
        layers, 1e-5, num_local_steps=steps
    ),
    "scale_by_locoprop, 1 step": lambda steps, layers: _with_momentum(
        loco.scale_by_locoprop(layers, solver=loco.solvers.majorized_newton(1))
    ),
    "scale_by_locoprop": lambda steps, layers: _with_momentum(
        loco.scale_by_locoprop(layers)
    ),
}


class Step:
    """One variant's compiled training step, and what it measured."""

    def __init__(self, variant: str, widths: Sequence[int], n: int, steps: int):
        self.model = Autoencoder(hidden=tuple(widths[1:-1]), pixels=widths[-1])
        self.batch = jax.random.uniform(jax.random.key(0), (n, widths[0]))
        params = self.model.init(jax.random.key(1), self.batch[:1])["params"]
        self.loss_fn = partial(reconstruction_loss, self.model)
        layers = loco.layers(self.loss_fn)(params, self.batch)
        self.capture = loco.value_and_grad(self.loss_fn, layers)
        self.tx, self.captures = VARIANTS[variant](steps, layers), "locoprop" in variant
        self.carry = (params, self.tx.init(params))

    def __call__(self, carry: Any, batch: jax.Array) -> tuple[Any, jax.Array]:
        """A training step, as the README writes it."""
        params, state = carry
        if self.captures:
            loss, grads, intermediates = self.capture(params, batch)
            updates, state = self.tx.update(
                grads, state, params, intermediates=intermediates
            )
        else:
            loss, grads = jax.value_and_grad(self.loss_fn)(params, batch)
            updates, state = self.tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    def record_bytes(self) -> int:
        """What the records of a step take."""
        if not self.captures:
            return 0
        _, _, intermediates = jax.eval_shape(self.capture, self.carry[0], self.batch)
        return _bytes(intermediates.layers)

    def compile(self) -> Any:
        """Compiles the step, its carry donated."""
        lowered = jax.jit(self.__call__, donate_argnums=0).lower(self.carry, self.batch)
        return lowered.compile()

    def counted_by_xla(self) -> float:
        """XLA's count of operations: once of what a loop repeats, so extrapolated."""
        lengths = [1]

        def count(limit):
            shorter = partial(_shorter, jax.lax.scan, limit, lengths)
            with mock.patch("jax.lax.scan", shorter):
                return self.compile().cost_analysis()["flops"]

        one, two = count(1), count(2)
        return one + (max(lengths) - 1) * (two - one)


def _shorter(
    scan: Any,
    limit: int,
    lengths: list[int],
    step: Any,
    init: Any,
    xs: Any = None,
    **how,
) -> Any:
    """A scan of no more steps than the limit, written out; notes its own length."""
    length = how["length"] if xs is None else len(xs)
    lengths.append(length)
    xs = None if xs is None else xs[:limit]
    return scan(step, init, xs, length=min(limit, length), unroll=True)


def bare(widths: Sequence[int], n: int, later: int) -> Callable[[Any], Any]:
    """The matrix products of backprop and of local steps alone, in one function."""
    x = jax.random.uniform(jax.random.key(0), (n, widths[0]))

    def products(kernels):
        inputs = [x]
        for kernel in kernels:
            inputs.append(inputs[-1] @ kernel)
        back, gradients = inputs.pop(), []
        for i in reversed(range(len(kernels))):
            gradients.append(inputs[i].T @ back)
            back = back @ kernels[i].T if i else back
        moved = [k - 1e-12 * g for k, g in zip(kernels, gradients[::-1], strict=True)]

        def local(kernels, _):
            return [
                k - 1e-12 * (i.T @ (i @ k))
                for i, k in zip(inputs, kernels, strict=True)
            ], None

        return jax.lax.scan(local, moved, length=later)[0]

    return jax.jit(products, donate_argnums=0)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def kernels_of(params: Any) -> list[jax.Array]:
    """The kernels, layer by layer."""
    return [jnp.copy(params[f"Dense_{i}"]["kernel"]) for i in range(len(params))]


def measure(
    widths: Sequence[int], n: int, steps: int, repeats: int, variants: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Times of all variants and of bare products in turns; counts and memory."""
    made = {name: Step(name, widths, n, steps) for name in variants}
    compiled = {name: step.compile() for name, step in made.items()}
    kernels = kernels_of(next(iter(made.values())).carry[0])
    products = {
        "bare backprop": bare(widths, n, 0),
        "bare locoprop_m": bare(widths, n, steps - 1),
    }
    carries = {name: jax.tree.map(jnp.copy, kernels) for name in products}
    seconds: dict[str, list[float]] = {name: [] for name in (*made, *products)}
    for _ in track(range(repeats + 1), f"batch {n}, widths {max(widths)}"):
        for name, step in made.items():
            began = time.perf_counter()
            carry, _ = jax.block_until_ready(compiled[name](step.carry, step.batch))
            seconds[name].append(time.perf_counter() - began)
            step.carry = carry
        for name, product in products.items():
            began = time.perf_counter()
            carries[name] = jax.block_until_ready(product(carries[name]))
            seconds[name].append(time.perf_counter() - began)
    found = {n: {"seconds": float(np.median(s[1:]))} for n, s in seconds.items()}
    for name in made:
        memory = compiled[name].memory_analysis()
        found[name] |= {
            "operations": operations(name, widths, n, steps),
            "temporary_bytes": memory.temp_size_in_bytes,
            "argument_bytes": memory.argument_size_in_bytes,
            "aliased_bytes": memory.alias_size_in_bytes,
            "record_bytes": made[name].record_bytes(),
            "state_bytes": _bytes(made[name].carry[1]),
            "parameter_bytes": _bytes(made[name].carry[0]),
            "launches": launches(compiled[name].as_text()),
        }
    return found


def beside_peer(
    name: str, python: Path, widths: Sequence[int], n: int, repeats: int
) -> list[dict[str, Any]]:
    """Times and losses of steps on one batch, a peer's and ours in turns."""
    results = []
    for settings in PEER_SETTINGS[name]:
        ours = {
            v: Step(v, widths, n, 10)
            for v in ("adam", "locoprop_m", "scale_by_locoprop")
        }
        compiled = {variant: step.compile() for variant, step in ours.items()}
        adam = ours["adam"]
        seconds: dict[str, list[float]] = {v: [] for v in (*ours, name)}
        losses: dict[str, list[float]] = {v: [] for v in (*ours, name)}
        images = Images(*2 * [np.asarray(adam.batch)])
        order = np.tile(np.arange(n), (repeats + 1, 1))
        task = Task(problem_of(images, adam.model), adam.carry[0], order)
        with start(python, name, task, settings) as peer:
            for _ in track(range(repeats + 1), f"{name}, {settings}"):
                for variant, step in ours.items():
                    began = time.perf_counter()
                    step.carry, loss = jax.block_until_ready(
                        compiled[variant](step.carry, step.batch)
                    )
                    seconds[variant].append(time.perf_counter() - began)
                    losses[variant].append(float(loss))
                answer = peer.ask(steps=1)
                seconds[name] += answer["seconds"]
                losses[name] += answer["losses"]
            versions = peer.versions
        medians = {v: float(np.median(s[1:])) for v, s in seconds.items()}
        results.append(
            {
                "peer": name,
                "settings": settings,
                "versions": versions,
                "losses": losses,
                "seconds": medians,
            }
        )
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, writes the results, and shows tables and a picture of them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_cost",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--repeats", type=int, default=15, help="medians are over these"
    )
    parser.add_argument("--batch", type=int, default=1000, help="examples")
    parser.add_argument(
        "--steps", type=int, default=10, help="local ones, of the paper's"
    )
    parser.add_argument("--width", type=float, default=1.0, help="of hidden layers")
    parser.add_argument(
        "--peer",
        type=lambda text: text.split("=", 1),
        action="append",
        default=[],
        metavar="NAME=PYTHON",
        help="a script of benchmarks/peers and its interpreter",
    )
    parser.add_argument("--no-growth", action="store_true", help="leave growth out")
    parser.add_argument("--output", type=Path, default=Path("out"), help="the folder")
    options = parser.parse_args(arguments)
    made = provenance()
    widths = _scaled(options.width)
    shape = (widths, options.batch, options.steps)
    found = measure(*shape, options.repeats, list(VARIANTS))
    by_xla = {
        name: Step(name, *shape).counted_by_xla()
        for name in track([n for n in VARIANTS if n != "muon"], "XLA's counts")
    }
    results: dict[str, Any] = {
        "batch": options.batch,
        "widths": widths,
        "found": found,
        "by_xla": by_xla,
        "ceilings": ceilings(max(64, int(2048 * options.width))),
        "made": made,
    }
    results["peers"] = [
        result
        for name, python in options.peer
        for result in beside_peer(
            name, Path(python), widths, options.batch, options.repeats
        )
    ]
    if not options.no_growth:
        results["growth"] = growth(options.width, options.batch)
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / "step_cost"
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    show(results, stem.with_suffix(".png"))


def _scaled(width: float, depth: int = 1) -> list[int]:
    """Pixels, hidden widths, pixels; hidden layers but the code repeated."""
    half = [max(2, round(width * h)) for h in HIDDEN[:3] for _ in range(depth)]
    code = max(2, round(width * HIDDEN[3]))
    return [PIXELS, *half, code, *half[::-1], PIXELS]


def growth(width: float, batch: int) -> list[dict[str, Any]]:
    """Times against width, depth, batch and local steps, with what is predicted."""
    results = []
    usual = {"width": width, "depth": 1, "batch": batch, "steps": 10}
    for axis, value in ((name, v) for name in GROWTH for v in GROWTH[name]):
        now = {"width": width * value, "batch": max(2, batch * value // 1000)}
        chosen = usual | {axis: now.get(axis, value)}
        widths = _scaled(chosen["width"], chosen["depth"])
        found = measure(widths, chosen["batch"], chosen["steps"], 3, GROWN)
        results.append({"axis": axis, **chosen, "found": found})
    return results


if __name__ == "__main__":
    main()
