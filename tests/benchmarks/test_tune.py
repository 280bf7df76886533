import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optuna
import pytest

from benchmarks import autoencoder, datasets, report, tune
from benchmarks.contestants import CONTESTANTS, Choice
from benchmarks.networks import Autoencoder
from benchmarks.problem import make_task
from benchmarks.training import start
from tests.helpers import layers_for, slow

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SMALL = ["--train-size", "40", "--batch-size", "20", "--width", "0.01", "--steps", "4"]


def small_task(steps=3):
    rng = np.random.default_rng(0)
    images = [rng.uniform(size=(n, 784)).astype(np.float32) for n in (40, 10)]
    model = Autoencoder((8, 4, 8))
    problem = autoencoder.problem_of(datasets.Images(*images), model)
    return make_task(problem, steps=steps, batch_size=20, seed=0)


FEW = ("muon", "lbfgs", "locoprop_and_adamw")
OWN = [name for name, contestant in CONTESTANTS.items() if contestant.peer is None]


@pytest.mark.parametrize("name", [n if n in FEW else slow(n) for n in OWN])
def test_every_contestant_of_this_process_trains(name):
    with start(name, small_task()) as trainer:
        before = trainer.evaluate()
        trained = trainer.train(3)
        after = trainer.evaluate()
    assert len(trained.seconds) == len(trained.losses) == 3
    assert np.all(np.isfinite(trained.losses))
    assert after != before
    assert trainer.described()["state_size"] >= 0


@pytest.mark.parametrize("name", [n for n, c in CONTESTANTS.items() if c.peer])
def test_a_peer_needs_an_interpreter(name):
    with (
        pytest.raises(ValueError, match=f"--peer {CONTESTANTS[name].peer}=PYTHON"),
        start(name, small_task()),
    ):
        pass


@pytest.mark.parametrize("name", CONTESTANTS)
def test_what_is_tried_first_lies_in_the_space(name):
    for range_ in CONTESTANTS[name].space.values():
        if isinstance(range_, Choice):
            assert range_.first in range_.values
        else:
            assert 0 < range_.low <= range_.first <= range_.high


@pytest.mark.parametrize(
    "path", sorted(RESULTS.glob("tuned_*.json")), ids=lambda path: path.stem
)
def test_what_was_tuned_can_be_set(path):
    layers = layers_for({"layer": {"kernel": jnp.ones((3, 2))}})
    for name, tuned in json.loads(path.read_text()).items():
        contestant = CONTESTANTS[name]
        captures = "intermediates" in contestant.needs
        contestant.made(10, tuned["settings"], layers if captures else None)


@pytest.mark.slow
def test_tuning_resumes_and_the_benchmark_takes_what_it_found(tmp_path, capsys):
    options = [*SMALL, "--optimizers", "sgd", "momentum", "--output", str(tmp_path)]
    tune.main(["autoencoder", *options, "--trials", "2"])
    tune.main(["autoencoder", *options, "--trials", "3"])
    storage = f"sqlite:///{tmp_path / 'tuned_autoencoder_curves.sqlite'}"
    study = optuna.load_study(study_name="sgd, 4 steps", storage=storage)
    assert len(study.trials) == 3
    assert study.trials[0].params == {"learning_rate": 1e-3}
    chosen = json.loads((tmp_path / "tuned_autoencoder_curves.json").read_text())
    assert chosen["sgd"]["settings"] == study.best_params
    assert math.isfinite(chosen["momentum"]["train_loss"])

    tune.main(["autoencoder", *options[:-4], "adam", *options[-2:], "--trials", "1"])
    kept = json.loads((tmp_path / "tuned_autoencoder_curves.json").read_text())
    assert {name: kept[name] for name in chosen} == chosen
    assert set(kept) - set(chosen) == {"adam"}

    settings = ["--settings", str(tmp_path / "tuned_autoencoder_curves.json")]
    options = [o for o in options if o not in ("--steps", "4")]
    options += ["--epochs", "1", *settings]
    autoencoder.main([*options, "--seeds", "0"])
    autoencoder.main([*options, "--seeds", "0", "1", "--resume"])
    results = report.read_results(tmp_path / "autoencoder_curves.jsonl")
    assert [r["settings"]["seed"] for r in results] == [0, 0, 1, 1]
    assert results[0]["settings"]["tuned"] == study.best_params
    shown = capsys.readouterr().out
    assert "2 seeds" in " ".join(shown.split())
    assert "Seed 0: nothing is left\n" in shown
    assert "Seed 1: sgd, momentum\n" in shown


@pytest.mark.slow
def test_trials_of_other_lengths_are_not_compared(tmp_path):
    options = [*SMALL, "--optimizers", "sgd", "--output", str(tmp_path)]
    tune.main(["autoencoder", *options, "--trials", "1"])
    tune.main(["autoencoder", *options, "--trials", "2", "--steps", "8"])
    storage = f"sqlite:///{tmp_path / 'tuned_autoencoder_curves.sqlite'}"
    found = json.loads((tmp_path / "tuned_autoencoder_curves.json").read_text())["sgd"]
    studies = {
        study.study_name: study for study in optuna.get_all_study_summaries(storage)
    }
    assert {n: s.n_trials for n, s in studies.items()} == {
        "sgd, 4 steps": 1,
        "sgd, 8 steps": 2,
    }
    assert found["train_loss"] == studies["sgd, 8 steps"].best_trial.value


@pytest.mark.slow
def test_what_shorter_trials_chose_is_tried_second(tmp_path):
    options = [*SMALL, "--optimizers", "sgd", "--output", str(tmp_path)]
    path = tmp_path / "tuned_autoencoder_curves.json"
    path.write_text(json.dumps({"sgd": {"settings": {"learning_rate": 0.25}}}))
    tune.main(["autoencoder", *options, "--trials", "2"])
    storage = f"sqlite:///{path.with_suffix('.sqlite')}"
    trials = optuna.load_study(study_name="sgd, 4 steps", storage=storage).trials
    assert [t.params["learning_rate"] for t in trials] == [1e-3, 0.25]


@pytest.mark.slow
def test_no_draw_is_tried_twice_after_a_resumption_or_with_other_lengths(tmp_path):
    options = [*SMALL, "--optimizers", "sgd", "--output", str(tmp_path)]
    tune.main(["autoencoder", *options, "--trials", "2"])
    tune.main(["autoencoder", *options, "--trials", "3"])
    tune.main(["autoencoder", *options, "--trials", "3", "--steps", "8"])
    storage = f"sqlite:///{tmp_path / 'tuned_autoencoder_curves.sqlite'}"
    drawn = [
        trial.params["learning_rate"]
        for study in ("sgd, 4 steps", "sgd, 8 steps")
        for trial in optuna.load_study(study_name=study, storage=storage).trials
        if not trial.system_attrs.get("fixed_params")
    ]
    assert len(drawn) == len(set(drawn)) >= 3


@pytest.mark.slow
def test_trials_behind_the_median_end_early(tmp_path):
    options = [*SMALL, "--optimizers", "sgd", "--output", str(tmp_path)]
    tune.main(["autoencoder", *options, "--trials", "8"])
    storage = f"sqlite:///{tmp_path / 'tuned_autoencoder_curves.sqlite'}"
    trials = optuna.load_study(study_name="sgd, 4 steps", storage=storage).trials
    states = [trial.state.name for trial in trials]
    assert set(states) == {"COMPLETE", "PRUNED"}
    ended = trials[states.index("PRUNED")]
    assert ended.last_step < 4
    best = min(t.value for t in trials if t.state.name == "COMPLETE")
    found = json.loads((tmp_path / "tuned_autoencoder_curves.json").read_text())["sgd"]
    assert found["train_loss"] == best
    assert found["failed_trials"] == 0


@pytest.mark.slow
def test_a_contestant_that_fails_is_listed_with_its_error(tmp_path):
    options = [o for o in SMALL if o not in ("--steps", "4")]
    options += ["--optimizers", "adam", "kfac", "--epochs", "1"]
    autoencoder.main([*options, "--output", str(tmp_path)])
    results = report.read_results(tmp_path / "autoencoder_curves.jsonl")
    assert "error" not in results[0]
    assert "--peer kfac=PYTHON" in results[1]["error"]
    assert "1 of 1 failed" in report.rows(results)[1][1]
