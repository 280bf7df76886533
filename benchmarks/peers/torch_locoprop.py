r"""The PyTorch package `locoprop` 0.1.0 on the deep autoencoder, driven over stdin.

A peer of `locoprop_m` that runs in an environment of its own, with torch, locoprop
and numpy. From a file of weights and batches it trains as many steps as each line
{"steps": 3} on its input asks for, and answers each with one line,
{"seconds": [...], "losses": [...]}, the losses those before each step.

The settings are the defaults of `locoprop_m`: matching losses, the tanh's, the code's
identity and the logits' sigmoid; γ = 10; 10 local steps whose size falls linearly to
a quarter; RMSProp with rate 1e-5, decay 0.9, momentum 0.999 and epsilon 1e-5. What the
package does differently, and is left as it is:

- The local loss is a mean over the n examples, on top of the mean in the
  backpropagated loss: local gradients are 1/n of ours. RMSProp undoes that but for its
  epsilon, which is n times as large on our scale.
- RMSProp is PyTorch's: epsilon is added to the root, second moments start at 0, and
  the momentum holds unscaled steps, which the present rate multiplies. Ours is that of
  TensorFlow 1: epsilon inside the root, a start at 1, momentum of scaled steps.
- The first local step is not free. A layer takes its share of the pass forward and
  back, whose weight gradients are discarded, one more pass forward for the target, and
  one forward and back to the weights for each of the 10 local steps; ours takes 9.
- Layers are solved in turn, each with an optimizer of its own. After each, `correction`
  c > 0 (the package's default: 0.1) takes one more pass forward and moves the next
  layer's input towards the new output, by at most c √width in the norm of the whole
  batch; the next target starts from there. With c = 0 inputs stay, as they do in ours.
- The rate is constant from step to step; there is no schedule.
"""

import argparse
import itertools
import json
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from locoprop import LocoLayer, LocopropTrainer
from torch import nn

LAYERS = 8
CODE = 3
RMSPROP = {"lr": 1e-5, "alpha": 0.9, "momentum": 0.999, "eps": 1e-5}


def autoencoder(weights: Mapping[str, np.ndarray]) -> nn.Sequential:
    """The network: tanh between dense layers, but for a linear code, to logits.

    Args:
      weights: `kernel_i` of shape (inputs, outputs) and `bias_i` of each layer.
    """
    model = nn.Sequential()
    for i in range(LAYERS):
        kernel = torch.from_numpy(weights[f"kernel_{i}"])
        linear = nn.Linear(*kernel.shape)
        with torch.no_grad():
            linear.weight.copy_(kernel.T)
            linear.bias.copy_(torch.from_numpy(weights[f"bias_{i}"]))
        if i == LAYERS - 1:
            model.append(LocoLayer(linear, nn.Sigmoid(), implicit=True))
        else:
            model.append(LocoLayer(linear, nn.Identity() if i == CODE else nn.Tanh()))
    return model


def reconstruction_loss(logits: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Sigmoid cross-entropy, summed over pixels and averaged over images."""
    losses = nn.functional.binary_cross_entropy_with_logits(
        logits, images, reduction="sum"
    )
    return losses / len(images)


def trainer_of(model: nn.Sequential, correction: float) -> LocopropTrainer:
    """The package's trainer with the settings of `locoprop_m`."""
    return LocopropTrainer(
        model,
        reconstruction_loss,
        optimizer_class=torch.optim.RMSprop,
        optimizer_hparams=RMSPROP,
        learning_rate=10,
        local_iterations=10,
        correction=correction,
    )


def train(
    trainer: LocopropTrainer, batches: Iterator[torch.Tensor], steps: int
) -> dict[str, list[float]]:
    """The seconds of each step, and the loss before it."""
    seconds, losses = [], []
    for images in itertools.islice(batches, steps):
        began = time.perf_counter()
        loss = trainer.step(images, images)
        seconds.append(time.perf_counter() - began)
        losses.append(loss.item())
    return {"seconds": seconds, "losses": losses}


def answer(line: dict[str, Any]) -> None:
    """Writes one line of JSON, at once."""
    print(json.dumps(line), flush=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Trains the deep autoencoder with the PyTorch package locoprop.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--input", type=Path, required=True, help="kernel_i, bias_i, batches (npz)")
    add("--correction", type=float, default=0.1, help="of the next layer's input")
    add("--threads", type=int, default=2, help="the threads that torch uses")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Announces the versions, then answers each line of the input."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    with np.load(options.input) as arrays:
        model = autoencoder(arrays)
        batches = itertools.cycle(torch.from_numpy(arrays["batches"]))
    trainer = trainer_of(model, options.correction)
    versions = {name: version(name) for name in ("torch", "locoprop", "numpy")}
    versions["python"] = platform.python_version()
    answer({"versions": versions, "correction": options.correction})
    for line in sys.stdin:
        answer(train(trainer, batches, json.loads(line)["steps"]))


if __name__ == "__main__":
    main()
