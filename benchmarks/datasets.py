"""Images for the autoencoder benchmark: generated, read from IDX files, or fetched."""

import gzip
import struct
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

NAMES = ("curves", "mnist", "fashion_mnist")
_SIDE = 28


class Images(NamedTuple):
    """Images as rows of pixels in [0, 1]."""

    train: np.ndarray
    test: np.ndarray


def load(name: str, data_dir: Path | None = None, size: int | None = None) -> Images:
    """Loads a data set by name.

    Args:
      name: one of `NAMES`.
      data_dir: where the IDX files are; None fetches them from OpenML, once.
      size: how many training images; None for all (20,000 for `curves`).

    Raises:
      ValueError: if the name is unknown or a file is not what it should be.
    """
    if name == "curves":
        size = 20_000 if size is None else size
        images = curves(jax.random.key(0), size + 5_000)
        return Images(images[:size], images[size:])
    if name not in NAMES:
        raise ValueError(f"Unknown data set {name!r}. Known: {', '.join(NAMES)}.")
    images = _fetch(name) if data_dir is None else _read_folder(data_dir)
    return Images(images.train[:size], images.test)


def curves(key: jax.Array, count: int) -> np.ndarray:
    """Antialiased curves of 28 × 28 pixels, each through three random points.

    A curve is the parabola through three points drawn uniformly from the image less
    a margin of 4 pixels, at the times 0, ½ and 1. A pixel's value falls linearly from
    1 to 0 as its distance to the curve grows from 0.5 to 1.5 pixels.

    Args:
      key: the random key; the same key gives the same images.
      count: how many.

    Returns:
      An array of shape (count, 784), float32, in [0, 1].
    """
    keys = jax.random.split(key, count)
    batches = [keys[i : i + 1000] for i in range(0, count, 1000)]
    return np.concatenate([np.asarray(_draw(batch)) for batch in batches])


@jax.jit
@partial(jax.vmap, in_axes=0)
def _draw(key: jax.Array) -> Float[Array, "784"]:
    start, middle, end = jax.random.uniform(key, (3, 2), minval=4.0, maxval=_SIDE - 5.0)
    time = jnp.linspace(0.0, 1.0, 33)[:, None]
    line = (
        start * (1 - time) * (1 - 2 * time)
        + middle * 4 * time * (1 - time)
        + end * time * (2 * time - 1)
    )
    pixels = jnp.stack(jnp.mgrid[:_SIDE, :_SIDE], axis=-1).reshape(-1, 1, 2)
    origin, along = line[:-1], line[1:] - line[:-1]
    squared = jnp.maximum(jnp.sum(along**2, axis=-1), 1e-12)
    share = jnp.clip(jnp.sum((pixels - origin) * along, axis=-1) / squared, 0, 1)
    nearest = origin + share[..., None] * along
    distance = jnp.sqrt(jnp.min(jnp.sum((pixels - nearest) ** 2, axis=-1), axis=-1))
    return jnp.clip(1.5 - distance, 0.0, 1.0)


def read_idx(path: Path) -> np.ndarray:
    """Reads an IDX file of unsigned bytes, plain or compressed with gzip.

    Raises:
      ValueError: if the file is truncated, too long or no IDX file of bytes.
    """
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError) as error:
            raise ValueError(f"{path}: broken gzip file: {error}.") from error
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise ValueError(
            f"{path}: no IDX file of unsigned bytes: it starts with {raw[:4].hex()!r}, "
            "expected '000008' and the number of axes."
        )
    axes = raw[3]
    header = 4 + 4 * axes
    if len(raw) < header:
        raise ValueError(f"{path}: truncated in its header, after {len(raw)} bytes.")
    shape = struct.unpack(f">{axes}I", raw[4:header])
    size = int(np.prod(shape))
    if len(raw) - header != size:
        raise ValueError(
            f"{path}: holds {len(raw) - header} bytes of data, expected {size} for the "
            f"shape {shape} in its header."
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def _read_folder(folder: Path) -> Images:
    return Images(*(_read_images(folder, part) for part in ("train", "t10k")))


def read_labels(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The labels of the training and the test images, from IDX files."""
    train, test = (
        read_idx(_find(folder, f"{part}-labels-idx1-ubyte")).astype(np.int32)
        for part in ("train", "t10k")
    )
    return train, test


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            return path
    raise ValueError(f"{folder}: neither {name} nor {name}.gz is there.")


def _read_images(folder: Path, part: str) -> np.ndarray:
    path = _find(folder, f"{part}-images-idx3-ubyte")
    images = read_idx(path)
    if images.ndim != 3 or images.shape[1:] != (_SIDE, _SIDE):
        raise ValueError(
            f"{path}: holds an array of shape {images.shape}, expected images of "
            f"{_SIDE} × {_SIDE}."
        )
    return images.reshape(len(images), -1).astype(np.float32) / 255


def _fetch(name: str) -> Images:
    """Fetches from OpenML and caches, as scikit-learn does."""
    from sklearn.datasets import fetch_openml

    title = {"mnist": "mnist_784", "fashion_mnist": "Fashion-MNIST"}[name]
    try:
        pixels = fetch_openml(title, version=1, as_frame=False, parser="liac-arff").data
    except OSError as error:
        raise ValueError(
            f"{name} could not be fetched from OpenML ({error}). Give the folder with "
            "its IDX files as --data-dir."
        ) from error
    images = pixels.astype(np.float32) / 255
    return Images(images[:60_000], images[60_000:])
