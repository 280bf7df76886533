import subprocess
import sys

import pytest

from benchmarks import report


@pytest.mark.slow
def test_the_whole_command(tmp_path):
    """In a process of its own, whose products round."""
    options = ["--width", "0.02", "--train-size", "2000", "--epochs", "2"]
    options += ["--batch-size", "100"]  # enough steps for roundings to tell
    command = [sys.executable, "-m", "benchmarks.precision", *options]
    subprocess.run([*command, "--output", str(tmp_path)], check=True)
    results = report.read_results(tmp_path / "precision.jsonl")
    last = {r["optimizer"]: r["curve"][-1]["train_loss"] for r in results}
    for name in ("locoprop", "locoprop_m"):
        short, full = last[f"{name}, bfloat16"], last[f"{name}, float32"]
        assert short != full
        assert abs(short / full - 1) < 0.01
