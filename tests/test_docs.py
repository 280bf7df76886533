"""The code in the documentation runs."""

import re
from pathlib import Path

import jax
import matplotlib as mpl
import optax
import pytest

from tests.helpers import DOCS, python_blocks, regression, run_blocks

README = (Path(__file__).parents[1] / "README.md").read_text()
PAGES = sorted(DOCS.glob("*.md"))
RUN_ELSEWHERE = {"errors.md", "recovered.md", "your_own.md"}


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name not in RUN_ELSEWHERE], ids=lambda p: p.name
)
def test_code_blocks_run_in_their_order(page, tmp_path, monkeypatch, capsys):
    mpl.use("Agg")
    monkeypatch.chdir(tmp_path)
    run_blocks(page.read_text())
    printed = capsys.readouterr().out
    for table in re.findall(r"```text\n(layer .*?)```", page.read_text(), re.S):
        assert table in printed


def test_the_step_of_the_readme_trains():
    loss_fn, params, batch = regression()
    assert len(python_blocks(README)) == 1
    given = {"loss_fn": loss_fn, "params": params, "batch": batch}
    names = run_blocks(README, jax=jax, optax=optax, **given)
    state = names["opt_state"]
    for _ in range(3):
        params, state, loss = names["train_step"](params, state, batch)
    assert loss < loss_fn(names["params"], batch)


def test_the_tests_that_promises_name_are_there():
    page = next(p for p in PAGES if p.name == "devices.md").read_text()
    tests = "".join(p.read_text() for p in Path(__file__).parent.rglob("test_*.py"))
    promised = re.findall(r"`(test_\w+)`", page)
    assert len(promised) > 15
    for name in promised:
        assert f"def {name}(" in tests, name


ERRORS = next(p for p in PAGES if p.name == "errors.md").read_text()
MISTAKES = re.findall(
    r"## ([^\n]*)\n\n```python\n(.*?)```\n\n```text\n(.*?)```", ERRORS, re.S
)


def test_the_page_of_errors_has_the_likeliest_mistakes():
    assert len(MISTAKES) >= 25


@pytest.mark.parametrize(
    ("code", "message"),
    [mistake[1:] for mistake in MISTAKES],
    ids=[mistake[0] for mistake in MISTAKES],
)
def test_a_mistake_gets_the_message_that_the_page_shows(code, message):
    names = {"__name__": "__docs__"}
    exec(python_blocks(ERRORS)[0], names)
    with pytest.raises((TypeError, ValueError)) as caught:
        exec(code, names)
    shown = f"{type(caught.value).__name__}: {caught.value}"
    assert shown.split() == message.split()
