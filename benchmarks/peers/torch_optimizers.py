"""SOAP and Shampoo of `pytorch-optimizer` on the deep autoencoder.

The environment holds torch, pytorch-optimizer and numpy. Settings: `optimizer`, "soap"
or "shampoo"; `learning_rate`, with `total_steps` warmed up over 5 % of them and then
decayed to zero; all others go to the optimizer as they are. "shampoo" is the package's
`ScalableShampoo`, whose step is grafted onto that of another optimizer.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytorch_optimizer
import torch
from protocol import Arrays, Trainer, rate_at, serve
from torch import nn
from torch_network import (
    images_of,
    linear_layers,
    loss_of,
    peak_memory,
    reconstruction_loss,
)

OPTIMIZERS = {
    "soap": pytorch_optimizer.SOAP,
    "shampoo": pytorch_optimizer.ScalableShampoo,
}


TRANSFERS = {"tanh": nn.Tanh, "relu": nn.ReLU}


def autoencoder(arrays: Arrays) -> nn.Sequential:
    """A transfer function between dense layers, but for a linear code, to logits."""
    model = nn.Sequential()
    for linear, after in linear_layers(arrays):
        model.append(linear)
        if after in TRANSFERS:
            model.append(TRANSFERS[after]())
    return model


def make(arrays: Arrays, settings: dict[str, Any]) -> Trainer:
    """The model, and the optimizer with these settings."""
    torch.set_num_threads(2)
    model = autoencoder(arrays)
    options = dict(settings)
    total = options.pop("total_steps", None)
    optimizer = OPTIMIZERS[options.pop("optimizer")](
        model.parameters(), lr=options.pop("learning_rate"), **options
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_at(step, total)
    )
    size = sum(p.numel() for p in model.parameters())

    def step(images: torch.Tensor) -> float:
        optimizer.zero_grad()
        loss = reconstruction_loss(model(images), images)
        loss.backward()
        optimizer.step()
        schedule.step()
        return loss.item()

    return Trainer(
        images_of,
        step,
        partial(loss_of, model),
        lambda: numbers(optimizer.state) / size,
    )


def numbers(state: Any) -> int:
    """How many numbers a state holds, in whatever they are nested."""
    found, waiting = {}, [state]
    while waiting:
        held = waiting.pop()
        if id(held) in found:
            continue
        found[id(held)] = held
        if isinstance(held, Mapping):
            waiting += held.values()
        elif isinstance(held, list | tuple):
            waiting += held
        elif not isinstance(held, torch.Tensor):
            waiting += getattr(held, "__dict__", {}).values()
    return sum(h.numel() for h in found.values() if isinstance(h, torch.Tensor))


if __name__ == "__main__":
    serve(make, ("torch", "pytorch-optimizer"), peak_memory)
