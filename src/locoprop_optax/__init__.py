"""LocoProp: train a network by solving one small local problem per layer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from locoprop_optax import linen, losses, regularizers, solvers, targets
from locoprop_optax._quadratic.curveball import curveball
from locoprop_optax._quadratic.model import (
    ScaleByQuadraticModelState,
    scale_by_quadratic_model,
)
from locoprop_optax._quadratic.trust_region import TrustRegion
from locoprop_optax._records.check import check_intermediates
from locoprop_optax._records.intermediates import (
    Intermediates,
    LayerIntermediates,
    add_curvature,
    add_sampled_cotangents,
    join_intermediates,
)
from locoprop_optax._records.layers import Layer, Layers
from locoprop_optax._trace.capture import value_and_grad
from locoprop_optax._trace.find import layers
from locoprop_optax._transforms.averaged import averaged
from locoprop_optax._transforms.check_state import check_state
from locoprop_optax._transforms.diagnostics import LayerDiagnostics, diagnostics_of
from locoprop_optax._transforms.keep_finite import KeepFiniteState, keep_finite
from locoprop_optax._transforms.paper import locoprop_m, locoprop_s
from locoprop_optax._transforms.ready import locoprop
from locoprop_optax._transforms.scale_by_locoprop import (
    ScaleByLocoPropState,
    scale_by_locoprop,
)

if TYPE_CHECKING:
    from locoprop_optax import nnx

__version__ = "0.1.0"

__all__ = [
    "Intermediates",
    "KeepFiniteState",
    "Layer",
    "LayerDiagnostics",
    "LayerIntermediates",
    "Layers",
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
    "layers",
    "linen",
    "locoprop",
    "locoprop_m",
    "locoprop_s",
    "losses",
    "nnx",
    "regularizers",
    "scale_by_locoprop",
    "scale_by_quadratic_model",
    "solvers",
    "targets",
    "value_and_grad",
]


def __getattr__(name: str) -> Any:
    """Imports `nnx` when it is asked for, as Flax does."""
    if name == "nnx":
        return import_module("locoprop_optax.nnx")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
