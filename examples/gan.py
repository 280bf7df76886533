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


def optimizers(steps: int) -> dict[str, optax.GradientTransformation]:
    """AdamW and LocoProp, for both players alike."""
    schedule = partial(_training.warm_up_and_decay, steps=steps)
    return {
        "AdamW": optax.adamw(schedule(1e-3), b1=0.5),
        "LocoProp": loco.locoprop_momentum(
            schedule(0.1),
            target=loco.targets.normalized(0.05),
            solver=loco.solvers.majorized_newton(num_steps=2, damping=0.1),
            momentum=0.5,
            fallback=optax.adamw(schedule(1e-3), b1=0.5),
        ),
    }


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


def step_of(player: loco.linen.TrainState, loss_fn, *args):
    """One step of one player; AdamW ignores the intermediates."""
    capture = loco.linen.value_and_grad(loss_fn)
    loss, grads, intermediates = capture(player.params, *args)
    return player.apply_gradients(grads=grads, intermediates=intermediates), loss


def draw(seed: int, step: int | jax.Array, count: int) -> jax.Array:
    """Random codes."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.random.normal(key, (count, CODE))


@jax.jit
def train_step(players: Players, images: jax.Array):
    """One step of both players, each against the other as it was before."""
    generator, discriminator = players
    codes = draw(1, generator.step, len(images))
    generator, g_loss = step_of(generator, generator_loss, players, codes)
    discriminator, d_loss = step_of(
        discriminator, discriminator_loss, players, images, codes
    )
    losses = {"generator": g_loss, "discriminator": d_loss}
    return Players(generator, discriminator), losses


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
    inputs = draw(0, 0, 1), data.train[0][:1]
    states = {
        name: Players(*(start(m, x, tx) for m, x in zip(models, inputs, strict=True)))
        for name, tx in optimizers(options.steps).items()
    }
    return _training.compare(states, train_step, evaluate, data, options)


if __name__ == "__main__":
    main()
