"""Everyday and random problems: what they hold, and what is said of them."""

from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks.everyday import __main__ as everyday
from benchmarks.everyday import random_problems, report, schedules
from benchmarks.everyday.problems import problems
from benchmarks.report import read_results
from tests.helpers import slow

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def test_there_are_enough_problems_and_some_are_kept_apart():
    found = problems()
    assert len({problem.name for problem in found}) == len(found)
    assert sum(not problem.apart for problem in found) >= 14
    assert sum(problem.apart for problem in found) >= 3
    for problem in found:
        (train, *targets), held_out = problem.data
        assert all(len(part) == len(train) for part in targets)
        assert problem.batch_size <= len(train)
        assert len(held_out[0]) > 0.15 * len(train)


@pytest.mark.parametrize(
    "problem",
    [p if at % 3 == 0 else slow(p) for at, p in enumerate(problems())],
    ids=lambda problem: problem.name,
)
def test_a_step_of_each_is_captured(problem):
    """Traced, not run: what an untrained network loses, and its layers' records."""
    batch = tuple(part[: problem.batch_size] for part in problem.data.train)

    def captured(key, batch):
        given = *problem.init(key), batch
        return problem.capture(problem.layers(*given), *given)

    loss, grads, intermediates, _ = jax.eval_shape(captured, jax.random.key(0), batch)
    assert loss.shape == ()
    assert intermediates.layers
    assert len(jax.tree.leaves(grads)) > 1


@pytest.mark.slow
def test_the_command_trains_and_shows_all_tables(tmp_path, capsys):
    everyday.main(
        [
            *("--problems", "separable", "--seeds", "0"),
            *("--contestants", "locoprop", "momentum"),
            *("--output", str(tmp_path)),
        ]
    )
    results = read_results(tmp_path / "everyday.jsonl")
    assert [r["contestant"] for r in results] == ["locoprop", "momentum"]
    ours, theirs = results
    assert {run["equal"] for run in theirs["runs"]} == {"steps", "seconds"}
    assert len(theirs["runs"]) == 2 * 4
    assert all(run["train"] < run["start"] for run in ours["runs"])
    assert "separable" in capsys.readouterr().out
    assert (tmp_path / "everyday.png").stat().st_size > 10_000


def made_up(name, problem, *, rates, apart=False):
    """Results of a contestant: by rate, the losses of two seeds."""
    runs = [
        {
            **{"equal": equal, "rate": rate, "seed": seed, "steps": 9},
            **{"train": loss, "valid": loss, "start": 4.0, "highest": 6.0},
            **{"finite": loss is not None, "skipped": 1, "seconds": 1.0},
        }
        for equal in ("steps", "seconds")
        for rate, losses in rates.items()
        for seed, loss in enumerate(losses)
    ]
    return {"problem": problem, "apart": apart, "contestant": name, "runs": runs}


def test_a_contestant_counts_with_its_best_rate_and_a_failed_one_does_not():
    ours = made_up("locoprop", "easy", rates={0.0: [1.0, 3.0]})
    theirs = made_up(
        "adamw", "easy", rates={0.1: [None, 0.1], 0.2: [2.0, 4.0], 0.3: [9.0, 9.0]}
    )
    assert report.means([ours, theirs], "steps", "train") == {
        "easy": {"locoprop": 2.0, "adamw": 3.0}
    }
    table = report.table([ours, theirs], "steps", "train").splitlines()
    assert table[2] == "| easy | **2** | 3 |"
    ratios = report.profile([ours, theirs], "seconds", "valid")
    np.testing.assert_allclose([ratios["locoprop"][0], ratios["adamw"][0]], [1.0, 1.5])
    assert report.no_worse([ours, theirs], "locoprop", "adamw", "steps", "train") == (
        "1 of 1"
    )
    assert "| locoprop | 2 | 0.750 | 1.5 | 0 | 2 |" in report.safety([ours, theirs])


def test_losses_of_almost_nothing_count_alike():
    results = [
        made_up("locoprop", "easy", rates={0.0: [1e-9, 1e-9]}),
        made_up("adamw", "easy", rates={0.1: [1e-12, 1e-12]}),
    ]
    for ratio in report.profile(results, "steps", "train").values():
        np.testing.assert_allclose(ratio, 1.0)


@pytest.mark.parametrize("number", [3, slow(1)])
def test_random_problems_do_not_diverge(number):
    """A sample of what the docs report."""
    runs = random_problems.runs_of(number, ["locoprop"])
    assert len(runs) == random_problems.DRAWS
    assert not any(map(random_problems.diverged, runs))


def test_what_has_diverged():
    run = {"start": 1.0, "end": 0.5, "highest": 49.0, "finite": True}
    assert not random_problems.diverged(run)
    for change in ({"finite": False}, {"highest": 51.0}, {"end": np.nan}):
        assert random_problems.diverged({**run, **change})


def test_the_page_is_the_committed_results():
    page = (ROOT / "docs" / "everyday.md").read_text()
    results = read_results(RESULTS / "everyday.jsonl")
    for part in report.markdown(results).split("\n\n"):
        assert part in page
    runs = read_results(RESULTS / "everyday_schedules.jsonl")
    assert schedules.markdown(runs) in page
    _, *runs = read_results(RESULTS / "random_problems.jsonl")
    assert random_problems.summary(runs) in page
    readme = (ROOT / "README.md").read_text()
    assert report.comparisons(results, "locoprop") in readme


@pytest.mark.slow
def test_schedules_are_compared(tmp_path, capsys):
    schedules.main(
        [
            *("--problems", "separable", "--seeds", "0", "--steps", "20"),
            *("--output", str(tmp_path)),
        ]
    )
    results = read_results(tmp_path / "everyday_schedules.jsonl")
    assert [run["schedule"] for run in results] == [*schedules.SHAPES]
    assert len({run["train"] for run in results}) == len(results)
    assert "separable" in capsys.readouterr().out


def test_every_schedule_but_none_ends_at_zero():
    ends = {name: float(shape(1.0)) for name, shape in schedules.SHAPES.items()}
    assert ends.pop("none") == 1
    assert set(ends.values()) == {0.0}
    assert all(float(shape(0.0)) == 1 for shape in schedules.SHAPES.values())


def test_what_a_schedule_is_worth_is_said():
    runs = [
        {"problem": "p", "steps": 9, "schedule": shape, "seed": 0, "train": loss}
        | {"valid": 1.0}
        for shape, loss in zip(schedules.SHAPES, (2.0, 1.0, 4.0, 3.0), strict=True)
    ]
    text = schedules.markdown(runs)
    assert "| p | 9 | 2 | 1 | 4 | 3 | 2.00 |" in text
    assert "best in training loss: 0 of 1" in text
    assert "best in validation loss: 1 of 1" in text
