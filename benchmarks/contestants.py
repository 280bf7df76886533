"""The optimizers that the benchmarks compare, and where each is tuned.

Every contestant is a function of the number of steps, of its settings and, if it takes
intermediates, of the layers of the loss. A space says what optuna draws the settings
from, and which are tried first and stand if none are given.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import optax
from optax import contrib

import locoprop_optax as loco


class Range(NamedTuple):
    """Numbers between two, drawn evenly in their logarithm; which is tried first."""

    low: float
    high: float
    first: float


class Choice(NamedTuple):
    """One of a few values; which is tried first."""

    values: tuple[Any, ...]
    first: Any


Space = Mapping[str, Range | Choice]
RATE = Range(1e-5, 1.0, 1e-3)
EPS = Range(1e-10, 1e-3, 1e-8)
MOMENTUM = Choice((0.8, 0.9, 0.95, 0.99), 0.9)
DECAY = Choice((0.9, 0.99, 0.999), 0.99)


class Contestant(NamedTuple):
    """An optimizer as the benchmark runs it.

    Attributes:
      label: what tables and pictures call it.
      make: from the total number of steps and settings to the optimizer, or for a peer
        to the settings of its process; one that takes intermediates is also given
        `layers`.
      space: what is tuned.
      peer: the script in `benchmarks/peers` that runs it; None for an optimizer of this
        process.
      lent: whether that script takes gradients from this process, rather than train a
        model of its own.
      needs: what its update is given beside the gradient; the curvature in the
        intermediates is that of the batch, or of a quarter of it.
    """

    label: str
    make: Callable[..., Any]
    space: Space
    peer: str | None = None
    lent: bool = False
    needs: frozenset[Literal["intermediates", "a quarter", "functions", "value"]] = (
        frozenset()
    )

    def first(self) -> dict[str, Any]:
        """The settings that the space tries first."""
        return {name: range_.first for name, range_ in self.space.items()}

    def made(
        self,
        steps: int,
        settings: Mapping[str, Any] | None,
        layers: loco.Layers | None = None,
    ) -> Any:
        """With these settings, and the first for those that are not given."""
        given = {} if layers is None else {"layers": layers}
        return self.make(steps, **given, **(self.first() | dict(settings or {})))


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


def _scheduled(
    optimizer: Callable[..., optax.GradientTransformation], **fixed: Any
) -> Callable[..., optax.GradientTransformation]:
    """The optimizer with the schedule, its other settings as optax names them."""

    def make(steps: int, *, learning_rate: float, **settings: Any):
        schedule = warmup_then_linear(learning_rate, steps)
        return optimizer(learning_rate=schedule, **fixed, **settings)

    return make


def _locoprop(
    steps: int,
    *,
    layers: loco.Layers,
    target_damping: float,
    damping: float,
    decays: bool = True,
    learning_rate: float = 1.0,
    ema: float = 0.0,
    stride: int = 1,
    fallback_learning_rate: float = 1e-3,
) -> optax.GradientTransformation:
    return loco.locoprop(
        layers,
        warmup_then_linear(learning_rate, steps) if decays else learning_rate,
        target=loco.targets.natural_gradient(1.0, target_damping),
        solver=loco.solvers.majorized_newton(1, damping, ema=ema, stride=stride),
        fallback=optax.adamw(warmup_then_linear(fallback_learning_rate, steps)),
    )


def kernels(params: Any) -> Any:
    """What Muon orthogonalizes: each kernel as a matrix from inputs to outputs."""

    def axes(path, leaf):
        keys = [jax.tree_util.keystr((key,), simple=True) for key in path]
        if "kernel" not in keys:  # of NNX its value is below it
            return None
        return contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1)

    return jax.tree.map_with_path(axes, params)


def _muon(
    steps: int,
    *,
    learning_rate: float,
    adam_learning_rate: float,
    **settings: Any,
) -> optax.GradientTransformation:
    return contrib.muon(
        warmup_then_linear(learning_rate, steps),
        adam_learning_rate=warmup_then_linear(adam_learning_rate, steps),
        muon_weight_dimension_numbers=kernels,
        **settings,
    )


def _to_peer(**fixed: Any) -> Callable[..., dict[str, Any]]:
    return lambda steps, **settings: {**fixed, "total_steps": steps, **settings}


_soap = _to_peer(optimizer="soap", weight_decay=0.0)
INTERMEDIATES = frozenset({"intermediates"})
QUARTER = INTERMEDIATES | {"a quarter"}
PAPER: Space = {
    "learning_rate": Range(1e-6, 1e-4, 1e-5),
    "activation_learning_rate": Range(1.0, 100.0, 10.0),
    "num_local_steps": Choice((5, 10, 20), 10),
}
LOCOPROP: Space = {
    "target_damping": Range(0.05, 5.0, 0.75),
    "damping": Range(0.03, 3.0, 0.3),
}
SMALL_BATCHES: Space = {  # and other parameters than those of layers
    "ema": Choice((0.0, 0.9, 0.95, 0.99), 0.0),
    "fallback_learning_rate": Range(1e-4, 1e-1, 1e-3),
}
STRIDE = 4  # of LocoProp's curvature, where rows are many
SOAP: Space = {
    "learning_rate": RATE,
    "shampoo_beta": Choice((0.9, 0.95, 0.99), 0.95),
    "eps": EPS,
}
MIXED = ("soap_and_adam", "locoprop_and_adamw")  # for models of more than layers
BETAS: Space = {
    "learning_rate": RATE,
    "b1": MOMENTUM,
    "b2": Choice(DECAY.values, 0.999),
    "eps": EPS,
}

CONTESTANTS: dict[str, Contestant] = {
    "sgd": Contestant("SGD", _scheduled(optax.sgd), {"learning_rate": RATE}),
    "momentum": Contestant(
        "momentum",
        _scheduled(optax.sgd),
        {"learning_rate": RATE, "momentum": MOMENTUM},
    ),
    "nesterov": Contestant(
        "Nesterov",
        _scheduled(optax.sgd, nesterov=True),
        {"learning_rate": RATE, "momentum": MOMENTUM},
    ),
    "adagrad": Contestant(
        "AdaGrad",
        _scheduled(optax.adagrad),
        {"learning_rate": RATE, "eps": EPS},
    ),
    "rmsprop": Contestant(
        "RMSProp",
        _scheduled(optax.rmsprop),
        {
            "learning_rate": RATE,
            "decay": DECAY,
            "momentum": MOMENTUM,
            "eps": EPS,
        },
    ),
    "adam": Contestant("Adam", _scheduled(optax.adam), BETAS),
    "adamw": Contestant(
        "AdamW",
        _scheduled(optax.adamw),
        {**BETAS, "weight_decay": Range(1e-6, 1e-2, 1e-4)},
    ),
    "muon": Contestant(
        "Muon, Adam for the rest",
        _muon,
        {
            "learning_rate": Range(1e-5, 1.0, 0.02),
            "beta": MOMENTUM,
            "adam_learning_rate": Range(1e-4, 1e-1, 1e-3),
            "adam_b1": MOMENTUM,
        },
    ),
    "lbfgs": Contestant(
        "L-BFGS",
        lambda steps, memory_size: optax.lbfgs(memory_size=memory_size),
        {"memory_size": Choice((5, 10, 20), 10)},
        needs=frozenset({"value"}),
    ),
    "curveball": Contestant(
        "CurveBall",
        lambda steps, damping: loco.curveball(damping=damping),
        {"damping": Range(0.1, 100.0, 1.0)},
        needs=frozenset({"functions"}),
    ),
    "locoprop_s": Contestant(
        "locoprop_s (the paper's)",
        _scheduled(loco.locoprop_s),
        PAPER,
        needs=INTERMEDIATES,
    ),
    "locoprop_m": Contestant(
        "locoprop_m (the paper's)",
        _scheduled(loco.locoprop_m),
        PAPER,
        needs=INTERMEDIATES,
    ),
    "locoprop": Contestant(
        "locoprop (our defaults)",
        lambda steps, layers: loco.locoprop(layers),
        {},
        needs=INTERMEDIATES,
    ),
    "locoprop_and_adamw": Contestant(
        "locoprop, AdamW for the rest",
        partial(_locoprop, stride=STRIDE),
        {**LOCOPROP, "learning_rate": Range(0.1, 1.0, 1.0), **SMALL_BATCHES},
        needs=QUARTER,
    ),
    "kfac": Contestant(
        "K-FAC, adaptive",
        _to_peer(adaptive=True),
        {"damping": Range(1e-4, 1000.0, 150.0)},
        peer="kfac",
    ),
    "kfac_fixed": Contestant(
        "K-FAC, fixed",
        _to_peer(adaptive=False),
        {
            "learning_rate": Range(1e-4, 1.0, 0.01),
            "momentum": MOMENTUM,
            "damping": Range(1e-3, 100.0, 0.1),
        },
        peer="kfac",
    ),
    "shampoo": Contestant(
        "Shampoo",
        _to_peer(optimizer="shampoo", preconditioning_compute_steps=10),
        {
            "learning_rate": RATE,
            "start_preconditioning_step": Choice((5, 25), 5),
            "graft_type": Choice((0, 1, 2, 3), 1),
            "matrix_eps": EPS,
        },
        peer="torch_optimizers",
    ),
    "soap": Contestant("SOAP", _soap, SOAP, peer="torch_optimizers"),
    "soap_and_adam": Contestant(
        "SOAP, Adam for vectors", _soap, SOAP, peer="torch_steps", lent=True
    ),
    "torch_locoprop": Contestant(
        "PyTorch's locoprop",
        _to_peer(),
        {
            "learning_rate": Range(1e-6, 1e-4, 1e-5),
            "activation_learning_rate": Range(1.0, 100.0, 10.0),
            "correction": Choice((0.0, 0.1), 0.1),
        },
        peer="torch_locoprop",
    ),
}
