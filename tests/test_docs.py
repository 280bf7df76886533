"""The code in the documentation runs."""

import re
from pathlib import Path

import matplotlib as mpl
import pytest

PAGES = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
RUN_ELSEWHERE = {"recovered.md"}


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name not in RUN_ELSEWHERE], ids=lambda p: p.name
)
def test_code_blocks_run_in_their_order(page, tmp_path, monkeypatch):
    mpl.use("Agg")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__docs__"}
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        exec(compile(code, str(page), "exec"), names)


def test_the_tests_that_promises_name_are_there():
    page = next(p for p in PAGES if p.name == "devices.md").read_text()
    tests = "".join(p.read_text() for p in Path(__file__).parent.rglob("test_*.py"))
    promised = re.findall(r"`(test_\w+)`", page)
    assert len(promised) > 15
    for name in promised:
        assert f"def {name}(" in tests, name
