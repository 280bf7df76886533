"""Guards of the cost of a step that do not time it."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks import (
    ceilings,
    compile_cost,
    operations,
    precision,
    report,
    step_cost,
    step_report,
)
from tests.helpers import slow

ROOT = Path(__file__).parents[2]
WIDTHS, BATCH, STEPS = step_cost._scaled(0.5), 500, 4


@pytest.mark.slow
@pytest.mark.parametrize("variant", [v for v in step_cost.VARIANTS if v != "muon"])
def test_no_more_operations_than_counted_by_hand(variant):
    by_hand = operations.operations(variant, WIDTHS, BATCH, STEPS)
    by_hand.pop("factorizations", None)  # those of LAPACK, which XLA does not see
    step = step_cost.Step(variant, WIDTHS, BATCH, STEPS)
    by_xla = step.counted_by_xla()
    assert by_xla / sum(by_hand.values()) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(("variant", "products"), [("adam", 23), ("locoprop_m", 39)])
def test_matrix_products_of_a_compiled_step(variant, products):
    """Backprop's three a layer but one; two a layer in the loop of local steps."""
    step = step_cost.Step(variant, step_cost._scaled(0.06), 40, STEPS)
    lines = step.compile().as_text().splitlines()
    assert sum(" dot(" in line for line in lines) == products


@pytest.mark.parametrize(
    "variant",
    [v if v in ("adam", "scale_by_locoprop") else slow(v) for v in step_cost.VARIANTS],
)
def test_parameters_and_state_are_donated(variant):
    step = step_cost.Step(variant, step_cost._scaled(0.06), 40, STEPS)
    memory = step.compile().memory_analysis()
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(step.carry))
    assert memory.alias_size_in_bytes >= 0.99 * held


@pytest.mark.parametrize("table", ["rows", "peer_rows", "growth_rows"])
def test_the_tables_of_the_page_are_the_committed_results(table):
    results = json.loads((ROOT / "benchmarks/results/step_cost.json").read_text())
    page = (ROOT / "docs/cost.md").read_text()
    for row in getattr(step_report, table)(results):
        assert f"| {' | '.join(row)} |" in page


@pytest.mark.parametrize("module", [compile_cost, precision])
def test_other_tables_of_the_page_are_the_committed_results(module):
    name = module.__name__.split(".")[-1]
    results = report.read_results(ROOT / f"benchmarks/results/{name}.jsonl")
    page = (ROOT / "docs/cost.md").read_text()
    tables = [results] if module is precision else results
    for row in (row for table in tables for row in module.rows(table)):
        assert f"| {' | '.join(row)} |" in page


@pytest.mark.slow
def test_the_whole_command(tmp_path, capsys):
    options = ["--repeats", "1", "--width", "0.05", "--batch", "20"]
    step_cost.main([*options, "--steps", "2", "--no-growth", "--output", str(tmp_path)])
    results = json.loads((tmp_path / "step_cost.json").read_text())
    assert set(results["by_xla"]) == set(step_cost.VARIANTS) - {"muon"}
    assert all(found["seconds"] > 0 for found in results["found"].values())
    assert all(found.get("launches", 1) > 0 for found in results["found"].values())
    assert results["ceilings"]["bytes a second"] > 0
    assert "locoprop_m" in capsys.readouterr().out


def test_kernels_of_a_loop_count_as_often_as_it_turns():
    def loop(turns):
        def body(x, _):
            return jnp.sin(x @ x), None

        scanned = jax.jit(lambda x: jax.lax.scan(body, x, length=turns)[0])
        return ceilings.launches(scanned.lower(jnp.eye(64)).compile().as_text())

    assert loop(30) - loop(20) == loop(20) - loop(10) >= 20


def test_of_a_condition_the_longer_branch_counts():
    def long(x):
        return jax.lax.scan(lambda x, _: (jnp.sin(x @ x), None), x, length=20)[0]

    step = jax.jit(lambda x: jax.lax.cond(x[0, 0] > 0, long, lambda x: x, x))
    text = step.lower(jnp.eye(64)).compile().as_text()
    assert ceilings.launches(text) >= 20


def test_records_and_state_are_itemized():
    widths, n = step_cost._scaled(0.06), 40
    found = step_cost.measure(
        widths, n, 2, 1, ["adam", "locoprop_m", "scale_by_locoprop"]
    )
    params = sum((i + 1) * o for i, o in operations.layers_of(widths))
    records = params + n * sum(i + 2 * o for i, o in operations.layers_of(widths))
    assert found["adam"]["record_bytes"] == 0
    assert found["scale_by_locoprop"]["record_bytes"] == pytest.approx(
        4 * records, rel=0.01
    )
    inverses = sum(i**2 for i, _ in operations.layers_of(widths))
    assert found["scale_by_locoprop"]["state_bytes"] == pytest.approx(
        4 * (params + inverses), rel=0.01
    )
    assert found["locoprop_m"]["state_bytes"] == pytest.approx(8 * params, rel=0.01)
