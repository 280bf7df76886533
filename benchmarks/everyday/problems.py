"""The everyday problems: ordinary models on small data, each done in seconds.

Constants of the default may have been chosen on any but those that are kept apart.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from benchmarks.everyday import data, models
from benchmarks.everyday.problem import Problem, in_linen, in_nnx
from benchmarks.networks import softmax_cross_entropy as classes


def binary(logits: Any, labels: jax.Array) -> jax.Array:
    """The cross-entropy of yes and no, the mean over all labels."""
    return optax.sigmoid_binary_cross_entropy(logits, labels).mean()


def squared(outputs: Any, targets: jax.Array) -> jax.Array:
    """The squared error, summed over outputs and averaged over examples."""
    return jnp.mean(jnp.sum((outputs - targets) ** 2, axis=-1))


def pixelwise(logits: Any, images: jax.Array) -> jax.Array:
    """The cross-entropy of pixels, summed over an image, averaged over images."""
    losses = optax.sigmoid_binary_cross_entropy(logits, images)
    return jnp.mean(jnp.sum(losses, axis=(1, 2, 3)))


def l2(params: Any) -> jax.Array:
    """What Flax's own ImageNet example adds: of all that is no vector."""
    leaves = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
    return 0.5 * 1e-4 * jnp.asarray(sum(jnp.sum(leaf**2) for leaf in leaves))


def problems() -> list[Problem]:
    """All of them, those kept apart last."""
    digits, text = data.digits(), data.text(32)
    characters = 1 + max(int(part[0].max()) for part in text)
    dense = partial(models.MLP, (64, 64, 10))
    with_images = (digits.train[0], digits.train[0]), (digits.valid[0], digits.valid[0])
    return [
        in_linen("digits, batch 8", dense(), classes, digits, batch_size=8, steps=600),
        in_linen(
            "digits, batch 32", dense(), classes, digits, batch_size=32, steps=400
        ),
        in_linen(
            "digits, batch 256", dense(), classes, digits, batch_size=256, steps=150
        ),
        in_linen(
            "mislabelled digits",
            models.MLP((32, 32, 10)),
            classes,
            data.mislabelled_digits(),
            batch_size=16,
            steps=500,
        ),
        in_linen(
            "breast cancer, unscaled",
            models.MLP((32, 32, 1)),
            binary,
            data.breast_cancer(),
            batch_size=32,
            steps=400,
        ),
        in_linen(
            "diabetes, unscaled",
            models.MLP((32, 32, 1)),
            squared,
            data.diabetes(),
            batch_size=32,
            steps=400,
        ),
        in_linen(
            "teacher of relus",
            models.MLP((64, 64, 4)),
            squared,
            data.teacher(),
            batch_size=64,
            steps=400,
        ),
        in_linen(
            "modular addition",
            models.PairNetwork(23),
            classes,
            data.sums(23),
            batch_size=64,
            steps=400,
        ),
        in_linen(
            "20 narrow layers",
            models.MLP((*20 * (24,), 10)),
            classes,
            digits,
            batch_size=64,
            steps=300,
        ),
        in_linen(
            "separable",
            models.MLP((32, 1)),
            binary,
            data.separable(),
            batch_size=32,
            steps=800,
        ),
        in_linen(
            "zero branches, L2",
            models.ResNet(),
            classes,
            digits,
            batch_size=64,
            steps=200,
            penalty=l2,
            normalizes=True,
        ),
        in_linen(
            "convolutions",
            models.ConvNet(),
            classes,
            digits,
            batch_size=64,
            steps=200,
            normalizes=True,
        ),
        in_linen(
            "GPT", models.GPT(characters), classes, text, batch_size=16, steps=300
        ),
        in_nnx("ViT", models.ViT, classes, digits, batch_size=64, steps=250),
        in_nnx("mixer", models.Mixer, classes, digits, batch_size=64, steps=250),
        in_linen(
            "diffusion",
            models.MLP((64, 64, 64, 2), nn.silu),
            squared,
            data.diffused(),
            batch_size=128,
            steps=400,
        ),
        in_linen(
            "pixels to 255",
            models.MLP((64, 64, 2)),
            classes,
            data.patches(),
            batch_size=32,
            steps=400,
        ),
        in_linen(
            "wine, unscaled",
            models.MLP((32, 32, 3), nn.gelu),
            classes,
            data.wine(),
            batch_size=16,
            steps=400,
            apart=True,
        ),
        in_linen(
            "Friedman",
            models.MLP((64, 64, 64, 1), nn.tanh),
            squared,
            data.friedman(),
            batch_size=32,
            steps=400,
            apart=True,
        ),
        in_linen(
            "noisy moons",
            models.MLP((32, 32, 32, 1), nn.elu),
            binary,
            data.noisy_moons(),
            batch_size=16,
            steps=600,
            apart=True,
        ),
        in_linen(
            "convolutional autoencoder",
            models.ConvAutoencoder(),
            pixelwise,
            data.Data(*with_images),
            batch_size=64,
            steps=200,
            apart=True,
        ),
        in_linen(
            "dilated text",
            models.DilatedText(characters),
            classes,
            text,
            batch_size=16,
            steps=300,
            apart=True,
        ),
    ]
