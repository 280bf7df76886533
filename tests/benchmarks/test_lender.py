"""An optimizer of another process, with one that needs no environment of its own."""

import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import lender, peer

SCRIPT = """
import argparse
import json
import sys
from pathlib import Path

import numpy as np

parser = argparse.ArgumentParser()
parser.add_argument("--input", type=Path)
parser.add_argument("--settings", type=json.loads)
options = parser.parse_args()
with np.load(options.input) as file:
    flat = np.concatenate([file[f"param_{i}"].ravel() for i in range(len(file.files))])
exchange = np.memmap(
    options.input.parent / "exchange", np.float32, "w+", shape=flat.size
)
velocity = np.zeros_like(flat)
print(json.dumps({"versions": {}}), flush=True)
for count, _ in enumerate(sys.stdin, 1):
    velocity = options.settings["momentum"] * velocity + exchange
    flat = flat - options.settings["learning_rate"] * velocity
    exchange[:] = flat
    print(json.dumps({"state_size": count}), flush=True)
"""
PARAMS = {"b": jnp.arange(3.0), "a": {"kernel": jnp.full((2, 2), 3.0)}}


@pytest.fixture
def lent(tmp_path, monkeypatch):
    (tmp_path / "heavy_ball.py").write_text(SCRIPT)
    monkeypatch.setattr(peer, "FOLDER", tmp_path)
    settings = {"learning_rate": 0.1, "momentum": 0.9}
    with lender.lent(Path(sys.executable), "heavy_ball", PARAMS, settings) as lent:
        yield lent


def test_it_takes_the_steps_of_the_same_optimizer_here(lent):
    def loss(params):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    def trained(tx):
        @jax.jit
        def step(params, state):
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        params, state = PARAMS, tx.init(PARAMS)
        for _ in range(4):
            params, state = step(params, state)
        return params

    chex.assert_trees_all_close(
        trained(lent.optimizer), trained(optax.sgd(0.1, momentum=0.9)), rtol=1e-5
    )
    assert lent.about() == {"peer_versions": {}, "state_size": 4}


def test_a_peer_that_ends_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("raise ValueError('no such optimizer')")
    monkeypatch.setattr(peer, "FOLDER", tmp_path)
    with (
        pytest.raises(RuntimeError, match="no such optimizer"),
        lender.lent(Path(sys.executable), "broken", {"w": np.ones(1)}, {}),
    ):
        pass
