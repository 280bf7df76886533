"""What a device can do at most, and what a compiled step asks of it."""

import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_CALLS = {
    "while": "body",
    "call": "to_apply",
    "conditional": "(?:branch_computations|true_computation|false_computation)",
}
_NO_KERNEL = {
    "",
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    *_CALLS,
    "after-all",
    "opt-barrier",
    "partition-id",
}


def seconds(function: Callable[..., Any], *arguments: Any, repeats: int = 7) -> float:
    """The median time of a compiled function, after one run that is not counted."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def product_rate(size: int, precision: str | None = None) -> float:
    """Operations a second of a product of square float32 matrices."""
    x = jax.random.normal(jax.random.key(0), (size, size))
    with jax.default_matmul_precision(precision or "default"):
        product = jax.jit(lambda a, b: a @ b).lower(x, x).compile()
    return 2 * size**3 / seconds(product, x, x)


def bandwidth(numbers: int) -> float:
    """Bytes a second of reading and writing an array of float32."""
    x = jnp.zeros(numbers)
    return 2 * x.nbytes / seconds(jax.jit(lambda a: a + 1), x)


def ceilings(size: int = 2048) -> dict[str, float]:
    """Both ceilings of the default device, the first in each precision it has."""
    found = {"bytes a second": bandwidth(16 * size**2)}
    for precision in ("highest", "default", "TF32_TF32_F32", "BF16_BF16_F32"):
        try:
            found[f"operations a second, {precision}"] = product_rate(size, precision)
        except ValueError:
            continue  # the device has no such products
    return found


def launches(compiled_text: str) -> int:
    """How many kernels a compiled program runs, those in loops as often as they turn.

    Args:
      compiled_text: the optimized HLO, `compiled.as_text()`. Of a condition the longer
        branch counts; a loop of unknown length counts once.
    """
    blocks = re.findall(
        r"^(ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", compiled_text, re.M | re.S
    )
    bodies = {name: body.splitlines() for _, name, body in blocks}
    (entry,) = [name for is_entry, name, _ in blocks if is_entry]

    def called(line: str, role: str) -> list[str]:
        names = re.findall(rf"{role}=\{{?(%[\w.\-]+(?:, %[\w.\-]+)*)", line)
        return re.findall(r"%([\w.\-]+)", ", ".join(names))

    def count(name: str) -> int:
        total = 0
        for line in bodies[name]:
            operation = "".join(re.findall(r" = .*? ([a-z][a-z\-]*)\(", line)[:1])
            total += operation not in _NO_KERNEL
            if operation in _CALLS:
                turns = re.findall(r'"known_trip_count":\{"n":"(\d+)"', line) or ["1"]
                longest = max(map(count, called(line, _CALLS[operation])))
                total += int(turns[0]) * longest
        return total

    return count(entry)
