"""The everyday problems: ordinary models on small data, each done in seconds.

Constants of the default may have been chosen on any but those that are kept apart.
"""

from functools import partial

import flax.linen as nn

from benchmarks.everyday import costs, data, models
from benchmarks.everyday.problem import Problem, in_linen, in_nnx
from benchmarks.networks import softmax_cross_entropy as classes


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
            costs.binary,
            data.breast_cancer(),
            batch_size=32,
            steps=400,
        ),
        in_linen(
            "diabetes, unscaled",
            models.MLP((32, 32, 1)),
            costs.squared,
            data.diabetes(),
            batch_size=32,
            steps=400,
        ),
        in_linen(
            "teacher of relus",
            models.MLP((64, 64, 4)),
            costs.squared,
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
            costs.binary,
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
            penalty=costs.l2,
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
            costs.squared,
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
            "rows by an LSTM",
            models.RowReader(),
            classes,
            digits,
            batch_size=64,
            steps=250,
        ),
        in_linen(
            "tied GPT",
            models.GPT(characters, tied=True),
            classes,
            text,
            batch_size=16,
            steps=300,
        ),
        in_linen(
            "variational autoencoder",
            models.VAE(),
            costs.evidence,
            data.Data(*with_images),
            batch_size=64,
            steps=300,
        ),
        in_linen(
            "PPO",
            models.MLP((64, 64, 4), nn.tanh),
            costs.proximal,
            data.advantages(),
            batch_size=64,
            steps=400,
        ),
        in_linen(
            "DQN",
            models.MLP((64, 64, 4)),
            costs.temporal,
            data.returns(),
            batch_size=64,
            steps=400,
        ),
        in_linen(
            "Poisson, informed by physics",
            models.Poisson(),
            costs.residuals,
            data.square(),
            batch_size=64,
            steps=400,
        ),
        in_linen(
            "graph convolutions",
            models.GraphConvolutions(),
            classes,
            data.communities(),
            batch_size=16,
            steps=300,
            apart=True,
        ),
        in_linen(
            "DDPG's actor",
            models.JudgedActor(),
            costs.judged,
            data.states(),
            batch_size=64,
            steps=400,
            apart=True,
        ),
        in_linen(
            "InfoNCE",
            models.Encoder(),
            costs.contrastive,
            data.views(),
            batch_size=64,
            steps=300,
            apart=True,
        ),
        in_linen(
            "quantiles",
            models.MLP((64, 64, 3)),
            costs.quantiles,
            data.friedman(),
            batch_size=32,
            steps=400,
            apart=True,
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
            costs.squared,
            data.friedman(),
            batch_size=32,
            steps=400,
            apart=True,
        ),
        in_linen(
            "noisy moons",
            models.MLP((32, 32, 32, 1), nn.elu),
            costs.binary,
            data.noisy_moons(),
            batch_size=16,
            steps=600,
            apart=True,
        ),
        in_linen(
            "convolutional autoencoder",
            models.ConvAutoencoder(),
            costs.pixelwise,
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
