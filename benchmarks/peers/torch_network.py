"""The deep autoencoder's weights and loss, for the peers in torch."""

import json
from collections.abc import Iterator

import torch
from protocol import Arrays, Examples
from torch import nn


def linear_layers(arrays: Arrays) -> Iterator[tuple[nn.Linear, str]]:
    """Each layer with its weights, and what follows.

    That is "tanh" or "relu", "identity" behind the code, and "logits" in the end.
    """
    model = json.loads(str(arrays["model"]))
    count = len(model["hidden"])
    after = {count // 2: "identity", count: "logits"}
    for i in range(count + 1):
        kernel, bias = (
            torch.from_numpy(arrays[f"params/Dense_{i}/{name}"])
            for name in ("kernel", "bias")
        )
        linear = nn.Linear(*kernel.shape)
        with torch.no_grad():
            linear.weight.copy_(kernel.T)
            linear.bias.copy_(bias)
        yield linear, after.get(i, model["transfer"])


def reconstruction_loss(logits: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Sigmoid cross-entropy, summed over pixels and averaged over images."""
    losses = nn.functional.binary_cross_entropy_with_logits(
        logits, images, reduction="sum"
    )
    return losses / len(images)


def loss_of(model: nn.Module, examples: Examples) -> float:
    """The loss, without gradients."""
    batch = torch.from_numpy(examples.inputs)
    with torch.no_grad():
        return reconstruction_loss(model(batch), batch).item()
