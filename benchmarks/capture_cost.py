"""What capture adds to a gradient: operations, memory, tracing and compilation.

The model is a decoder-only transformer, its blocks unrolled or scanned.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

import locoprop_optax as loco
from benchmarks import report
from benchmarks.provenance import provenance


class Block(nn.Module):
    """Causal attention and an MLP, both residual."""

    heads: int = 4

    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
        """From embeddings to embeddings."""
        width = x.shape[-1]
        mask = nn.make_causal_mask(jnp.ones(x.shape[:-1]))
        x = x + nn.MultiHeadDotProductAttention(self.heads)(
            nn.LayerNorm()(x), mask=mask
        )
        hidden = nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x)))
        return x + nn.Dense(width)(hidden), None


class Transformer(nn.Module):
    """Embedding, blocks and a head.

    Attributes:
      depth: the number of blocks.
      scanned: whether the blocks are one scanned stack.
    """

    depth: int = 24
    scanned: bool = False
    width: int = 64
    vocabulary: int = 65

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """From tokens to logits."""
        x = nn.Embed(self.vocabulary, self.width)(tokens)
        if self.scanned:
            stack = nn.scan(
                Block, {"params": 0}, split_rngs={"params": True}, length=self.depth
            )
            x, _ = stack()(x, None)
        else:
            for _ in range(self.depth):
                x, _ = Block()(x)
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))


def measure(depth: int, scanned: bool, repeats: int) -> dict[str, Any]:
    """Medians over interleaved repeats, of the plain gradient and of capture."""
    model = Transformer(depth, scanned)
    tokens = jnp.zeros((8, 64), jnp.int32)
    params = model.init(jax.random.key(0), tokens)["params"]

    def loss_fn(params, tokens):
        log_p = nn.log_softmax(model.apply({"params": params}, tokens))
        return -jnp.mean(log_p[..., 0])

    layers = loco.layers(loss_fn)(params, tokens)
    makers = {
        "gradient": jax.value_and_grad,
        "capture": partial(loco.value_and_grad, layers=layers),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in makers}
    figures: dict[str, Any] = {"depth": depth, "scanned": scanned}
    for _ in track(range(repeats), f"depth {depth}, scanned {scanned}"):
        for name, make in makers.items():
            jax.clear_caches()
            trace, compile_, compiled = compile_seconds(make(loss_fn), params, tokens)
            seconds[name].append((trace, compile_))
            memory = compiled.memory_analysis()
            figures[name] = {
                "operations": compiled.cost_analysis()["flops"],
                "output_bytes": memory.output_size_in_bytes,
                "temporary_bytes": memory.temp_size_in_bytes,
            }
    for name, pairs in seconds.items():
        trace, compile_ = np.median(np.asarray(pairs), axis=0)
        figures[name] |= {"trace_seconds": trace, "compile_seconds": compile_}
    return figures


def compile_seconds(
    function: Callable[..., Any], *args: Any
) -> tuple[float, float, Any]:
    """The seconds to trace and to compile a function, and what was compiled."""
    began = time.perf_counter()
    lowered = jax.jit(function).lower(*args)
    traced = time.perf_counter()
    compiled = lowered.compile()
    return traced - began, time.perf_counter() - traced, compiled


def ratios(figures: dict[str, Any]) -> dict[str, float]:
    """Capture's figures in units of the plain gradient's."""
    plain, capture = figures["gradient"], figures["capture"]

    def total(part):
        return part["trace_seconds"] + part["compile_seconds"]

    return {
        "operations": capture["operations"] / plain["operations"],
        "trace": capture["trace_seconds"] / plain["trace_seconds"],
        "compile": capture["compile_seconds"] / plain["compile_seconds"],
        "trace + compile": total(capture) / total(plain),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, writes the results, and shows a table and a picture of them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.capture_cost",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--depth", type=int, default=24, help="the number of blocks")
    parser.add_argument("--repeats", type=int, default=3, help="medians are over these")
    parser.add_argument("--output", type=Path, default=Path("out"), help="the folder")
    options = parser.parse_args(arguments)
    made = provenance()
    results = [
        {**measure(options.depth, scanned, options.repeats), "made": made}
        for scanned in (False, True)
    ]
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / "capture_cost"
    report.write_results(results, stem.with_suffix(".jsonl"))
    table = Table("model", *ratios(results[0]), title="capture, in plain gradients")
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    for i, result in enumerate(results):
        form = "scanned" if result["scanned"] else "unrolled"
        name = f"{result['depth']} blocks, {form}"
        found = ratios(result)
        table.add_row(name, *(f"{value:.2f}" for value in found.values()))
        at = np.arange(len(found)) + 0.4 * i
        axes.bar(at, list(found.values()), width=0.38, label=name)
        axes.set_xticks(np.arange(len(found)) + 0.2, list(found))
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_ylabel("capture / plain gradient")
    axes.legend(frameon=False)
    figure.savefig(stem.with_suffix(".png"), dpi=150)
    Console().print(table)
    print(f"Results: {stem}.jsonl\nPicture: {stem}.png")


if __name__ == "__main__":
    main()
