"""Small data that packages ship, or that a few lines generate."""

from functools import cache
from pydoc_data.topics import topics

import numpy as np
from sklearn import datasets

from benchmarks.everyday.problem import Data


def parted(*arrays: np.ndarray, seed: int = 0) -> Data:
    """Four fifths of the rows to learn from, in an order drawn from the seed."""
    rows = np.random.default_rng(seed).permutation(len(arrays[0]))
    ends = round(0.8 * len(rows))
    train, valid = (tuple(a[part] for a in arrays) for part in np.split(rows, [ends]))
    return Data(train, valid)


@cache
def digits(largest: float = 1.0) -> Data:
    """Images of 8 × 8 pixels from 0 to the largest, and their classes."""
    images, labels = datasets.load_digits(return_X_y=True)
    pixels = (largest / 16 * images).astype(np.float32).reshape(-1, 8, 8, 1)
    return parted(pixels, labels.astype(np.int32))


@cache
def mislabelled_digits() -> Data:
    """As `digits`, but a fifth of the classes, all in all, are drawn anew."""
    images, labels = (np.concatenate(parts) for parts in zip(*digits(), strict=True))
    rng = np.random.default_rng(1)
    drawn = np.where(rng.random(len(labels)) < 0.2, rng.permutation(labels), labels)
    return parted(images, drawn)


@cache
def breast_cancer() -> Data:
    """Measurements as they are, up to 4254, and whether a tumor is benign."""
    measured, benign = datasets.load_breast_cancer(return_X_y=True)
    return parted(measured.astype(np.float32), benign.astype(np.float32)[:, None])


@cache
def diabetes() -> Data:
    """Measurements and the progress of a disease as they are, from 25 to 346."""
    measured, progress = datasets.load_diabetes(return_X_y=True, scaled=False)
    return parted(measured.astype(np.float32), progress.astype(np.float32)[:, None])


@cache
def wine() -> Data:
    """Measurements as they are, up to 1680, and three classes."""
    measured, classes = datasets.load_wine(return_X_y=True)
    return parted(measured.astype(np.float32), classes.astype(np.int32))


@cache
def patches(side: int = 8, count: int = 1500) -> Data:
    """Patches of two photographs, pixels from 0 to 255, and which they are of."""
    images = datasets.load_sample_images().images
    rng = np.random.default_rng(0)
    found = []
    for image in images:
        tops, lefts = (rng.integers(0, n - side, count) for n in image.shape[:2])
        found += [
            image[top : top + side, left : left + side].ravel()
            for top, left in zip(tops, lefts, strict=True)
        ]
    labels = np.repeat(np.arange(len(images)), count)
    return parted(np.array(found, np.float32), labels.astype(np.int32))


@cache
def text(context: int, size: int = 100_000) -> Data:
    """Windows of Python's own manual, and the characters that follow each."""
    manual = "\n".join(topics[name] for name in sorted(topics))[:size]
    _, codes = np.unique(list(manual), return_inverse=True)
    codes, count = codes.astype(np.int32), (len(manual) - 1) // context
    before, after = (codes[i : i + count * context] for i in (0, 1))
    return parted(before.reshape(count, -1), after.reshape(count, -1))


@cache
def teacher() -> Data:
    """What a network of relus with random weights makes of normal inputs."""
    rng = np.random.default_rng(0)
    x = h = rng.normal(size=(2500, 16))
    for width in (32, 32):
        h = np.maximum(h @ rng.normal(size=(h.shape[1], width)), 0)
        h *= np.sqrt(2 / h.shape[1])
    y = h @ rng.normal(size=(32, 4)) / np.sqrt(32)
    return parted(x.astype(np.float32), y.astype(np.float32))


@cache
def sums(modulus: int = 23) -> Data:
    """All pairs of numbers below the modulus, and their sums by it."""
    pairs = np.stack(np.divmod(np.arange(modulus**2), modulus), axis=1)
    return parted(
        pairs.astype(np.int32), (pairs.sum(axis=1) % modulus).astype(np.int32)
    )


@cache
def separable() -> Data:
    """Normal inputs, and the side of a plane that they are on, none close to it."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1200, 10)).astype(np.float32)
    side = x.sum(axis=1) / np.sqrt(10)
    far = np.abs(side) > 0.3
    return parted(x[far], (side[far] > 0).astype(np.float32)[:, None])


@cache
def noisy_moons() -> Data:
    """Points of two half circles; a fifth of the labels are drawn anew."""
    points, labels = datasets.make_moons(1500, noise=0.1, random_state=0)
    rng = np.random.default_rng(0)
    drawn = np.where(rng.random(1500) < 0.2, rng.integers(0, 2, 1500), labels)
    return parted(points.astype(np.float32), drawn.astype(np.float32)[:, None])


@cache
def friedman() -> Data:
    """Friedman's first function of ten uniform inputs, with noise."""
    x, y = datasets.make_friedman1(1500, noise=0.5, random_state=0)
    return parted(x.astype(np.float32), y.astype(np.float32)[:, None])


@cache
def diffused() -> Data:
    """Points of two half circles with noise at random times, and the noise.

    The time is given as waves. At time τ a point has the share cos(π τ / 2).
    """
    count = 20_000
    points, _ = datasets.make_moons(count, noise=0.05, random_state=0)
    rng = np.random.default_rng(0)
    noise, times = rng.normal(size=points.shape), rng.random((count, 1))
    angle = np.pi / 2 * times
    seen = np.cos(angle) * points + np.sin(angle) * noise
    waves = [wave(2**k * angle) for k in range(4) for wave in (np.sin, np.cos)]
    inputs = np.concatenate([seen, *waves], axis=1)
    return parted(inputs.astype(np.float32), noise.astype(np.float32))


def _values(states: np.ndarray) -> np.ndarray:
    """What four actions are worth in each state, by a random network."""
    rng = np.random.default_rng(1)
    hidden = np.tanh(states @ rng.normal(size=(states.shape[1], 32)))
    return hidden @ rng.normal(size=(32, 4)) / np.sqrt(32)


def _experience() -> tuple[np.random.Generator, np.ndarray, np.ndarray]:
    """A generator, and the first that it draws: states, and actions, evenly."""
    rng = np.random.default_rng(0)
    return rng, rng.normal(size=(2000, 6)), rng.integers(0, 4, 2000)


@cache
def states() -> Data:
    """Normal states."""
    _, x, _ = _experience()
    return parted(x.astype(np.float32))


@cache
def advantages() -> Data:
    """States, actions, and how much better than the mean these are."""
    rng, x, actions = _experience()
    values = _values(x)
    gained = values[np.arange(2000), actions] - values.mean(axis=1)
    noisy = gained + 0.2 * rng.normal(size=2000)
    scaled = (noisy / noisy.std()).astype(np.float32)
    return parted(x.astype(np.float32), actions.astype(np.int32), scaled)


@cache
def returns() -> Data:
    """States, actions, and rewards with the values of what follows."""
    rng, x, actions = _experience()
    rewards = 3 * _values(x)[np.arange(2000), actions]
    after = x + 0.3 * rng.normal(size=x.shape)
    targets = (rewards + 0.9 * _values(after).max(axis=1)).astype(np.float32)
    return parted(x.astype(np.float32), actions.astype(np.int32), targets)


@cache
def square() -> Data:
    """Pairs of points, inside the unit square and on its boundary."""
    rng = np.random.default_rng(0)
    inside, around = rng.random((2, 2000, 2))
    side = rng.integers(0, 4, 2000)
    around[np.arange(2000), side % 2] = side // 2
    return parted(np.stack([inside, around], axis=1).astype(np.float32))


@cache
def communities() -> Data:
    """Graphs of two groups, as means over neighbours, noisy features, the group."""
    rng = np.random.default_rng(0)
    count, nodes = 400, 24
    groups = rng.integers(0, 2, (count, nodes))
    alike = groups[:, :, None] == groups[:, None, :]
    drawn = np.triu(rng.random(alike.shape) < np.where(alike, 0.4, 0.15), 1)
    links = drawn + drawn.transpose(0, 2, 1) + np.eye(nodes)
    means = links / links.sum(axis=2, keepdims=True)
    features = rng.normal(size=(count, nodes, 4)) + 0.5 * (2 * groups[..., None] - 1)
    graphs = np.concatenate([means, features], axis=2).astype(np.float32)
    return parted(graphs, groups.astype(np.int32))


@cache
def views() -> Data:
    """Two noisy views of each digit."""
    images = np.concatenate([part[0] for part in digits()]).reshape(-1, 1, 64)
    noise = np.random.default_rng(0).normal(size=(len(images), 2, 64))
    return parted((images + 0.3 * noise).astype(np.float32))
