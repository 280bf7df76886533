"""What a training step takes to trace, to compile and to run, for 24 layers.

Equal layers are solved alone, each with its own part of the program, or stacked under
one `vmap`. The models are a stack of equal dense layers and the transformer of
`benchmarks.capture_cost`, its blocks unrolled or scanned.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

import locoprop_optax as loco
from benchmarks import report
from benchmarks.capture_cost import Transformer, compile_seconds
from benchmarks.ceilings import launches, seconds
from benchmarks.provenance import provenance

MAKERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "locoprop_m": partial(loco.locoprop_m, learning_rate=1e-5),
    "locoprop": loco.locoprop,
}


class Stack(nn.Module):
    """Equal dense layers with tanh between them."""

    depth: int
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """From features to features."""
        for _ in range(self.depth):
            x = nn.tanh(nn.Dense(self.width)(x))
        return x


def models(depth: int, width: int, batch: int) -> dict[str, tuple[nn.Module, Any]]:
    """The models by name, and what goes into each."""
    tokens = jnp.zeros((max(1, batch // 128), 64), jnp.int32)
    features = jax.random.normal(jax.random.key(0), (batch, width))
    transformer = partial(Transformer, depth, width=width // 2)
    return {
        "dense layers": (Stack(depth, width), features),
        "transformer, unrolled": (transformer(scanned=False), tokens),
        "transformer, scanned": (transformer(scanned=True), tokens),
    }


def measure(model: nn.Module, x: jax.Array, scanned: bool) -> dict[str, dict[str, Any]]:
    """Every optimizer's step: its times and kernels, and how far its updates are."""
    params = jax.jit(model.init)(jax.random.key(1), x)["params"]

    def loss_fn(params, x):
        return jnp.mean((model.apply({"params": params}, x) - 1.0) ** 2)

    layers = loco.layers(loss_fn)(params, x)

    def local_step(tx, state, params, x):
        _, grads, intermediates = loco.value_and_grad(loss_fn, layers)(params, x)
        return tx.update(grads, state, params, intermediates=intermediates)

    def adam_step(state, params, x):
        grads = jax.grad(loss_fn)(params, x)
        return optax.adam(1e-3).update(grads, state, params)

    steps = {"adam": (adam_step, optax.adam(1e-3))}
    for name, make in MAKERS.items():
        for stacked in (True,) if scanned else (False, True):
            tx = make(layers, stack_layers=stacked)
            label = f"{name}, {'stacked' if stacked else 'alone'}"
            steps[label] = (partial(local_step, tx), tx)
    found, updates = {}, {}
    for name, (step, tx) in steps.items():
        state = tx.init(params)
        trace, compile_, compiled = compile_seconds(step, state, params, x)
        found[name] = {
            "trace_seconds": trace,
            "compile_seconds": compile_,
            "step_seconds": seconds(compiled, state, params, x),
            "launches": launches(compiled.as_text()),
        }
        updates[name] = compiled(state, params, x)[0]
    for name in MAKERS if not scanned else ():
        pair = updates[f"{name}, alone"], updates[f"{name}, stacked"]
        apart = optax.tree.norm(optax.tree.sub(*pair)) / optax.tree.norm(pair[0])
        found[f"{name}, stacked"]["relative_difference"] = float(apart)
    return found


COLUMNS = ("trace + compile, s", "× Adam's", "step, ms", "kernels a step")


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Each optimizer's `COLUMNS`."""
    found = result["found"]

    def total(part):
        return part["trace_seconds"] + part["compile_seconds"]

    return [
        (
            f"{result['model']}: {name}",
            f"{total(part):.1f}",
            f"{total(part) / total(found['adam']):.1f}",
            f"{1e3 * part['step_seconds']:.1f}",
            str(part["launches"]),
        )
        for name, part in found.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, writes the results, and shows a table and a picture of them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compile_cost",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--depth", type=int, default=24, help="the number of layers or blocks")
    add("--width", type=int, default=256, help="of dense layers; twice the blocks'")
    add("--batch", type=int, default=1000, help="rows; half as many positions")
    add("--output", type=Path, default=Path("out"), help="the folder")
    options = parser.parse_args(arguments)
    made, results = provenance(), []
    chosen = models(options.depth, options.width, options.batch)
    for name, (model, x) in track(chosen.items(), "models"):
        jax.clear_caches()
        found = measure(model, x, name.endswith("scanned"))
        results.append({"model": name, "found": found, "made": made})
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / "compile_cost"
    report.write_results(results, stem.with_suffix(".jsonl"))
    table = Table("step", *COLUMNS, title=f"{options.depth} layers or blocks")
    figure = Figure(figsize=(4 * len(results), 3.4), layout="constrained")
    for axes, result in zip(figure.subplots(1, len(results)), results, strict=True):
        for row in rows(result):
            table.add_row(*row)
        names = list(result["found"])[::-1]
        for part, start in (("trace", None), ("compile", "trace")):
            lengths = [result["found"][n][f"{part}_seconds"] for n in names]
            left = [
                result["found"][n][f"{start}_seconds"] if start else 0 for n in names
            ]
            axes.barh(names, lengths, left=left, label=part)
        axes.set(title=result["model"], xlabel="seconds")
    figure.axes[0].legend(frameon=False)
    figure.savefig(stem.with_suffix(".png"), dpi=150)
    Console().print(table)
    print(f"Results: {stem}.jsonl\nPicture: {stem}.png")


if __name__ == "__main__":
    main()
