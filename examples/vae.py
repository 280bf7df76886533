"""A variational autoencoder in Linen, on images of digits.

The encoder has two outputs, and the loss draws from the normal distribution that they
describe. The loss is the negative evidence lower bound in nats an image.
"""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import locoprop_optax as loco
from examples import _training

CODE = 16


class Encoder(nn.Module):
    """From images to means and logarithms of variances of their codes.

    Attributes:
      width: of the hidden layers.
    """

    width: int

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """From images to the two parameters of their codes' distribution."""
        h = nn.tanh(nn.Dense(self.width)(images.reshape(len(images), -1)))
        h = nn.tanh(nn.Dense(self.width)(h))
        return nn.Dense(CODE, name="mean")(h), nn.Dense(CODE, name="log_variance")(h)


class Autoencoder(nn.Module):
    """An encoder, a random draw and a decoder.

    Attributes:
      width: of the hidden layers.
    """

    width: int

    @nn.compact
    def __call__(self, images: jax.Array, key: jax.Array) -> tuple[jax.Array, ...]:
        """From images to logits of the pixels, and the code's distribution."""
        mean, log_variance = Encoder(self.width, name="encoder")(images)
        noise = jax.random.normal(key, mean.shape)
        h = mean + jnp.exp(log_variance / 2) * noise
        h = nn.tanh(nn.Dense(self.width)(h))
        h = nn.tanh(nn.Dense(self.width)(h))
        logits = nn.Dense(28 * 28, name="logits")(h)
        return logits.reshape(images.shape), mean, log_variance


def optimizers(
    steps: int, layers: loco.Layers
) -> dict[str, optax.GradientTransformation]:
    """AdamW with its best rate of those we tried, and LocoProp with nothing set."""
    return {
        "AdamW": optax.adamw(_training.warm_up_and_decay(3e-3, steps)),
        "LocoProp": loco.locoprop(layers),
    }


def negative_bound(apply_fn, params, images, key) -> jax.Array:
    """Cross-entropy of the pixels plus divergence of the code, a mean over images."""
    logits, mean, log_variance = apply_fn({"params": params}, images, key)
    pixels = optax.sigmoid_binary_cross_entropy(logits, images)
    divergence = (mean**2 + jnp.exp(log_variance) - log_variance - 1) / 2
    return (jnp.sum(pixels) + jnp.sum(divergence)) / len(images)


@partial(jax.jit, static_argnames="layers")
def train_step(state, images, layers: loco.Layers):
    """One step; AdamW has no use for the intermediates, and ignores them."""
    key = jax.random.fold_in(jax.random.key(1), state.step)
    loss_fn = partial(negative_bound, state.apply_fn)
    capture = loco.value_and_grad(loss_fn, layers)
    loss, grads, intermediates = capture(state.params, images, key)
    state = state.apply_gradients(grads=grads, intermediates=intermediates)
    return state, {"loss": loss}


@jax.jit
def evaluate(state, images):
    """The same loss, with one draw an image."""
    key = jax.random.key(2)
    return {"loss": negative_bound(state.apply_fn, state.params, images, key)}


def main(arguments: Sequence[str] | None = None) -> dict[str, _training.Outcome]:
    """Trains with each optimizer."""
    options = _training.parse(__doc__, arguments, steps=300, batch_size=256, width=256)
    data = _training.images(options.data_dir)
    model = Autoencoder(options.width)
    key = jax.random.key(0)
    images = data.train[0][:1]
    params = model.init(key, images, key)["params"]
    layers = loco.layers(partial(negative_bound, model.apply))(params, images, key)
    create = partial(loco.linen.TrainState.create, apply_fn=model.apply, params=params)
    made = optimizers(options.steps, layers)
    states = {name: create(tx=tx) for name, tx in made.items()}
    step = partial(train_step, layers=layers)
    return _training.compare(states, step, evaluate, data, options)


if __name__ == "__main__":
    main()
