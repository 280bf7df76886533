"""How many kernels a step of each optimizer starts on the deep autoencoder.

A small model's step takes on a GPU less for arithmetic than for the start of kernels.
They are counted in the compiled program, which needs no GPU: `--target FILE` describes
one to `jax[cuda13]`, as `benchmarks/h100.txtpb` does; without it the kernels are those
of the device here. `--times FILE` sets measured steps beside them.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import autoencoder, report
from benchmarks.ceilings import launches
from benchmarks.contestants import CONTESTANTS
from benchmarks.problem import Examples, Task, make_task
from benchmarks.provenance import provenance
from benchmarks.training import Step

NAMES = tuple(
    name
    for name in autoencoder.BENCHMARK.optimizers
    if CONTESTANTS[name].peer is None and name != "lbfgs"  # loops of no known length
)
COLUMNS = ("kernels", "factorizations", "step, ms", "µs a kernel")


def described_gpu(target: Path) -> Any:
    """The device that a file describes."""
    described = topologies.get_topology_desc(
        target.stem, "cuda", target_config=target.read_text(), topology="1x1x1"
    )
    return described.devices[0]


def compiled_for(device: Any, name: str, task: Task, tuned: Mapping[str, Any]) -> str:
    """The program of a contestant's step, compiled for a device."""
    step, there = Step.of(CONTESTANTS[name], task, tuned), SingleDeviceSharding(device)
    batch = Examples(*(part[task.order[0]] for part in task.problem.train))
    carry, batch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there),
        (jax.eval_shape(step.init, task.params), batch),
    )
    return step.compile(carry, batch).as_text()


def rows(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Each optimizer's label and `COLUMNS`."""
    table = []
    for found in sorted(results, key=lambda found: found["kernels"]):
        taken = found["step_seconds"]
        counts = [str(found[column]) for column in COLUMNS[:2]]
        times = ["–", "–"]
        if taken is not None:
            times = [f"{1e3 * taken:.2f}", f"{1e6 * taken / found['kernels']:.0f}"]
        table.append((report.label(found["optimizer"]), *counts, *times))
    return table


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """The table as the docs show it."""
    return report.markdown_table(("optimizer", *COLUMNS), rows(results))


def plot(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Kernels, and beside them the times if there are any."""
    shown = sorted(results, key=lambda found: -found["kernels"])
    names = [report.label(found["optimizer"]) for found in shown]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.barh(names, [found["kernels"] for found in shown])
    right.barh(names, [1e3 * (found["step_seconds"] or 0) for found in shown])
    left.set_xlabel("kernels a step")
    right.set_xlabel("milliseconds a step")
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Counts, writes the results, and shows a table and a picture of them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    autoencoder.add_arguments(parser)
    add = parser.add_argument
    add("--batch-size", type=int, default=1000, help="images a step")
    add("--optimizers", nargs="+", choices=NAMES, default=list(NAMES), help="whose")
    add("--target", type=Path, help="describes a GPU; else the device here")
    add("--times", type=Path, help="results of `benchmarks.autoencoder`")
    add("--output", type=Path, default=Path("out"), help="the folder for results")
    parser.set_defaults(train_size=2000)
    options = parser.parse_args(arguments)
    device = described_gpu(options.target) if options.target else jax.devices()[0]
    problem = autoencoder.load(options)
    task = make_task(problem, steps=2, batch_size=options.batch_size, seed=0)
    timed = report.read_results(options.times) if options.times else []
    measured = {result["optimizer"]: result for result in timed}
    made, results = provenance(), []
    for name in track(options.optimizers, "optimizers"):
        known = measured.get(name, {})
        tuned = known.get("settings", {}).get("tuned", {})
        text = compiled_for(device, name, task, tuned)
        results.append(
            {
                "optimizer": name,
                "device": device.device_kind,
                "kernels": launches(text),
                "factorizations": text.count('custom_call_target="cusolver_potrf'),
                "step_seconds": known.get("median_step_seconds"),
                "made": made,
            }
        )
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "kernels.jsonl"
    report.write_results(results, path)
    table = Table("optimizer", *COLUMNS, title=device.device_kind)
    for row in rows(results):
        table.add_row(*row)
    Console().print(table)
    plot(results, path.with_suffix(".png"))
    print(f"Results: {path}\nPicture: {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
