"""The small problems of the CurveBall paper: steps until they are solved.

The Rosenbrock function as two residuals, without noise and with noise that is drawn
afresh at every evaluation, and a badly conditioned linear network of two layers (Rahimi
and Recht). Each is started many times; it is solved at the first step that finds a loss
below 1e-4, before it moves. The rates of SGD with momentum and of Adam are the best of
a grid for each problem.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import locoprop_optax as loco
from benchmarks import report
from benchmarks.provenance import provenance

MAX_STEPS = 5000
SOLVED = 1e-4
RATES = tuple(float(rate) for rate in 10.0 ** np.arange(-5, 0.1, 0.5))


class Problem(NamedTuple):
    """A family of least-squares problems.

    Attributes:
      label: what tables call it.
      start: from a random key to the parameters at the start.
      data: from a random key to what stays the same within a run.
      noise: from a random key to the noise of one evaluation.
      residuals: from (parameters, data) to the model's outputs.
      loss: from (outputs, noise) to the loss.
      curveball: CurveBall's settings, those of the paper.
    """

    label: str
    start: Callable[[jax.Array], Any]
    data: Callable[[jax.Array], Any]
    noise: Callable[[jax.Array], jax.Array]
    residuals: Callable[[Any, Any], Any]
    loss: Callable[[Any, jax.Array], jax.Array]
    curveball: dict[str, float]


def rosenbrock(label: str, most: float) -> Problem:
    """The function (1 - u)² + 100 ε (v - u²)², ε up to `most`; 0 for ε = 1."""

    def noise(key):
        return most * jax.random.uniform(key) if most else jnp.ones(())

    return Problem(
        label,
        start=lambda key: jnp.full(2, -0.25 + (jax.random.uniform(key) - 0.5) / 2),
        data=lambda key: (),
        noise=noise,
        residuals=lambda w, _: jnp.stack([1 - w[0], w[1] - w[0] ** 2]),
        loss=lambda r, epsilon: r[0] ** 2 + 100 * epsilon * r[1] ** 2,
        curveball={"learning_rate": 0.5, "damping": 0.1},
    )


def linear_network() -> Problem:
    """Two linear layers, 6 to 10 to 10, for a map of condition number 1e5."""

    def start(key):
        first, second = jax.random.split(key)
        return {
            "first": jax.random.normal(first, (6, 10)) / np.sqrt(6),
            "second": jax.random.normal(second, (10, 10)) / np.sqrt(10),
        }

    def data(key):
        inputs, matrix = jax.random.split(key)
        x = jax.random.normal(inputs, (1000, 6))
        a = jnp.linspace(1, 1e-5, 10)[:, None] * jax.random.uniform(matrix, (10, 6))
        return x, x @ a.T

    return Problem(
        "linear network",
        start,
        data,
        noise=lambda key: jnp.ones(()),
        residuals=lambda w, d: d[0] @ w["first"] @ w["second"] - d[1],
        loss=lambda r, _: jnp.mean(jnp.sum(r**2, axis=-1)),
        curveball={"learning_rate": 1.0, "damping": 1.0},
    )


PROBLEMS = (
    rosenbrock("Rosenbrock", 0.0),
    rosenbrock("Rosenbrock, ε ~ U[0, 1]", 1.0),
    rosenbrock("Rosenbrock, ε ~ U[0, 3]", 3.0),
    linear_network(),
)


def by_optax(
    make: Callable[[Problem], Any], *, searches: bool = False
) -> Callable[..., Any]:
    """The runs of an Optax optimizer: from (problem, key) to the steps taken.

    Args:
      make: from a problem to the optimizer.
      searches: whether it searches along lines, and takes what that needs.
    """

    def run(problem: Problem, key: jax.Array) -> jax.Array:
        tx = optax.with_extra_args_support(make(problem))
        start_key, data_key, noise_key = jax.random.split(key, 3)
        data, params = problem.data(data_key), problem.start(start_key)

        def model_fn(params):
            return problem.residuals(params, data)

        def loss_at(k):
            noise = problem.noise(jax.random.fold_in(noise_key, k))
            return lambda outputs: problem.loss(outputs, noise)

        def step(carry):
            k, params, state, _ = carry
            loss_fn = loss_at(k)

            def total(params):
                return loss_fn(model_fn(params))

            value, grad = jax.value_and_grad(total)(params)
            extra = (
                {"value": value, "grad": grad, "value_fn": total}
                if searches
                else {"model_fn": model_fn, "loss_fn": loss_fn}
            )
            updates, state = tx.update(grad, state, params, **extra)
            params = optax.apply_updates(params, updates)
            return k + 1, params, state, loss_at(k + 1)(model_fn(params))

        return _steps(step, (0, params, tx.init(params), loss_at(0)(model_fn(params))))

    return run


def levenberg_marquardt(problem: Problem, key: jax.Array) -> jax.Array:
    """Optimistix's solver, step by step; rejected steps count as steps."""
    start_key, data_key, noise_key = jax.random.split(key, 3)
    data, params = problem.data(data_key), problem.start(start_key)
    solver = optx.LevenbergMarquardt(rtol=1e-12, atol=1e-12)

    def weighted(params, k):
        """Residuals whose squares sum to the loss, with the noise of step k."""
        noise = problem.noise(jax.random.fold_in(noise_key, k))
        outputs = problem.residuals(params, data)
        weights = jax.grad(problem.loss)(jnp.ones_like(outputs), noise) / 2
        return jnp.sqrt(weights) * outputs, None

    options: dict[str, Any] = {}
    struct = jax.eval_shape(weighted, params, 0)
    state = solver.init(weighted, params, 0, options, *struct, frozenset())
    arrays, rest = eqx.partition(state, eqx.is_array)  # the state holds functions, too

    def loss(params, k):
        return jnp.sum(weighted(params, k)[0] ** 2)

    def step(carry):
        k, params, arrays, _ = carry
        params, state, _ = solver.step(
            weighted, params, k, options, eqx.combine(arrays, rest), frozenset()
        )
        return k + 1, params, eqx.filter(state, eqx.is_array), loss(params, k + 1)

    return _steps(step, (0, params, arrays, loss(params, 0)))


def _steps(step: Callable[[Any], Any], carry: Any) -> jax.Array:
    def unfinished(carry):
        k, *_, loss = carry
        return (k < MAX_STEPS) & (loss >= SOLVED) & jnp.isfinite(loss)

    k, *_, loss = jax.lax.while_loop(unfinished, step, carry)
    return jnp.where(loss < SOLVED, k + 1, MAX_STEPS)


METHODS: dict[str, Callable[..., Any]] = {
    "CurveBall": by_optax(
        lambda problem: loco.curveball(**problem.curveball, damping_decay=1.0)
    ),
    "L-BFGS (optax)": by_optax(lambda problem: optax.lbfgs(), searches=True),
    "Levenberg–Marquardt (optimistix)": levenberg_marquardt,
}
TUNED: dict[str, Callable[[float], Callable[..., Any]]] = {
    "SGD with momentum 0.9": lambda rate: by_optax(
        lambda problem: optax.sgd(rate, momentum=0.9)
    ),
    "Adam": lambda rate: by_optax(lambda problem: optax.adam(rate)),
}


def steps_to_solve(
    run: Callable[..., Any], problem: Problem, repeats: int, seed: int
) -> list[int]:
    """The steps of each repeat, one after another."""
    solve = jax.jit(partial(run, problem))
    keys = jax.random.split(jax.random.key(seed), repeats)
    return [int(solve(key)) for key in keys]


def measure(problem: Problem, repeats: int, seed: int, progress: Progress) -> Any:
    """Yields the result of each method on one problem."""
    bar = progress.add_task(problem.label, total=len(METHODS) + len(TUNED))
    for name, run in METHODS.items():
        yield name, {}, steps_to_solve(run, problem, repeats, seed)
        progress.advance(bar)
    for name, make in TUNED.items():
        few = max(2, repeats // 20)
        tried = {
            rate: float(np.mean(steps_to_solve(make(rate), problem, few, seed + 1)))
            for rate in RATES
        }
        best = min(tried, key=lambda rate: tried[rate])
        settings = {"learning_rate": best, "mean_steps_by_rate": tried}
        yield name, settings, steps_to_solve(make(best), problem, repeats, seed)
        progress.advance(bar)


def cell(steps: Sequence[int]) -> str:
    """Mean and standard deviation, and how many were not solved."""
    missing = sum(step >= MAX_STEPS for step in steps)
    if missing == len(steps):
        return "none solved"
    text = f"{np.mean(steps):.1f} ± {np.std(steps):.1f}"
    return f"{text} ({missing} not)" if missing else text


def rows(results: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A row for each method, a column for each problem."""
    found = {(r["method"], r["problem"]): r["steps"] for r in results}
    methods = dict.fromkeys(r["method"] for r in results)
    problems = dict.fromkeys(r["problem"] for r in results)
    return [(m, *(cell(found[m, p]) for p in problems)) for m in methods]


def show(results: Sequence[dict[str, Any]], path: Path) -> None:
    """The table, and a picture of the steps."""
    problems = list(dict.fromkeys(r["problem"] for r in results))
    table = Table("method", *problems, title="steps to a loss below 1e-4")
    for row in rows(results):
        table.add_row(*row)
    Console().print(table)
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axes, problem in zip(
        figure.subplots(1, len(problems), sharey=True), problems, strict=True
    ):
        chosen = [r for r in results if r["problem"] == problem]
        axes.boxplot([r["steps"] for r in chosen], orientation="horizontal")
        axes.set_yticks(range(1, len(chosen) + 1), labels=[r["method"] for r in chosen])
        axes.set(xscale="log", title=problem, xlabel="steps")
        axes.title.set_fontsize(9)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs all, writes the results, and shows a table and a picture of them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.curveball_problems",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--repeats", type=int, default=100, help="starts of each")
    parser.add_argument("--seed", type=int, default=0, help="of the starts")
    parser.add_argument("--output", type=Path, default=Path("out"), help="the folder")
    options = parser.parse_args(arguments)
    made, results = provenance(), []
    with jax.enable_x64(True), Progress() as progress:
        for problem in PROBLEMS:
            for method, settings, steps in measure(
                problem, options.repeats, options.seed, progress
            ):
                results.append(
                    {
                        "problem": problem.label,
                        "method": method,
                        "settings": settings or problem.curveball,
                        "steps": steps,
                        "made": made,
                    }
                )
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / "curveball_problems"
    report.write_results(results, stem.with_suffix(".jsonl"))
    show(results, stem.with_suffix(".png"))


if __name__ == "__main__":
    main()
