"""How the steps of a solver follow each other."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend import core

import locoprop_optax as loco
from tests.helpers import MLP

SOLVERS = {
    "first_order": loco.solvers.first_order(optax.sgd(1e-3), num_steps=3),
    "majorized_newton": loco.solvers.majorized_newton(3),
    "mirror_descent": loco.solvers.mirror_descent(3),
}


def loops(jaxpr):
    """The bodies of all loops in a trace."""
    for equation in jaxpr.eqns:
        for inner in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda p: isinstance(p, core.Jaxpr | core.ClosedJaxpr),
        ):
            inner = getattr(inner, "jaxpr", inner)
            if isinstance(inner, core.Jaxpr):
                if equation.primitive.name in ("scan", "while"):
                    yield inner
                yield from loops(inner)


def traced(model, x, solver):
    """The trace of a step with a solver."""
    params = model.init(jax.random.key(0), x)

    def loss_fn(params):
        return jnp.mean(model.apply(params, x) ** 2)

    layers = loco.layers(loss_fn)(params)
    tx = loco.scale_by_locoprop(
        layers, solver=solver, regularizer=loco.regularizers.squared_l2(1.0)
    )

    def step(params, state):
        _, grads, intermediates = loco.value_and_grad(loss_fn, layers)(params)
        return tx.update(grads, state, params, intermediates=intermediates)

    return jax.make_jaxpr(step)(params, tx.init(params)).jaxpr


@pytest.mark.parametrize("name", SOLVERS)
def test_convolutions_stand_in_no_loop(name):
    """XLA's are many times slower there on a CPU."""
    jaxpr = traced(nn.Conv(3, (3, 3)), np.ones((2, 5, 5, 2)), SOLVERS[name])
    assert not any("conv_general_dilated" in str(body) for body in loops(jaxpr))


@pytest.mark.parametrize("name", SOLVERS)
def test_products_are_compiled_once_for_all_steps(name):
    jaxpr = traced(MLP(), np.ones((4, 2)), SOLVERS[name])
    assert any("dot_general" in str(body) for body in loops(jaxpr))
