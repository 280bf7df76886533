"""The optimizers that the autoencoder benchmark compares, each with its settings."""

from collections.abc import Callable
from typing import NamedTuple

import optax

import locoprop_optax as loco


class Contestant(NamedTuple):
    """An optimizer as the benchmark runs it.

    Attributes:
      label: what tables and pictures call it.
      make: from the total number of steps to the optimizer.
    """

    label: str
    make: Callable[[int], optax.GradientTransformation]


def warmup_then_linear(peak: float, steps: int) -> optax.Schedule:
    """Linear warm-up over 5 % of training, then linear decay to zero."""
    warmup = max(1, round(0.05 * steps))
    return optax.join_schedules(
        [
            optax.linear_schedule(peak / warmup, peak, warmup - 1 or 1),
            optax.linear_schedule(peak, 0.0, steps - warmup),
        ],
        [warmup],
    )


CONTESTANTS = {
    "adam": Contestant("Adam", lambda n: optax.adam(warmup_then_linear(1e-3, n))),
    "locoprop_m": Contestant(
        "locoprop_m (the paper's)",
        lambda n: loco.locoprop_m(warmup_then_linear(1e-5, n)),
    ),
    "locoprop_s": Contestant(
        "locoprop_s (the paper's)",
        lambda n: loco.locoprop_s(warmup_then_linear(1e-5, n)),
    ),
    "locoprop": Contestant(
        "locoprop (our defaults)",
        lambda n: loco.locoprop(warmup_then_linear(0.1, n)),
    ),
}
