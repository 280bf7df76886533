import gzip
import struct

import jax
import numpy as np
import pytest

from benchmarks import datasets


def idx_bytes(images):
    return b"\x00\x00\x08\x03" + struct.pack(">3I", *images.shape) + images.tobytes()


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (5, 28, 28)).astype(np.uint8)


def test_curves_are_images_that_repeat_with_their_key():
    images = datasets.curves(jax.random.key(0), 40)
    assert images.shape == (40, 784)
    assert images.dtype == np.float32
    assert images.min() == 0
    assert images.max() == 1
    np.testing.assert_array_equal(images, datasets.curves(jax.random.key(0), 40))
    assert not np.array_equal(images, datasets.curves(jax.random.key(1), 40))


def test_curves_are_antialiased_and_pass_through_their_points():
    key = jax.random.key(3)
    image = datasets.curves(key, 1).reshape(28, 28)
    assert np.any((image > 0) & (image < 1))
    points = jax.random.uniform(
        jax.random.split(key, 1)[0], (3, 2), minval=4.0, maxval=23.0
    )
    for row, column in np.round(np.asarray(points)).astype(int):
        assert image[row, column] > 0.5


@pytest.mark.parametrize("compress", [False, True])
def test_idx_files_plain_and_compressed(tmp_path, images, compress):
    for part in ("train", "t10k"):
        name = f"{part}-images-idx3-ubyte" + ".gz" * compress
        raw = idx_bytes(images)
        (tmp_path / name).write_bytes(gzip.compress(raw) if compress else raw)
    loaded = datasets.load("mnist", tmp_path, 3)
    np.testing.assert_allclose(loaded.test, images.reshape(5, 784) / 255, rtol=1e-6)
    assert loaded.train.shape == (3, 784)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda raw: raw[:-1], r"holds 3919 bytes of data, expected 3920"),
        (lambda raw: raw + b"x", r"holds 3921 bytes of data, expected 3920"),
        (lambda raw: raw[:7], r"truncated in its header, after 7 bytes"),
        (lambda raw: b"\x00\x00\x0d" + raw[3:], r"starts with '00000d03'"),
        (lambda raw: b"", r"no IDX file"),
        (lambda raw: gzip.compress(raw)[:-9], r"broken gzip file"),
    ],
)
def test_damaged_files_are_named(tmp_path, images, damage, match):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(damage(idx_bytes(images)))
    with pytest.raises(ValueError, match=f"{path.name}: .*{match}"):
        datasets.read_idx(path)


def test_missing_and_wrong_files(tmp_path, images):
    with pytest.raises(ValueError, match=r"neither train-images-idx3-ubyte nor"):
        datasets.load("mnist", tmp_path)
    small = images[:, :8, :8].copy()
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(small))
    with pytest.raises(ValueError, match=r"shape \(5, 8, 8\), expected images of 28"):
        datasets.load("mnist", tmp_path)


def test_unknown_name():
    with pytest.raises(ValueError, match=r"'minst'\. Known: curves, mnist, fashion"):
        datasets.load("minst")
