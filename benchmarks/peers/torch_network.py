"""The deep autoencoder's weights and loss, for the peers in torch."""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from protocol import layers_of
from torch import nn


def linear_layers(
    weights: Mapping[str, np.ndarray],
) -> Iterator[tuple[nn.Linear, str]]:
    """Each layer with its weights, and what follows.

    That is "tanh" or "relu", "identity" behind the code, and "logits" in the end.
    """
    layers, code = layers_of(weights)
    transfer = str(weights["transfer"])
    after = {code: "identity", layers - 1: "logits"}
    for i in range(layers):
        kernel = torch.from_numpy(weights[f"kernel_{i}"])
        linear = nn.Linear(*kernel.shape)
        with torch.no_grad():
            linear.weight.copy_(kernel.T)
            linear.bias.copy_(torch.from_numpy(weights[f"bias_{i}"]))
        yield linear, after.get(i, transfer)


def reconstruction_loss(logits: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Sigmoid cross-entropy, summed over pixels and averaged over images."""
    losses = nn.functional.binary_cross_entropy_with_logits(
        logits, images, reduction="sum"
    )
    return losses / len(images)


def loss_of(model: nn.Module, images: np.ndarray) -> float:
    """The loss, without gradients."""
    batch = torch.from_numpy(images)
    with torch.no_grad():
        return reconstruction_loss(model(batch), batch).item()
