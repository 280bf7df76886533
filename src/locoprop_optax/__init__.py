"""LocoProp: train a network by solving one small local problem per layer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from locoprop_optax import linen, losses, regularizers, solvers, targets
from locoprop_optax._averaged import averaged
from locoprop_optax._check import check_intermediates
from locoprop_optax._check_state import check_state
from locoprop_optax._curveball import curveball
from locoprop_optax._diagnostics import LayerDiagnostics, diagnostics_of
from locoprop_optax._intermediates import (
    Intermediates,
    LayerIntermediates,
    add_curvature,
    add_sampled_cotangents,
    join_intermediates,
)
from locoprop_optax._keep_finite import KeepFiniteState, keep_finite
from locoprop_optax._optimizers import locoprop, locoprop_momentum
from locoprop_optax._paper import locoprop_m, locoprop_s
from locoprop_optax._quadratic_model import (
    ScaleByQuadraticModelState,
    scale_by_quadratic_model,
)
from locoprop_optax._transform import ScaleByLocoPropState, scale_by_locoprop
from locoprop_optax._trust_region import TrustRegion

if TYPE_CHECKING:
    from locoprop_optax import nnx

__version__ = "0.1.0"

__all__ = [
    "Intermediates",
    "KeepFiniteState",
    "LayerDiagnostics",
    "LayerIntermediates",
    "ScaleByLocoPropState",
    "ScaleByQuadraticModelState",
    "TrustRegion",
    "add_curvature",
    "add_sampled_cotangents",
    "averaged",
    "check_intermediates",
    "check_state",
    "curveball",
    "diagnostics_of",
    "join_intermediates",
    "keep_finite",
    "linen",
    "locoprop",
    "locoprop_m",
    "locoprop_momentum",
    "locoprop_s",
    "losses",
    "nnx",
    "regularizers",
    "scale_by_locoprop",
    "scale_by_quadratic_model",
    "solvers",
    "targets",
]


def __getattr__(name: str) -> Any:
    """Imports `nnx` when it is asked for, as Flax does."""
    if name == "nnx":
        return import_module("locoprop_optax.nnx")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
