import json
from pathlib import Path

import pytest

from benchmarks import devices

ROOT = Path(__file__).parents[2]


def test_the_page_shows_the_results():
    results = json.loads((ROOT / "benchmarks/results/devices.json").read_text())
    page = (ROOT / "docs/devices.md").read_text()
    cells = {}
    for row in results["exchanges"]:
        shown = str(sum(row["operations"].values()))
        cells.setdefault(("exchanges", row["optimizer"]), []).append(shown)
    for row in results["shares"]:
        cells.setdefault(("shares", row["optimizer"]), []).append(f"{row['local']:.2f}")
    for row in results["training"]:
        shown = ", ".join(f"{loss:.1f}" for loss in row["losses"])
        cells.setdefault(("training", row["optimizer"]), []).append(shown)
    assert len(cells) == 7
    for (_, optimizer), shown in cells.items():
        called = f"`{optimizer}`" if optimizer == "locoprop_m" else f"`{optimizer}()`"
        assert f"| {' | '.join([called, *shown])} |" in page


@pytest.mark.slow
def test_the_whole_command(tmp_path):
    size = ["--train-size", "40", "--batch-size", "20", "--epochs", "1"]
    devices.main([*size, "--shards", "1", "2", "--output", str(tmp_path)])
    results = json.loads((tmp_path / "devices.json").read_text())
    assert {run["shards"] for run in results["training"]} == {1, 2}
    reductions = {
        kind
        for row in results["exchanges"]
        for kind, count in row["operations"].items()
        if count
    }
    assert reductions == {"all-reduce"}
    assert (tmp_path / "devices.png").stat().st_size > 10_000
