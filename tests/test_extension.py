"""A loss, a target, a regularizer and a solver of one's own, from outside the package.

Each is one small class or function; nothing inside is touched or registered.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

import locoprop_optax as loco
from tests.helpers import counted, regression, train_step


@dataclass(frozen=True)
class HuberLoss:
    """Squared near the target, linear beyond `width`, before the activation."""

    width: float
    curvature = 1.0
    is_matching = False

    def output(self, preactivations):
        return preactivations

    def project(self, targets):
        return targets

    def value(self, preactivations, targets):
        size = jnp.abs(preactivations - targets)
        inside = jnp.minimum(size, self.width)
        return jnp.sum(inside * (size - 0.5 * inside))

    def gradient(self, preactivations, targets):
        return jnp.clip(preactivations - targets, -self.width, self.width)


def sign_target(distance):
    """Every output is asked to move by the same distance."""

    def update(layer, loss, state, count):
        del loss, count
        return loco.targets.Displacement(distance * jnp.sign(layer.cotangents)), state

    return loco.targets.Target(lambda kernel: (), update)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LogCosh:
    """A penalty that grows slower than a square."""

    strength: float

    @property
    def curvature(self):
        return self.strength

    def at(self, count):
        del count
        return self

    def value(self, step, params):
        del params
        return self.strength * sum(
            jnp.sum(jnp.logaddexp(s, -s) - jnp.log(2.0)) for s in step.values()
        )

    def gradient(self, step, params):
        del params
        return {name: self.strength * jnp.tanh(s) for name, s in step.items()}


def steepest_descent(num_steps):
    """Gradient steps, each with the best length for the curvature bound."""

    def solve_layer(problem):
        def advance(step, _):
            gradient = problem.gradient(step)
            along = problem.linear_map(gradient, problem.inputs)
            squares = sum(jnp.sum(g**2) for g in gradient.values())
            curved = problem.loss.curvature * jnp.sum(along**2)
            length = squares / (curved + problem.regularizer.curvature * squares)
            return {n: step[n] - length * g for n, g in gradient.items()}, None

        return jax.lax.scan(advance, problem.no_step(), length=num_steps)[0]

    def solve(problems, state, count):
        del count
        return problems.map(solve_layer), state

    return loco.solvers.Solver(lambda params: (), solve)


def test_one_of_each_trains_a_model_together():
    loss_fn, params, batch = regression()
    tx = loco.locoprop_momentum(
        0.5,
        loss=lambda transfer: HuberLoss(0.5),
        target=sign_target(0.05),
        regularizer=LogCosh(0.1),
        solver=loco.solvers.limited(steepest_descent(5), 0.3),
        momentum=None,
    )
    step, traces = counted(train_step(loss_fn, tx))
    state = tx.init(params)
    start = loss_fn(params, batch)
    for _ in range(40):
        params, state, loss = step(params, state, batch)
    assert loss < 0.6 * start
    assert len(traces) == 1
