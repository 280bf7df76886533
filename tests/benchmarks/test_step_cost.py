"""Guards of the cost of a step that do not time it."""

import json
from pathlib import Path

import jax
import pytest

from benchmarks import ceilings, operations, step_cost

ROOT = Path(__file__).parents[2]
WIDTHS, BATCH, STEPS = step_cost._scaled(0.5), 500, 4


@pytest.mark.parametrize("variant", [v for v in step_cost.VARIANTS if v != "muon"])
def test_no_more_operations_than_counted_by_hand(variant):
    by_hand = operations.operations(variant, WIDTHS, BATCH, STEPS)
    step = step_cost.Step(variant, WIDTHS, BATCH, STEPS)
    by_xla = step.counted_by_xla()
    assert by_xla / sum(by_hand.values()) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(("variant", "products"), [("adam", 23), ("locoprop_m", 39)])
def test_matrix_products_of_a_compiled_step(variant, products):
    """Backprop's three a layer but one; two a layer in the loop of local steps."""
    step = step_cost.Step(variant, step_cost._scaled(0.06), 40, STEPS)
    lines = step.compile().as_text().splitlines()
    assert sum(" dot(" in line for line in lines) == products


@pytest.mark.parametrize("variant", step_cost.VARIANTS)
def test_parameters_and_state_are_donated(variant):
    step = step_cost.Step(variant, step_cost._scaled(0.06), 40, STEPS)
    memory = step.compile().memory_analysis()
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(step.carry))
    assert memory.alias_size_in_bytes >= 0.99 * held


def test_the_table_of_the_page_is_the_committed_result():
    results = json.loads((ROOT / "benchmarks/results/step_cost.json").read_text())
    page = (ROOT / "docs/cost.md").read_text()
    for row in step_cost.rows(results):
        assert f"| {' | '.join(row)} |" in page


def test_inverse_operations():
    assert operations.inverse_operations(64) == 2 * 64**3
    assert operations.inverse_operations(128) == 8 * 64**3 + 4 * 64**3


def test_the_whole_command(tmp_path, capsys):
    options = ["--repeats", "1", "--width", "0.05", "--batch", "20"]
    step_cost.main([*options, "--steps", "2", "--no-growth", "--output", str(tmp_path)])
    results = json.loads((tmp_path / "step_cost.json").read_text())
    assert set(results["by_xla"]) == set(step_cost.VARIANTS) - {"muon"}
    assert all(found["seconds"] > 0 for found in results["found"].values())
    assert "locoprop_m" in capsys.readouterr().out
