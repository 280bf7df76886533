"""The benchmarks of other models than the autoencoder, as commands."""

import gzip
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import ablation, cnn, networks, report, transformer, tune

LENGTH = ["--rounds", "2", "--round-steps", "3", "--batch-size", "4"]
TEXT = ["--width", "16", "--blocks", "1", "--context", "8"]
DIGITS = ["--channels", "8"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "input.txt").write_text("to be, or not to be: " * 40)
    rng = np.random.default_rng(0)
    for part, count in (("train", 16), ("t10k", 8)):
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        for name, array in (("images", pixels), ("labels", labels)):
            head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            path = tmp_path / f"{part}-{name}-idx{array.ndim}-ubyte.gz"
            path.write_bytes(gzip.compress(head + array.tobytes()))
    return tmp_path


@pytest.mark.parametrize(
    ("module", "size"),
    [
        pytest.param(transformer, TEXT, id="transformer", marks=pytest.mark.slow),
        pytest.param(cnn, DIGITS, id="cnn", marks=pytest.mark.slow),
    ],
)
def test_the_whole_command_with_what_was_tuned(module, size, folder):
    name, optimizers = module.BENCHMARK.name, ["adamw", "locoprop_and_adamw"]
    where = ["--data-dir", str(folder), "--output", str(folder), *size]
    trial = ["--trials", "1", "--steps", "3", "--batch-size", "4"]
    tune.main([name, *where, *trial, "--optimizers", "adamw"])
    tuned = folder / f"tuned_{name}.json"
    chosen = json.loads(tuned.read_text())
    length = [*LENGTH, "--optimizers", *optimizers]
    module.main([*where, *length, "--settings", str(tuned)])
    results = report.read_results(folder / f"{name}.jsonl")
    assert [r["optimizer"] for r in results] == optimizers
    for result in results:
        assert "error" not in result
        assert [point["steps"] for point in result["curve"]] == [0, 3, 6]
        last = result["curve"][-1]
        assert np.isfinite([last["train_loss"], last["test_loss"]]).all()
    assert results[0]["settings"]["tuned"] == chosen["adamw"]["settings"]
    assert (folder / f"{name}.png").stat().st_size > 10_000
    assert "6 steps" in report.title(results)
    assert "step 3" in report.milestones(results)


def test_the_transformer_does_not_look_ahead():
    model = networks.Transformer(5, width=8, blocks=2, heads=2)
    text = jnp.asarray([[0, 1, 2, 3, 4, 0]])
    params = model.init(jax.random.key(0), text)
    before = model.apply(params, text)
    after = model.apply(params, text.at[0, 3].set(0))
    np.testing.assert_allclose(before[:, :3], after[:, :3], atol=1e-6)
    assert not np.allclose(before[:, 3:], after[:, 3:], atol=1e-6)


def test_each_target_is_the_next_character():
    examples = transformer.windows(np.arange(11), context=3)
    np.testing.assert_array_equal(examples.inputs, np.arange(9).reshape(3, 3))
    np.testing.assert_array_equal(examples.targets, 1 + np.arange(9).reshape(3, 3))


def test_a_folder_without_the_text(tmp_path):
    with pytest.raises(ValueError, match=r"input\.txt is not there"):
        transformer.main(["--data-dir", str(tmp_path)])


@pytest.mark.slow
def test_variants_of_the_ablation_differ(tmp_path):
    changed = ["no momentum", "rate 0.1 and momentum 0.9, no model"]
    names = ["locoprop()", *(f"locoprop(): {change}" for change in changed)]
    size = ["--train-size", "40", "--batch-size", "20", "--width", "0.01"]
    where = ["--epochs", "2", "--output", str(tmp_path)]
    ablation.main([*size, *where, "--optimizers", *names])
    results = report.read_results(tmp_path / "ablation_curves.jsonl")
    assert [r["optimizer"] for r in results] == names
    ends = {r["optimizer"]: r["curve"][-1]["train_loss"] for r in results}
    assert np.isfinite(list(ends.values())).all()
    assert len(set(ends.values())) == len(ends), "each changes something"
