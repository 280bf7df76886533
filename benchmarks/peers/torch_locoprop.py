r"""The PyTorch package `locoprop` 0.1.0 on the deep autoencoder.

A peer of `locoprop_m`. Its environment holds torch, locoprop and numpy.

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
- Without `total_steps` the rate is constant from step to step; with it, it is warmed up
  over 5 % of them and then decays to zero, from outside.
"""

from functools import partial
from typing import Any

import torch
from locoprop import LocoLayer, LocopropTrainer
from protocol import Arrays, Trainer, rate_at, serve
from torch import nn
from torch_network import (
    images_of,
    linear_layers,
    loss_of,
    peak_memory,
    reconstruction_loss,
)

RMSPROP = {"lr": 1e-5, "alpha": 0.9, "momentum": 0.999, "eps": 1e-5}


TRANSFERS = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "identity": nn.Identity,
    "logits": nn.Sigmoid,
}


def autoencoder(arrays: Arrays) -> nn.Sequential:
    """The network, the transfer function of each layer within it."""
    return nn.Sequential(
        *(
            LocoLayer(linear, TRANSFERS[after](), implicit=after == "logits")
            for linear, after in linear_layers(arrays)
        )
    )


def make(arrays: Arrays, settings: dict[str, Any]) -> Trainer:
    """The package's trainer with the settings of `locoprop_m` and a `correction`."""
    torch.set_num_threads(settings.get("threads", 2))
    model = autoencoder(arrays)
    rate, done = settings.get("learning_rate", RMSPROP["lr"]), 0
    trainer = LocopropTrainer(
        model,
        reconstruction_loss,
        optimizer_class=torch.optim.RMSprop,
        optimizer_hparams=RMSPROP,
        learning_rate=settings.get("activation_learning_rate", 10),
        local_iterations=settings.get("num_local_steps", 10),
        correction=settings.get("correction", 0.1),
    )

    def step(images: torch.Tensor) -> float:
        nonlocal done
        for optimizer in trainer.opts:
            now = rate * rate_at(done, settings.get("total_steps"))
            optimizer.param_groups[0]["lr"] = now
        done += 1
        return trainer.step(images, images).item()

    # Of RMSProp, second moments and momentum for each parameter.
    return Trainer(images_of, step, partial(loss_of, model), lambda: 2.0)


if __name__ == "__main__":
    serve(make, ("torch", "locoprop"), peak_memory)
