"""What each part of LocoProp adds on the deep autoencoder.

`locoprop()`, and the same with one part changed at a time. Nothing is tuned; Adam is
there for the times.
"""

from collections.abc import Sequence
from typing import Any

import optax

import locoprop_optax as loco
from benchmarks import comparison
from benchmarks.autoencoder import BENCHMARK as AUTOENCODER
from benchmarks.contestants import (
    CONTESTANTS,
    INTERMEDIATES,
    Contestant,
    warmup_then_linear,
)


def automatic(decays: bool = False, **changed: Any) -> Contestant:
    """`locoprop()`, something in it changed."""

    def make(steps: int, layers: loco.Layers) -> optax.GradientTransformation:
        return loco.locoprop(
            layers, warmup_then_linear(1.0, steps) if decays else 1.0, **changed
        )

    return Contestant("", make, {}, needs=INTERMEDIATES)


def modelled(**changed: Any) -> Contestant:
    """`locoprop()` written out, something in its quadratic model changed."""

    def make(steps: int, layers: loco.Layers) -> optax.GradientTransformation:
        del steps  # no schedule
        return optax.chain(
            loco.scale_by_locoprop(layers, target=NATURAL, solver=newton(1, 0.3)),
            loco.scale_by_quadratic_model(
                **dict(damping=0.0, damping_decay=1.0) | changed
            ),
        )

    return Contestant("", make, {}, needs=INTERMEDIATES | {"functions"})


def scheduled(steps: int, layers: loco.Layers) -> optax.GradientTransformation:
    """The direction of `locoprop()`, behind momentum and a schedule."""
    return optax.chain(
        loco.scale_by_locoprop(layers, target=NATURAL, solver=newton(1, 0.3)),
        optax.trace(0.9),
        optax.scale_by_learning_rate(warmup_then_linear(0.1, steps)),
    )


def newton(num_steps: int, damping: float, **options: Any) -> loco.solvers.Solver:
    """A short name for the solver."""
    return loco.solvers.majorized_newton(num_steps, damping, **options)


SQUARED = loco.losses.squared_loss()
NATURAL = loco.targets.natural_gradient(1.0, damping=0.75)
AUTOMATIC = {
    "squared loss": automatic(loss=SQUARED),
    "two local steps": automatic(solver=newton(2, 0.3)),
    "dampings 0.1": automatic(
        target=loco.targets.natural_gradient(1.0, damping=0.1), solver=newton(1, 0.1)
    ),
    "dampings 2": automatic(
        target=loco.targets.natural_gradient(1.0, damping=2.0), solver=newton(1, 2.0)
    ),
    "running curvature": automatic(solver=newton(1, 0.3, ema=0.9)),
    "plain targets": automatic(target=loco.targets.gradient_descent(10.0)),
    "normalized targets": automatic(target=loco.targets.normalized(1.0)),
    "targets normalized by unit": automatic(
        target=loco.targets.normalized(1.0, by_unit=True)
    ),
    "rate that decays": automatic(decays=True),
    "no momentum": modelled(momentum=0.0),
    "λ that adapts": modelled(damping=1.0, damping_decay=0.95),
    "rate 0.1 and momentum 0.9, no model": Contestant(
        "", scheduled, {}, needs=INTERMEDIATES
    ),
}
VARIANTS: dict[str, Contestant] = {
    "adam": CONTESTANTS["adam"],
    "locoprop()": automatic(),
    **{f"locoprop(): {changed}": made for changed, made in AUTOMATIC.items()},
}
BENCHMARK = AUTOENCODER._replace(
    name="ablation",
    description=__doc__,
    optimizers=tuple(VARIANTS),
    default=tuple(VARIANTS),
    stem=lambda options: AUTOENCODER.stem(options).replace("autoencoder", "ablation"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains all variants, and shows a table and a picture of them."""
    CONTESTANTS.update({n: c._replace(label=c.label or n) for n, c in VARIANTS.items()})
    comparison.main(BENCHMARK, arguments)


if __name__ == "__main__":
    main()
