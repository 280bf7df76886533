"""A small residual network with batch normalization in NNX, on images of digits."""

from collections.abc import Sequence
from functools import partial

import jax
import optax
from flax import nnx

import locoprop_optax as loco
from examples import _training


class ConvNorm(nnx.Module):
    """A convolution and the normalization of its output."""

    def __init__(self, inputs, outputs, size, stride, rngs):
        window = (size, size)
        self.conv = nnx.Conv(inputs, outputs, window, stride, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(outputs, momentum=0.9, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """From features to features."""
        return self.norm(self.conv(x))


class Block(nnx.Module):
    """Two convolutions and a way around them."""

    def __init__(self, inputs, outputs, stride, rngs):
        self.first = ConvNorm(inputs, outputs, 3, stride, rngs)
        self.second = ConvNorm(outputs, outputs, 3, 1, rngs)
        same = inputs == outputs and stride == 1
        self.around = None if same else ConvNorm(inputs, outputs, 1, stride, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """From features to features."""
        h = self.second(nnx.relu(self.first(x)))
        return nnx.relu(h + (x if self.around is None else self.around(x)))


class ResNet(nnx.Module):
    """A stem, three blocks and a linear classifier."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.stem = ConvNorm(1, width, 3, 2, rngs)
        shapes = (width, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1)
        self.blocks = nnx.List(Block(*shape, rngs) for shape in shapes)
        self.classifier = nnx.Linear(2 * width, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """From images to the logits of their classes."""
        x = nnx.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.classifier(x.mean((1, 2)))


def optimizers(
    steps: int, layers: loco.Layers
) -> dict[str, optax.GradientTransformation]:
    """AdamW with the rate of `resnet_linen`, and LocoProp with nothing set."""
    return {
        "AdamW": optax.adamw(_training.warm_up_and_decay(6e-2, steps)),
        "LocoProp": loco.locoprop(layers),
    }


def loss_fn(model: ResNet, images: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean cross-entropy over the batch."""
    logits = model(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@partial(nnx.jit, static_argnames="layers")
def train_step(state, images, labels, layers: loco.Layers):
    """One step; AdamW has no use for the intermediates, and ignores them."""
    model, optimizer = state
    capture = loco.nnx.value_and_grad(loss_fn, layers)
    loss, grads, intermediates = capture(model, images, labels)
    optimizer.update(model, grads, intermediates=intermediates)
    return state, {"loss": loss}


@nnx.jit
def evaluate(state, images, labels):
    """The loss with the running statistics."""
    model, _ = state
    return {"loss": loss_fn(nnx.view(model, use_running_average=True), images, labels)}


def start(width: int, tx: optax.GradientTransformation):
    """A model, always with the same weights, and its optimizer."""
    model = ResNet(width, nnx.Rngs(0))
    tx = optax.with_extra_args_support(tx)
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def main(arguments: Sequence[str] | None = None) -> dict[str, _training.Outcome]:
    """Trains with each optimizer."""
    options = _training.parse(__doc__, arguments, steps=200, batch_size=128, width=8)
    data = _training.labeled_images(options.data_dir)
    batch = [part[:2] for part in data.train]
    layers = loco.nnx.layers(loss_fn)(ResNet(options.width, nnx.Rngs(0)), *batch)
    states = {
        name: start(options.width, tx)
        for name, tx in optimizers(options.steps, layers).items()
    }
    step = partial(train_step, layers=layers)
    return _training.compare(states, step, evaluate, data, options)


if __name__ == "__main__":
    main()
