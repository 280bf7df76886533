import pytest

from benchmarks import compile_cost, report


@pytest.mark.slow
def test_the_whole_command(tmp_path, capsys):
    options = ["--depth", "1", "--width", "8", "--batch", "16"]
    compile_cost.main([*options, "--output", str(tmp_path)])
    results = report.read_results(tmp_path / "compile_cost.jsonl")
    dense, unrolled, scanned = (r["found"] for r in results)
    assert set(dense) == set(unrolled) > set(scanned)
    for found in (dense, unrolled):
        for name in compile_cost.MAKERS:
            apart = found[f"{name}, stacked"]["relative_difference"]
            assert apart == pytest.approx(0, abs=1e-3)
    assert (tmp_path / "compile_cost.png").stat().st_size > 10_000
    assert "stacked" in capsys.readouterr().out
