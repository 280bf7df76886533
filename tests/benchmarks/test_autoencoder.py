import importlib
import inspect
import json

import numpy as np
import optax
import pytest

from benchmarks import autoencoder, comparison, peer, report
from benchmarks.contestants import CONTESTANTS, warmup_then_linear
from benchmarks.provenance import provenance


def test_the_whole_command(tmp_path, capsys):
    options = ["--train-size", "60", "--epochs", "2", "--batch-size", "30"]
    autoencoder.main([*options, "--width", "0.02", "--output", str(tmp_path)])
    results = report.read_results(tmp_path / "autoencoder_curves.jsonl")
    assert [r["optimizer"] for r in results] == ["adam", "locoprop_m", "locoprop"]
    start = {json.dumps({**r["curve"][0]}) for r in results}
    assert len(start) == 1, "all start from the same weights"
    for result in results:
        assert [point["steps"] for point in result["curve"]] == [0, 2, 4]
        assert np.all(np.isfinite([point["train_loss"] for point in result["curve"]]))
        assert set(result["made"]) == {"command", "commit", "machine", "versions"}
    assert (tmp_path / "autoencoder_curves.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert "Adam" in shown
    assert "train loss" in shown


def test_no_path_of_a_machine_in_the_results(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", "--data-dir", str(tmp_path / "images")])
    made = provenance()
    assert str(tmp_path) not in json.dumps(made)
    assert "images" in made["command"]


def test_too_few_images():
    with pytest.raises(ValueError, match="20 examples make no batch of 1000"):
        autoencoder.main(["--train-size", "20"])


def test_unknown_optimizer(capsys):
    with pytest.raises(SystemExit):
        autoencoder.main(["--optimizers", "adamant"])
    assert "invalid choice" in capsys.readouterr().err


@pytest.mark.parametrize("steps", [1, 2, 20, 600])
def test_schedule_warms_up_and_ends_at_zero(steps):
    rates = [float(warmup_then_linear(1.0, steps)(k)) for k in range(steps + 1)]
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.0, abs=1e-6) or steps == 1
    assert rates[0] > 0


@pytest.mark.parametrize("steps", [1, 2, 20, 600])
def test_peers_have_the_same_schedule(steps, monkeypatch):
    monkeypatch.syspath_prepend(str(peer.FOLDER))
    rate_at = importlib.import_module("protocol").rate_at
    schedule = warmup_then_linear(1.0, steps)
    for k in range(steps):
        assert rate_at(k, steps) == pytest.approx(float(schedule(k)), abs=1e-5)


def test_adam_starts_from_the_defaults_of_optax():
    defaults = inspect.signature(optax.adam).parameters
    for name, range_ in CONTESTANTS["adam"].space.items():
        if name != "learning_rate":
            assert range_.first == defaults[name].default


def test_every_contestant_has_a_label():
    assert all(c.label for c in CONTESTANTS.values())


SMALL = ["--train-size", "60", "--batch-size", "30", "--width", "0.02"]


@pytest.mark.slow
def test_a_shared_machine_times_what_ran_alone(tmp_path):
    shared = ["--room", str(tmp_path / "room"), "--optimizers", "sgd"]
    autoencoder.main([*SMALL, "--epochs", "3", *shared, "--output", str(tmp_path)])
    (result,) = report.read_results(tmp_path / "autoencoder_curves.jsonl")
    assert result["timed_steps"] == 2, "of the first round alone"
    seconds = [point["seconds"] for point in result["curve"]]
    assert seconds[0] == 0
    assert seconds[1] > 0
    np.testing.assert_allclose(seconds, seconds[1] * np.arange(4), atol=2e-3)


@pytest.mark.slow
def test_an_interrupt_leaves_what_there_is(tmp_path, monkeypatch):
    train = comparison.Run._train

    def interrupted(run, trainer, steps):
        if len(run.curve) == 3:
            raise KeyboardInterrupt
        train(run, trainer, steps)

    monkeypatch.setattr(comparison.Run, "_train", interrupted)
    names = ["--optimizers", "sgd", "adam"]
    autoencoder.main([*SMALL, "--epochs", "5", *names, "--output", str(tmp_path)])
    results = report.read_results(tmp_path / "autoencoder_curves.jsonl")
    assert [len(result["curve"]) for result in results] == [3, 3]
    assert [result["error"] for result in results] == ["Stopped after 4 steps."] * 2
