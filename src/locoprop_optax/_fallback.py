"""One optimizer for local layers, and another for all other parameters."""

import optax

from locoprop_optax._keep_finite import keep_finite
from locoprop_optax._layers import (
    LayerSelection,
    layers_of,
    tree_map_with_key_path,
    visible,
    with_layers,
)


def with_fallback(
    local: optax.GradientTransformation,
    fallback: optax.GradientTransformation | None,
    selection: LayerSelection,
) -> optax.GradientTransformationExtraArgs:
    """Hands local layers to one transformation and all other parameters to another.

    A step of either that is not finite is a step of neither.
    """
    fallback = optax.adamw(1e-2) if fallback is None else fallback

    def label(params):
        labels = tree_map_with_key_path(lambda *_: "fallback", params)
        chosen = visible(layers_of(selection.mask(params)))
        local = {p: dict.fromkeys(leaves, "local") for p, leaves in chosen.items()}
        return with_layers(labels, local)

    return keep_finite(optax.partition({"local": local, "fallback": fallback}, label))
