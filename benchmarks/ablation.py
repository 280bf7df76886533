"""What each part of LocoProp adds on the deep autoencoder.

Two settings, `locoprop()` and the one without any rate, and both with one part changed
at a time. Nothing is tuned.
"""

from collections.abc import Callable, Sequence
from typing import Any

import optax

import locoprop_optax as loco
from benchmarks import comparison
from benchmarks.autoencoder import BENCHMARK as AUTOENCODER
from benchmarks.contestants import CONTESTANTS, Contestant, warmup_then_linear

AUTOMATIC = CONTESTANTS["locoprop_automatic"]


def scheduled(learning_rate: float = 0.1, **changed: Any) -> Contestant:
    """`locoprop()` behind the schedule, something in it changed."""

    def make(steps: int) -> optax.GradientTransformation:
        return loco.locoprop(warmup_then_linear(learning_rate, steps), **changed)

    return Contestant("", make, {}, needs=CONTESTANTS["locoprop"].needs)


def automatic(
    curvature_share: float = AUTOMATIC.curvature_share,
    model: Callable[[], optax.GradientTransformation] = loco.scale_by_quadratic_model,
    **changed: Any,
) -> Contestant:
    """LocoProp in K-FAC's metric and without any rate, something in it changed."""

    def make(steps: int) -> optax.GradientTransformation:
        del steps  # no schedule
        usual = {
            "target": loco.targets.natural_gradient(1.0, damping=0.5),
            "solver": loco.solvers.majorized_newton(1, damping=1.0),
        }
        return optax.chain(loco.scale_by_locoprop(**{**usual, **changed}), model())

    needs = AUTOMATIC.needs
    return Contestant("", make, {}, needs=needs, curvature_share=curvature_share)


def newton(num_steps: int, damping: float, **options: Any) -> loco.solvers.Solver:
    """A short name for the solver that both settings share."""
    return loco.solvers.majorized_newton(num_steps, damping, **options)


SQUARED = loco.losses.squared_loss()
VARIANTS: dict[str, Contestant] = {
    "locoprop()": scheduled(),
    "squared loss": scheduled(loss=SQUARED),
    "one local step": scheduled(solver=newton(1, 0.1)),
    "five local steps": scheduled(solver=newton(5, 0.1)),
    "damping 0.01": scheduled(solver=newton(2, 0.01)),
    "damping 1": scheduled(solver=newton(2, 1.0)),
    "no momentum, rate 1": scheduled(1.0, momentum=None),
    "a number a unit": scheduled(target=loco.targets.normalized(0.05, by_unit=True)),
    "γ = 0.2": scheduled(target=loco.targets.normalized(0.2)),
    "automatic": automatic(),
    "automatic, squared loss": automatic(loss=SQUARED),
    "automatic, two local steps": automatic(solver=newton(2, 1.0)),
    "automatic, dampings 0.05 and 0.1": automatic(
        target=loco.targets.natural_gradient(1.0, damping=0.05),
        solver=newton(1, 0.1),
    ),
    "automatic, running curvature": automatic(solver=newton(1, 1.0, ema=0.9)),
    "automatic, normalized": automatic(target=loco.targets.normalized(1.0)),
    "automatic, no momentum": automatic(
        model=lambda: loco.scale_by_quadratic_model(momentum=0.0)
    ),
    "automatic, all of the batch": automatic(curvature_share=1.0),
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
    CONTESTANTS.update({n: c._replace(label=n) for n, c in VARIANTS.items()})
    comparison.main(BENCHMARK, arguments)


if __name__ == "__main__":
    main()
