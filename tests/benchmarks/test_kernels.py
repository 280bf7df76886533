from pathlib import Path

from benchmarks import kernels, report
from benchmarks.networks import HIDDEN


def test_the_whole_command(tmp_path, capsys):
    options = ["--width", "0.02", "--train-size", "60", "--batch-size", "30"]
    names = ["--optimizers", "sgd", "locoprop_m"]
    kernels.main([*options, *names, "--output", str(tmp_path)])
    sgd, local = report.read_results(tmp_path / "kernels.jsonl")
    assert local["kernels"] > sgd["kernels"] > 2 * len(HIDDEN)
    assert (tmp_path / "kernels.png").stat().st_size > 5_000
    assert "µs a kernel" in capsys.readouterr().out


def test_the_page_of_costs_is_the_committed_results():
    root = Path(__file__).parents[2]
    results = report.read_results(root / "benchmarks" / "results" / "kernels.jsonl")
    assert kernels.markdown(results) in (root / "docs" / "cost.md").read_text()


def test_times_are_shared_among_kernels():
    found = {"optimizer": "adam", "kernels": 50, "factorizations": 0}
    (row,) = kernels.rows([{**found, "step_seconds": 1e-3}])
    assert row == ("Adam", "50", "0", "1.00", "20")
    (row,) = kernels.rows([{**found, "step_seconds": None}])
    assert row[-2:] == ("–", "–")
