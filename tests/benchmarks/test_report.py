from pathlib import Path

from benchmarks import report
from benchmarks.networks import HIDDEN

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


LEADING = ["locoprop", "soap", "kfac", "muon", "adamw"]


def test_the_table_of_the_readme_is_the_committed_results():
    results = report.read_results(RESULTS / "autoencoder_mnist.jsonl")
    shown = report.markdown(report.only(results, [*LEADING, "locoprop_m", "adam"]))
    assert shown in (ROOT / "README.md").read_text()


def test_the_page_of_results_is_the_committed_results():
    page = (ROOT / "docs" / "results.md").read_text()
    both = (report.markdown, report.milestones)
    for name, tables in {
        "autoencoder_mnist": both,
        "autoencoder_mnist_h100": both,
        "autoencoder_mnist_h100_quarter_rates": [report.markdown],
        "autoencoder_curves": both,
        "autoencoder_curves_curves": both,
        "autoencoder_fashion_mnist": both,
        "autoencoder_mnist_deeper": both,
        "autoencoder_mnist_relu": both,
        "autoencoder_mnist_batch_100": both,
        "autoencoder_mnist_wider": both,
        "ablation_mnist": [report.markdown],
        "transformer": both,
        "cnn": both,
    }.items():
        results = report.read_results(RESULTS / f"{name}.jsonl")
        for table in tables:
            assert table(results) in page


def test_the_command_shows_a_table_and_draws_a_picture(tmp_path, capsys):
    source = RESULTS / "autoencoder_curves.jsonl"
    copy = tmp_path / "autoencoder_curves.jsonl"
    copy.write_bytes(source.read_bytes())
    report.main([str(copy)])
    assert "locoprop_s" in capsys.readouterr().out
    assert copy.with_suffix(".png").stat().st_size > 10_000
    picture = tmp_path / "six.png"
    report.main([str(copy), "--only", *LEADING, "--picture", str(picture)])
    assert "locoprop_s" not in capsys.readouterr().out
    assert picture.stat().st_size > 10_000


def test_the_title_names_what_is_not_as_in_the_paper():
    settings = {
        **{"data": "curves", "train_images": 60, "batch_size": 30, "epochs": 2},
        **{"model": "deep autoencoder", "transfer": "tanh", "hidden": [20, 1, 20]},
    }
    made = [{"optimizer": "adam", "settings": settings}]
    assert report.title(made).startswith("deep autoencoder, 20-1-20 on curves, 60")
    settings |= {"hidden": [*HIDDEN], "transfer": "relu"}
    assert report.title(made).startswith("deep autoencoder, relu on curves, 60")
    settings |= {"transfer": "tanh"}
    assert report.title(made).startswith("deep autoencoder on curves, 60")


def test_milestones_are_at_equal_epochs_and_at_equal_seconds():
    def run(name, seconds, losses):
        points = zip(range(5), losses, strict=True)
        curve = [
            {"epoch": e, "seconds": e * seconds, "train_loss": x} for e, x in points
        ]
        settings = {"epochs": 4}
        return {"optimizer": name, "curve": curve, "settings": settings}

    slow = run("locoprop", 10.0, [9, 4, 3, 2, 1])
    fast = [run("adam", 2.5, [9, 8 + d, 7 + d, 6 + d, 5 + d]) for d in (-1, 1)]
    table = report.milestones([slow, *fast]).splitlines()
    assert table[0].split(" | ")[1:7] == [
        *("epoch 1", "epoch 2", "epoch 4"),
        *("2 s", "5 s", "10 s"),
    ]
    assert table[2].split(" | ")[1:7] == [f"{loss}.000" for loss in (4, 3, 1, 9, 9, 4)]
    assert table[3].split(" | ")[1:7] == [f"{loss}.000" for loss in (8, 7, 5, 9, 7, 5)]


def test_a_run_that_ended_early_has_no_losses_from_there_on():
    def run(name, losses, **more):
        curve = [
            {"epoch": e, "steps": e, "seconds": e, "train_loss": loss}
            for e, loss in enumerate(losses)
        ]
        return {"optimizer": name, "curve": curve, "settings": {"epochs": 2}, **more}

    stopped = run("sgd", (9, 5), error="Stopped.")
    table = report.milestones([run("adam", (9, 4, 3)), stopped]).splitlines()
    assert table[0].split(" | ")[1:3] == ["epoch 1", "epoch 2"]
    assert table[3].split(" | ")[1:3] == ["5.000", "–"]


def test_contestants_stand_in_the_order_of_their_losses_and_failures_last():
    def run(name, *losses, **more):
        curve = [{"train_loss": loss} for loss in losses]
        return {"optimizer": name, "curve": curve, **more}

    runs = [run("sgd", 9.0, 3.0), run("muon", error="no"), run("adam", 9.0, 2.0)]
    runs.append(run("sgd", 9.0, 5.0))
    assert list(report.by_optimizer(runs)) == ["adam", "sgd", "muon"]


def test_the_title_says_how_many_seeds_each_ran_with():
    def run(name, seed):
        common = {"data": "curves", "train_images": 9, "batch_size": 3, "epochs": 2}
        point = {"train_loss": 1.0}
        settings = {**common, "seed": seed}
        return {"optimizer": name, "curve": [point], "settings": settings}

    both = [run("sgd", 0), run("adam", 0)]
    assert report.title(both).endswith("2 epochs")
    assert report.title([*both, run("adam", 1)]).endswith(", 1 to 2 seeds")
    more = [run("sgd", 1), run("adam", 1)]
    assert report.title([*both, *more]).endswith(", 2 seeds")


def test_an_adam_that_failed_leaves_the_others_without_a_ratio():
    point = {"train_loss": 1.0, "test_loss": 2.0, "steps": 3, "seconds": 4.0}
    done = {"optimizer": "sgd", "median_step_seconds": 0.5, "curve": [point]}
    failed = {"optimizer": "adam", "median_step_seconds": None, "error": "no"}
    both = [done, {**failed, "curve": []}]
    first, second = report.rows([{**result, "settings": {}} for result in both])
    assert first[-1] == "–"
    assert second[1] == "1 of 1 failed: no"


def test_runs_on_a_busy_machine_count_for_losses_alone():
    def run(seconds, loss, loaded):
        start = {"epoch": 0, "steps": 0, "seconds": 0.0, "train_loss": 9.0}
        end = {"epoch": 1, "steps": 3, "seconds": seconds, "train_loss": loss}
        return {
            "optimizer": "adam",
            "median_step_seconds": seconds / 3,
            "curve": [{**point, "test_loss": loss} for point in (start, end)],
            "settings": {"epochs": 1, "loaded": loaded},
        }

    quiet, busy = run(6.0, 4.0, False), run(60.0, 2.0, True)
    (row,) = report.rows([quiet, busy])
    assert row[1] == "3.000 (2.000 to 4.000)"
    assert row[4:] == ("6.0", "2.000", "1.00")
    *_, marks = report.milestones([quiet, busy]).splitlines()
    assert marks.split(" | ")[1] == "3.000"
    assert "4.000" in marks.split(" | ")[2:]
    (row,) = report.rows([busy])
    assert row[4:] == ("–", "–", "–")
