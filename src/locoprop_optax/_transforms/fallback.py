"""One optimizer for layers, and another for all other parameters."""

import optax

from locoprop_optax._records.fits import check_params
from locoprop_optax._records.layers import Layers
from locoprop_optax._records.paths import map_by_path
from locoprop_optax._transforms.keep_finite import keep_finite


def with_fallback(
    local: optax.GradientTransformation,
    fallback: optax.GradientTransformation | None,
    layers: Layers,
) -> optax.GradientTransformationExtraArgs:
    """Hands layers to one transformation and all other parameters to another.

    Tables go to the other, too: what suits a batch best hardly moves them, and they
    learn little. A step of either that is not finite is a step of neither.
    """
    fallback = optax.adamw(1e-2) if fallback is None else fallback
    tables = {layer.path for layer in layers if layer.is_table}
    paths = layers.paths - tables

    def label(params):
        check_params(params, layers)
        return map_by_path(
            lambda path, _: "local" if path in paths else "fallback", params
        )

    return keep_finite(optax.partition({"local": local, "fallback": fallback}, label))
