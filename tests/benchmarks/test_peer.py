"""The protocol of peers, with one that needs no environment of its own."""

import json
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import networks, peer
from benchmarks.problem import Examples, Problem, Task

PARAMS = {"Dense_0": {"kernel": np.full((2, 2), 3.0), "bias": np.ones(2)}}
IMAGES = Examples(*2 * [np.arange(8.0).reshape(4, 2)])
MODEL = networks.Autoencoder(hidden=(), pixels=2, transfer="relu")
COST = networks.sigmoid_cross_entropy
TEST = Examples(*(part[:2] for part in IMAGES))
ORDER = np.asarray([[0, 1], [2, 3], [3, 3]])
TASK = Task(Problem(MODEL, COST, IMAGES, TEST, 3), PARAMS, ORDER)
SCRIPT = """
import sys
import time
from functools import cache

import numpy as np

sys.path.insert(0, {folder!r})
from protocol import Trainer, serve

compile = cache(time.sleep)
held = []


def make(arrays, settings):
    if settings.get("broken"):
        raise ValueError("broken")
    scale = settings["scale"] * arrays["params/Dense_0/kernel"][0, 0]

    def place(batch):
        time.sleep(settings.get("place", 0.0))
        return batch

    def step(batch):
        compile(settings.get("first_step", 0.0))
        held.append(np.ones(settings.get("held", 0)))
        return float(scale * batch.targets.sum())

    return Trainer(
        place, step, lambda batch: float(batch.inputs.mean()), lambda: 2.0
    )


serve(make, ())
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    script = SCRIPT.format(folder=str(peer.FOLDER))
    (tmp_path / "echo.py").write_text(script)
    monkeypatch.setattr(peer, "FOLDER", tmp_path)

    def start(**settings):
        return peer.start(Path(sys.executable), "echo", TASK, settings)

    return start


def test_a_peer_trains_batch_by_batch_and_evaluates(start):
    with start(scale=2.0) as running:
        assert "numpy" in running.versions
        assert running.ask(steps=1)["losses"] == [6.0 * (0 + 1 + 2 + 3)]
        answer = running.ask(steps=2)
        assert answer["losses"] == [6.0 * (4 + 5 + 6 + 7), 6.0 * 2 * (6 + 7)]
        assert len(answer["seconds"]) == 2
        answer = running.ask(evaluate=True)
        about = answer.pop("about")
        assert answer == {"train_loss": 2.5, "test_loss": 1.5}
        assert about["state_size"] == 2.0
        assert about["peak_size"] >= 0


def test_a_peer_compiles_before_it_is_timed(start):
    with start(scale=2.0, first_step=0.5) as running:
        assert sum(running.ask(steps=3)["seconds"]) < 0.5
        compiled = running.ask(evaluate=True)["about"]["compile_seconds"]
        assert compiled >= 0.5


def test_a_batch_on_its_way_to_the_device_is_not_timed(start):
    with start(scale=2.0, place=0.1) as running:
        assert sum(running.ask(steps=3)["seconds"]) < 0.1


def test_a_peer_tells_what_memory_it_takes(start):
    few, numbers = 6 * 8, 10**7  # bytes of the parameters, numbers held by each step
    with start(scale=2.0, held=numbers) as running:
        peak = running.ask(evaluate=True)["about"]["peak_size"]
    assert 6 * 8 * numbers <= peak * few <= 8 * 8 * numbers


@pytest.mark.parametrize(
    "model",
    [MODEL, networks.Transformer(5, width=8), networks.ResidualNetwork(8)],
    ids=lambda model: type(model).__name__,
)
def test_a_peer_can_make_the_model_anew(model):
    described = json.loads(json.dumps(networks.described(model)))
    again = networks.from_description(described)
    inputs = jnp.zeros((2, 784 if isinstance(model, networks.ResidualNetwork) else 2))
    if isinstance(model, networks.Transformer):
        inputs = inputs.astype(int)
    params = model.init(jax.random.key(0), inputs)
    chex.assert_trees_all_equal(
        again.apply(params, inputs), model.apply(params, inputs)
    )


def test_a_peer_that_fails_says_why(start):
    match = "ended with code 1. ValueError: broken"
    with pytest.raises(RuntimeError, match=match), start(broken=True):
        pass
