"""What importing the package brings with it."""

import subprocess
import sys

import pytest

import locoprop_optax as loco


def loaded_after(code):
    show = "import sys; print(*sys.modules)"
    command = [sys.executable, "-c", f"{code}; {show}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_it_imports_little_beyond_flax_and_optax():
    before = loaded_after("import flax, optax")
    more = loaded_after("import locoprop_optax") - before
    packages = {name.split(".")[0] for name in more} - {"locoprop_optax"}
    assert "flax.nnx" not in more
    assert packages.isdisjoint({"matplotlib", "rich", "optuna", "sklearn", "orbax"})
    assert "benchmarks" not in packages


def test_nnx_is_imported_when_it_is_asked_for():
    code = "import locoprop_optax as loco; loco.nnx.value_and_grad"
    assert "flax.nnx" in loaded_after(code)


def test_all_public_names_are_there():
    for name in loco.__all__:
        assert getattr(loco, name)
    with pytest.raises(AttributeError, match="no attribute 'adam'"):
        loco.adam  # noqa: B018
