"""A small residual network with batch normalization in Linen, on images of digits."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import optax

import locoprop_optax as loco
from examples import _training


class Block(nn.Module):
    """Two convolutions and a way around them.

    Attributes:
      features: the number of output channels.
      stride: of the first convolution and of the way around.
    """

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """From features to features."""
        conv = partial(nn.Conv, self.features, use_bias=False)
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        h = nn.relu(norm()(conv((3, 3), self.stride)(x)))
        h = norm()(conv((3, 3))(h))
        if x.shape != h.shape:
            x = norm()(conv((1, 1), self.stride)(x))
        return nn.relu(x + h)


class ResNet(nn.Module):
    """A stem, three blocks and a linear classifier.

    Attributes:
      width: the number of channels after the stem.
    """

    width: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """From images to the logits of their classes."""
        x = nn.Conv(self.width, (3, 3), 2, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(not train, momentum=0.9)(x))
        for features, stride in ((1, 1), (2, 2), (2, 1)):
            x = Block(features * self.width, stride)(x, train)
        return nn.Dense(10)(x.mean((1, 2)))


class State(loco.linen.TrainState):
    """The state of training with the statistics of batch normalization."""

    batch_stats: Any


def optimizers(
    steps: int, layers: loco.Layers
) -> dict[str, optax.GradientTransformation]:
    """AdamW with its best rate of those we tried, and LocoProp with nothing set."""
    return {
        "AdamW": optax.adamw(_training.warm_up_and_decay(6e-2, steps)),
        "LocoProp": loco.locoprop(layers),
    }


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over the batch."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def training_loss(apply_fn, params, batch_stats, images, labels):
    """The loss with the statistics of the batch, and the running ones after it."""
    variables = {"params": params, "batch_stats": batch_stats}
    logits, updated = apply_fn(variables, images, train=True, mutable=["batch_stats"])
    return cross_entropy(logits, labels), updated


@partial(jax.jit, static_argnames="layers")
def train_step(state, images, labels, layers: loco.Layers):
    """One step; AdamW has no use for the intermediates, and ignores them."""
    loss_fn = partial(training_loss, state.apply_fn)
    capture = loco.value_and_grad(loss_fn, layers, has_aux=True)
    (loss, updated), grads, intermediates = capture(
        state.params, state.batch_stats, images, labels
    )
    state = state.apply_gradients(grads=grads, intermediates=intermediates, **updated)
    return state, {"loss": loss}


@jax.jit
def evaluate(state, images, labels):
    """The loss with the running statistics."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = state.apply_fn(variables, images, train=False)
    return {"loss": cross_entropy(logits, labels)}


def main(arguments: Sequence[str] | None = None) -> dict[str, _training.Outcome]:
    """Trains with each optimizer."""
    options = _training.parse(__doc__, arguments, steps=200, batch_size=128, width=8)
    data = _training.labeled_images(options.data_dir)
    model = ResNet(options.width)
    batch = [part[:2] for part in data.train]
    variables = model.init(jax.random.key(0), batch[0], train=False)
    find_layers = loco.layers(partial(training_loss, model.apply), has_aux=True)
    layers = find_layers(variables["params"], variables["batch_stats"], *batch)
    states = {
        name: State.create(apply_fn=model.apply, tx=tx, **variables)
        for name, tx in optimizers(options.steps, layers).items()
    }
    step = partial(train_step, layers=layers)
    return _training.compare(states, step, evaluate, data, options)


if __name__ == "__main__":
    main()
