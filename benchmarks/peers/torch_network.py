"""The deep autoencoder's weights and loss, for the peers in torch."""

import json
from collections.abc import Iterator

import torch
from protocol import Arrays, Examples, process_memory
from torch import nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def peak_memory() -> int:
    """The most memory that tensors have held on the device, in bytes."""
    if DEVICE == "cpu":
        return process_memory()
    return torch.cuda.max_memory_allocated()


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
        linear = nn.Linear(*kernel.shape, device=DEVICE)
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


def images_of(examples: Examples) -> torch.Tensor:
    """The images, on the device; they are their own targets."""
    return torch.from_numpy(examples.inputs).to(DEVICE)


def loss_of(model: nn.Module, images: torch.Tensor) -> float:
    """The loss, without gradients."""
    with torch.no_grad():
        return reconstruction_loss(model(images), images).item()
