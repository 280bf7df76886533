"""A generative adversarial network in Linen, on images of digits.

The generator and the discriminator have losses, gradients and optimizers of their own.
The losses are those of two players in a game: each rises when the other player gets
better, so lower is not better. Losses near log 2 = 0.69 for the generator and
2 log 2 = 1.39 for the discriminator say that it cannot tell real from generated.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import locoprop_optax as loco
from examples import _training

CODE = 32


class Generator(nn.Module):
    """From codes to images."""

    width: int

    @nn.compact
    def __call__(self, codes: jax.Array) -> jax.Array:
        """Doubles the side of an image twice."""
        x = nn.relu(nn.Dense(7 * 7 * 2 * self.width)(codes))
        x = x.reshape(-1, 7, 7, 2 * self.width)
        x = nn.relu(nn.ConvTranspose(self.width, (4, 4), (2, 2))(x))
        return nn.sigmoid(nn.ConvTranspose(1, (4, 4), (2, 2))(x))


class Discriminator(nn.Module):
    """From images to the logits of their being real."""

    width: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Halves the side of an image twice."""
        x = nn.leaky_relu(nn.Conv(self.width, (4, 4), 2)(images), 0.2)
        x = nn.leaky_relu(nn.Conv(2 * self.width, (4, 4), 2)(x), 0.2)
        return nn.Dense(1)(x.reshape(len(x), -1))


class Players(NamedTuple):
    """The states of training of both."""

    generator: loco.linen.TrainState
    discriminator: loco.linen.TrainState


class PlayersLayers(NamedTuple):
    """The layers of both losses."""

    generator: loco.Layers
    discriminator: loco.Layers


def adamw(steps: int) -> optax.GradientTransformation:
    """For either player."""
    return optax.adamw(_training.warm_up_and_decay(1e-3, steps), b1=0.5)


def generator_loss(params, players: Players, codes: jax.Array) -> jax.Array:
    """How far the discriminator is from taking generated images for real."""
    generator, discriminator = players
    fake = generator.apply_fn({"params": params}, codes)
    logits = discriminator.apply_fn({"params": discriminator.params}, fake)
    return jnp.mean(nn.softplus(-logits))


def discriminator_loss(
    params, players: Players, images: jax.Array, codes: jax.Array
) -> jax.Array:
    """How far the discriminator is from telling real images from generated ones."""
    generator, discriminator = players
    fake = generator.apply_fn({"params": generator.params}, codes)
    judge = partial(discriminator.apply_fn, {"params": params})
    on_real, on_fake = nn.softplus(-judge(images)), nn.softplus(judge(fake))
    return jnp.mean(on_real) + jnp.mean(on_fake)


def step_of(player: loco.linen.TrainState, loss_fn, layers: loco.Layers, *args):
    """One step of one player; AdamW ignores the intermediates."""
    capture = loco.value_and_grad(loss_fn, layers)
    loss, grads, intermediates = capture(player.params, *args)
    return player.apply_gradients(grads=grads, intermediates=intermediates), loss


def draw(seed: int, step: int | jax.Array, count: int) -> jax.Array:
    """Random codes."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.random.normal(key, (count, CODE))


@partial(jax.jit, static_argnames="layers")
def train_step(players: Players, images: jax.Array, layers: PlayersLayers):
    """One step of both players, each against the other as it was before."""
    generator, discriminator = players
    codes = draw(1, generator.step, len(images))
    generator, g_loss = step_of(
        generator, generator_loss, layers.generator, players, codes
    )
    discriminator, d_loss = step_of(
        discriminator, discriminator_loss, layers.discriminator, players, images, codes
    )
    losses = {"generator": g_loss, "discriminator": d_loss}
    return Players(generator, discriminator), losses


def layers_of(players: Players, images: jax.Array, codes: jax.Array) -> PlayersLayers:
    """The layers of both losses, whatever the players' optimizers."""
    generator, discriminator = (player.params for player in players)
    return PlayersLayers(
        loco.layers(generator_loss)(generator, players, codes),
        loco.layers(discriminator_loss)(discriminator, players, images, codes),
    )


@jax.jit
def evaluate(players: Players, images: jax.Array):
    """Both losses, with new codes."""
    codes, params = draw(2, 0, len(images)), players.discriminator.params
    g_loss = generator_loss(players.generator.params, players, codes)
    d_loss = discriminator_loss(params, players, images, codes)
    return {"generator": g_loss, "discriminator": d_loss}


def start(model: nn.Module, inputs, tx: optax.GradientTransformation):
    """A player, always with the same weights."""
    params = model.init(jax.random.key(0), inputs)["params"]
    return loco.linen.TrainState.create(apply_fn=model.apply, params=params, tx=tx)


def main(arguments: Sequence[str] | None = None) -> dict[str, _training.Outcome]:
    """Trains with each optimizer."""
    options = _training.parse(__doc__, arguments, steps=200, batch_size=64, width=8)
    data = _training.images(options.data_dir)
    models = Generator(options.width), Discriminator(options.width)
    codes, images = inputs = draw(0, 0, 1), data.train[0][:1]
    baseline = Players(*map(start, models, inputs, 2 * [adamw(options.steps)]))
    layers = layers_of(baseline, images, codes)
    ours = (loco.locoprop(found) for found in layers)
    states = {
        "AdamW": baseline,
        "LocoProp": Players(*map(start, models, inputs, ours)),
    }
    step = partial(train_step, layers=layers)
    return _training.compare(states, step, evaluate, data, options)


if __name__ == "__main__":
    main()
