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
