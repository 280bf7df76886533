from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.progress import Progress

from benchmarks import curveball_minibatch, curveball_problems, datasets, report

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
REFERENCE = {  # an independent rerun of the paper's definitions: mean and deviation
    "Rosenbrock": (13.2, 0.5),
    "Rosenbrock, ε ~ U[0, 1]": (12.7, 0.6),
    "Rosenbrock, ε ~ U[0, 3]": (13.4, 0.7),
    "linear network": (37.0, 9.0),
}


def read(name):
    return report.read_results(RESULTS / f"{name}.jsonl")


@pytest.mark.parametrize("problem", curveball_problems.PROBLEMS, ids=lambda p: p.label)
def test_curveball_takes_as_many_steps_as_the_reference(problem):
    run = curveball_problems.METHODS["CurveBall"]
    with jax.enable_x64(True):
        steps = curveball_problems.steps_to_solve(run, problem, 20, seed=1)
    mean, deviation = REFERENCE[problem.label]
    assert abs(np.mean(steps) - mean) <= deviation


@pytest.mark.parametrize("name", ["L-BFGS (optax)", "Levenberg–Marquardt (optimistix)"])
def test_the_others_run(name):
    run = curveball_problems.METHODS[name]
    with jax.enable_x64(True):
        steps = curveball_problems.steps_to_solve(
            run, curveball_problems.PROBLEMS[0], 2, seed=1
        )
    assert all(1 < step < 100 for step in steps)


def test_results_of_the_problems_are_whole():
    results = read("curveball_problems")
    assert {len(r["steps"]) for r in results} == {100}
    methods = {*curveball_problems.METHODS, *curveball_problems.TUNED}
    assert {r["method"] for r in results} == methods
    for r in results:
        if r["method"] == "CurveBall":
            mean, deviation = REFERENCE[r["problem"]]
            assert abs(np.mean(r["steps"]) - mean) <= deviation
    assert len(curveball_problems.rows(results)) == len(methods)


@pytest.mark.parametrize(
    ("name", "benchmark"),
    [
        ("curveball_problems", curveball_problems),
        ("curveball_minibatch", curveball_minibatch),
    ],
)
def test_tables_of_the_page_are_the_committed_results(name, benchmark):
    page = (RESULTS.parents[1] / "docs" / "curveball.md").read_text()
    for row in benchmark.rows(read(name)):
        assert f"| {' | '.join(row)} |" in page


def test_curves_quoted_on_the_page():
    page = (RESULTS.parents[1] / "docs" / "curveball.md").read_text()
    for r in read("curveball_minibatch"):
        if r["optimizer"].startswith("LocoProp"):
            losses = {p["steps"]: f"{p['train_loss']:.1f}" for p in r["curve"]}
            assert f"{losses[40]}, {losses[100]} and {losses[200]}" in page


def test_cells():
    assert curveball_problems.cell([3, 5]) == "4.0 ± 1.0"
    assert curveball_problems.cell([3, 5000]).endswith("(1 not)")
    assert curveball_problems.cell([5000, 5000]) == "none solved"


@pytest.mark.slow
@pytest.mark.parametrize("normalized", [False, True])
def test_a_small_minibatch_run(normalized, tmp_path):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(96, 12)), jnp.float32)
    y = jnp.argmax(x[:, :10], axis=1)
    task = curveball_minibatch.Task(
        "small",
        curveball_minibatch.Classifier(normalized),
        curveball_minibatch.cross_entropy,
        (x, y),
        (x, y),
        batch=32,
        steps=40,
    )
    with Progress(disable=True) as progress:
        results = curveball_minibatch.train(task, 0, progress)
    assert [r["optimizer"] for r in results] == list(curveball_minibatch.OPTIMIZERS)
    for r in results:
        assert r["curve"][-1]["train_loss"] < r["curve"][0]["train_loss"]
    curveball_minibatch.show(results, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 0


def test_labels(tmp_path):
    for part, labels in (("train", [3, 1]), ("t10k", [2])):
        header = b"\0\0\x08\x01" + len(labels).to_bytes(4, "big")
        path = tmp_path / f"{part}-labels-idx1-ubyte"
        path.write_bytes(header + bytes(labels))
    train, test = datasets.read_labels(tmp_path)
    np.testing.assert_array_equal(train, [3, 1])
    np.testing.assert_array_equal(test, [2])
