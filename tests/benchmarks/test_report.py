from pathlib import Path

import pytest

from benchmarks import report

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("data", ["curves", "mnist"])
def test_tables_of_the_readme_are_the_committed_results(data):
    path = ROOT / "benchmarks" / "results" / f"autoencoder_{data}.jsonl"
    assert (
        report.markdown(report.read_results(path)) in (ROOT / "README.md").read_text()
    )


def test_the_command_shows_a_table_and_draws_a_picture(tmp_path, capsys):
    source = ROOT / "benchmarks" / "results" / "autoencoder_curves.jsonl"
    copy = tmp_path / "autoencoder_curves.jsonl"
    copy.write_bytes(source.read_bytes())
    report.main([str(copy)])
    assert "locoprop_m" in capsys.readouterr().out
    assert copy.with_suffix(".png").stat().st_size > 10_000
