"""A saved state of something else is refused, with what differs."""

from functools import partial

import optax
import pytest

import locoprop_optax as loco
from tests.helpers import MLP, regression


def state_of(make, hidden=5):
    loss_fn, params, batch = regression(MLP(hidden=hidden))
    tx = make(loco.layers(loss_fn)(params, batch))
    return {"params": params, "opt_state": tx.init(params), "step": 3}


def as_dictionaries(tree):
    """What a file keeps of a state."""
    if hasattr(tree, "_asdict"):
        tree = tree._asdict()
    if isinstance(tree, tuple):
        tree = dict(enumerate(tree))
    if isinstance(tree, dict):
        return {str(key): as_dictionaries(value) for key, value in tree.items()}
    return tree


@pytest.mark.parametrize(
    "make", [loco.locoprop, partial(loco.locoprop_m, learning_rate=1e-3)]
)
def test_the_same_state_passes(make):
    def clipped(layers):
        return optax.chain(optax.clip_by_global_norm(1.0), make(layers))

    loco.check_state(as_dictionaries(state_of(clipped)), state_of(clipped))


def test_another_model():
    match = (
        r"params/first/kernel: saved as float32\[4, 5\], expected float32\[4, 6\]"
        r"[\s\S]*begin anew"
    )
    with pytest.raises(ValueError, match=match):
        loco.check_state(
            state_of(loco.scale_by_locoprop), state_of(loco.scale_by_locoprop, hidden=6)
        )


def test_another_solver():
    solver = loco.solvers.majorized_newton(1, ema=0.9)
    other = partial(loco.scale_by_locoprop, solver=solver)
    match = (
        r"solver/curvature/total/first/kernel/inner: saved as nothing, expected float32"
    )
    with pytest.raises(ValueError, match=match):
        loco.check_state(state_of(loco.scale_by_locoprop), state_of(other))


def test_a_version_that_lacked_something_lists_the_first_differences():
    state = state_of(loco.locoprop)
    without = {"params": state["params"]}
    with pytest.raises(ValueError, match=r"saved as nothing[\s\S]*and \d+ more"):
        loco.check_state(without, state)
