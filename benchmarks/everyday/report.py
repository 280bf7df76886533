"""Tables and a picture of the everyday problems, made from results alone.

A contestant with rates counts with the best of them for each problem and each loss.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from benchmarks.everyday.training import CONTESTANTS
from benchmarks.report import markdown_table

Results = Sequence[dict[str, Any]]  # one for each problem and contestant
Equal = Literal["steps", "seconds"]
LEAST = 1e-6  # smaller losses count as this one where losses are compared
FACTORS = (1.1, 1.5, 2.0)


def losses(result: dict[str, Any], equal: Equal, part: str) -> list[float]:
    """The loss of each seed in the end, with the best rate."""
    by_rate: dict[float, list[float]] = {}
    for run in result["runs"]:
        if run["equal"] == equal:
            loss = run[part] if run[part] is not None else np.inf
            by_rate.setdefault(run["rate"], []).append(loss)
    return min(by_rate.values(), key=np.mean)


def means(results: Results, equal: Equal, part: str) -> dict[str, dict[str, float]]:
    """The mean loss over seeds, by problem and contestant."""
    found: dict[str, dict[str, float]] = {}
    for result in results:
        mean = float(np.mean(losses(result, equal, part)))
        found.setdefault(result["problem"], {})[result["contestant"]] = mean
    return found


def table(results: Results, equal: Equal, part: str) -> str:
    """The mean losses in Markdown, the lowest of a problem in bold."""
    found = means(results, equal, part)
    names = list(dict.fromkeys(r["contestant"] for r in results))
    apart = {r["problem"] for r in results if r["apart"]}
    body = []
    for problem, row in found.items():
        least = min(row.values())
        cells = [
            f"**{row[n]:.3g}**" if row[n] == least else f"{row[n]:.3g}" for n in names
        ]
        body.append((f"{problem} *" if problem in apart else problem, *cells))
    return markdown_table((_title(equal, part), *map(_label, names)), body)


def _title(equal: Equal, part: str) -> str:
    kind = {"train": "training", "valid": "validation"}[part]
    return f"{kind} loss at equal {equal}"


def _label(name: str) -> str:
    return CONTESTANTS[name].label if name in CONTESTANTS else name


def _untuned(results: Results) -> list[str]:
    """The contestants that ran with nothing set."""
    tuned = {r["contestant"] for r in results if any(run["rate"] for run in r["runs"])}
    names = dict.fromkeys(r["contestant"] for r in results)
    return [name for name in names if name not in tuned]


def profile(results: Results, equal: Equal, part: str) -> dict[str, np.ndarray]:
    """How many times the best contestant's loss each has, one number a problem."""
    found = means(results, equal, part)
    names = list(dict.fromkeys(r["contestant"] for r in results))
    rows = np.array([[row[name] for name in names] for row in found.values()])
    rows = np.maximum(rows, LEAST)
    ratios = rows / rows.min(axis=1, keepdims=True)
    return dict(zip(names, ratios.T, strict=True))


def shares(results: Results) -> str:
    """On which share of the problems each is within some factors of the best."""
    body = []
    for equal, part in _kinds():
        for name, ratios in profile(results, equal, part).items():
            within = [f"{np.mean(ratios <= factor):.0%}" for factor in FACTORS]
            body.append((f"{_label(name)}, {_title(equal, part)}", *within))
    columns = [f"within {factor} of the best" for factor in FACTORS]
    return markdown_table(("share of the problems", *columns), body)


def _kinds() -> list[tuple[Equal, str]]:
    return [
        ("steps", "train"),
        ("steps", "valid"),
        ("seconds", "train"),
        ("seconds", "valid"),
    ]


def no_worse(results: Results, name: str, than: str, equal: Equal, part: str) -> str:
    """On how many problems one contestant's loss is at or below another's."""
    found = means(results, equal, part).values()
    count = sum(row[name] <= row[than] for row in found)
    return f"{count} of {len(found)}"


def comparisons(results: Results, only: str | None = None) -> str:
    """How often those with nothing set, or one, are at or below each rival."""
    groups: dict[str, Callable[[dict[str, Any]], bool]] = {
        "problems": lambda result: not result["apart"],
        "problems kept apart": lambda result: result["apart"],
    }
    names = list(dict.fromkeys(r["contestant"] for r in results))
    untuned = _untuned(results)
    rivals = [name for name in names if name not in untuned]
    body = []
    for ours_name in [only] if only else untuned:
        for rival in rivals:
            for group, belongs in groups.items():
                chosen = [r for r in results if belongs(r)]
                cells = [
                    no_worse(chosen, ours_name, rival, equal, part)
                    for equal, part in _kinds()
                ]
                title = f"{ours_name} against {_label(rival)}, {group}"
                body.append((title, *cells))
    columns = [_title(equal, part) for equal, part in _kinds()]
    return markdown_table(("at or below", *columns), body)


def safety(results: Results) -> str:
    """Whether anything with nothing to set diverged, in Markdown."""
    body = []
    for name in _untuned(results):
        own = [r for r in results if r["contestant"] == name]
        runs = [run for r in own for run in _different(r["runs"])]
        body.append(
            (
                name,
                str(len(runs)),
                f"{max(run['train'] / run['start'] for run in runs):.3f}",
                f"{max(run['highest'] / run['start'] for run in runs):.1f}",
                str(sum(not run["finite"] for run in runs)),
                str(sum(run["skipped"] for run in runs)),
            )
        )
    columns = (
        "with nothing set",
        "runs",
        "highest end / start",
        "highest batch / start",
        "not finite",
        "skipped steps",
    )
    return markdown_table(columns, body)


def _different(runs: Results) -> list[dict[str, Any]]:
    """Each run once: some are at equal steps and at equal seconds alike."""
    return list({(run["seed"], run["steps"]): run for run in runs}.values())


def markdown(results: Results) -> str:
    """All tables."""
    tables = [table(results, equal, part) for equal, part in _kinds()]
    parts = [safety(results), comparisons(results), shares(results), *tables]
    return "\n\n".join(parts)


def plot(results: Results, path: Path) -> None:
    """Draws on which share of the problems each is within a factor of the best."""
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False}):
        figure = Figure(figsize=(9, 6), layout="constrained")
        panels = figure.subplots(2, 2, sharex=True, sharey=True)
        for axes, (equal, part) in zip(panels.flat, _kinds(), strict=True):
            for name, ratios in profile(results, equal, part).items():
                x = np.concatenate([[1.0], np.sort(ratios), [1e3]])
                y = np.concatenate(
                    [[0.0], np.arange(1, len(ratios) + 1), [len(ratios)]]
                )
                axes.step(x, y / len(ratios), where="post", label=_label(name))
            axes.set_title(_title(equal, part), fontsize=10)
            axes.set_xscale("log")
            axes.set_xlim(1, 30)
            axes.grid(alpha=0.3)
        for axes in panels[-1]:
            axes.set_xlabel("loss / the best contestant's")
        for axes in panels[:, 0]:
            axes.set_ylabel("share of the problems")
        panels[0, 0].legend(frameon=False, fontsize=8)
        figure.savefig(path, dpi=150)
