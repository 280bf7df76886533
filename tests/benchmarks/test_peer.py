"""The protocol of peers, with one that needs no environment of its own."""

import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import peer

PARAMS = {"Dense_0": {"kernel": np.full((2, 2), 3.0), "bias": np.ones(2)}}
IMAGES = np.arange(8.0).reshape(4, 2)
ORDER = np.asarray([[0, 1], [2, 3], [3, 3]])
SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
from protocol import Trainer, serve


def make(arrays, settings):
    if settings.get("broken"):
        raise ValueError("broken")
    scale = settings["scale"] * arrays["kernel_0"][0, 0]
    return Trainer(
        lambda images: float(scale * images.sum()),
        lambda images: float(images.mean()),
        lambda: 2.0,
    )


serve(make, ())
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    script = SCRIPT.format(folder=str(peer.FOLDER))
    (tmp_path / "echo.py").write_text(script)
    monkeypatch.setattr(peer, "FOLDER", tmp_path)

    def start(**settings):
        return peer.start(
            Path(sys.executable), "echo", PARAMS, IMAGES, ORDER, settings=settings
        )

    return start


def test_a_peer_trains_batch_by_batch_and_evaluates(start):
    with start(scale=2.0) as running:
        assert "numpy" in running.versions
        assert running.ask(steps=1)["losses"] == [6.0 * (0 + 1 + 2 + 3)]
        answer = running.ask(steps=2)
        assert answer["losses"] == [6.0 * (4 + 5 + 6 + 7), 6.0 * 2 * (6 + 7)]
        assert len(answer["seconds"]) == 2
        expected = {"train_loss": 3.5, "test_loss": 1.5, "state_size": 2.0}
        assert running.ask(evaluate=True) == expected


def test_a_peer_that_fails_says_why(start):
    match = "ended with code 1. ValueError: broken"
    with pytest.raises(RuntimeError, match=match), start(broken=True):
        pass
