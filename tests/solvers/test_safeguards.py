import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import locoprop_optax as loco
from tests.helpers import random_layer, solved


@pytest.mark.parametrize("share", [1e-3, 1e3])
def test_limited_steps(share):
    params, layer = random_layer(0, 6, 4, 3, "tanh")
    newton = loco.solvers.majorized_newton()
    free = solved(loco.scale_by_locoprop(solver=newton), params, layer)
    solver = loco.solvers.limited(newton, share)
    found = solved(loco.scale_by_locoprop(solver=solver), params, layer)
    ratio = optax.tree.norm(found) / optax.tree.norm(free)
    for name, u in free.items():
        np.testing.assert_allclose(found[name], ratio * u, rtol=1e-4)
    if share < 1:
        relative = optax.tree.norm(found) / optax.tree.norm(params)
        np.testing.assert_allclose(relative, share, rtol=1e-4)
    else:
        np.testing.assert_allclose(ratio, 1.0, rtol=1e-6)


def test_limited_leaves_a_layer_of_zeros_free():
    params, layer = random_layer(0, 6, 4, 3)
    params = jax.tree.map(jnp.zeros_like, params)
    solver = loco.solvers.limited(loco.solvers.majorized_newton(), 0.1)
    found = solved(loco.scale_by_locoprop(solver=solver), params, layer)
    assert float(optax.tree.norm(found)) > 0
    with pytest.raises(ValueError, match="max_relative_step must be positive"):
        loco.solvers.limited(solver, 0.0)
