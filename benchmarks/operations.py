"""The floating-point operations of a training step, counted by hand.

A unit is a pass forward, 2 n Σ d_in d_out operations. Only matrix products and inverses
are counted; XLA counts the rest, too, but not LAPACK's factorizations.
"""

from collections.abc import Sequence
from itertools import pairwise

NEWTON_STEPS = 2


def layers_of(widths: Sequence[int]) -> list[tuple[int, int]]:
    """Inputs and outputs of each layer."""
    return list(pairwise(widths))


def operations(
    variant: str, widths: Sequence[int], n: int, steps: int
) -> dict[str, int]:
    """The floating-point operations of the matrix products of a step, by hand.

    Args:
      variant: a key of `VARIANTS`.
      widths: pixels, hidden widths, pixels.
      n: examples in a batch.
      steps: the number of local steps of the paper's variants.
    """
    layers = layers_of(widths)
    unit = sum(2 * n * i * o for i, o in layers)
    count = {"backprop": 3 * unit - 2 * n * widths[0] * widths[1]}
    if variant in ("locoprop_m", "locoprop_s"):
        later = steps - 1
        linear = (
            (len(layers) // 2 - 1,) if variant == "locoprop_m" else range(len(layers))
        )
        by_gram = {
            k
            for k in linear
            if _gram_is_cheaper(layers[k][0] + 1, layers[k][1], n, later)
        }
        count["local steps"] = later * sum(
            4 * n * i * o for k, (i, o) in enumerate(layers) if k not in by_gram
        )
        count["Gram matrices"] = sum(2 * n * layers[k][0] ** 2 for k in by_gram)
        count["steps by Gram matrices"] = later * sum(
            2 * layers[k][0] ** 2 * layers[k][1] for k in by_gram
        )
    elif "locoprop" in variant:
        newton = 1 if "1 step" in variant else NEWTON_STEPS
        count["local steps"] = (newton - 1) * 2 * unit
        count["Gram matrices"] = sum(2 * n * i**2 for i, _ in layers)
        # Cholesky's factor, and its inverse; then the product of that with itself.
        count["factorizations"] = sum(i**3 // 3 + i**3 for i, _ in layers)
        count["inverses"] = sum(2 * i**3 for i, _ in layers)
        count["solves"] = newton * sum(2 * i**2 * o for i, o in layers)
    return {name: value for name, value in count.items() if value}


def _gram_is_cheaper(d: int, o: int, n: int, later: int) -> bool:
    return 2 * n * d * d + later * 2 * d * d * o < later * 4 * n * d * o


def unit_of(widths: Sequence[int], n: int) -> int:
    """The operations of a pass forward."""
    return sum(2 * n * i * o for i, o in layers_of(widths))
