"""The example scripts run, and LocoProp lowers their losses."""

import importlib

import numpy as np
import pytest

from tests.helpers import slow

SCRIPTS = {
    "resnet_linen": 4,
    "resnet_nnx": 4,
    "transformer_linen": 16,
    "transformer_nnx": 16,
    "vae": 32,
    "gan": 4,
}


FURTHER = ("resnet_nnx", "transformer_linen", "transformer_nnx", "vae", "gan")


@pytest.mark.parametrize("name", [slow(n) if n in FURTHER else n for n in SCRIPTS])
def test_example(name, capsys):
    main = importlib.import_module(f"examples.{name}").main
    outcomes = main(["--steps=12", "--batch-size=16", f"--width={SCRIPTS[name]}"])
    assert list(outcomes) == ["AdamW", "LocoProp"]
    for outcome in outcomes.values():
        assert np.all(np.isfinite([*outcome.last.values(), *outcome.held_out.values()]))
    if name != "gan":
        assert outcomes["LocoProp"].last["loss"] < outcomes["LocoProp"].first["loss"]
    table = capsys.readouterr().out
    assert all(optimizer in table for optimizer in outcomes)
