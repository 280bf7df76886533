"""A rearranged parameter can always be put back."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from locoprop_optax._records.form import Form

SHAPE = (2, 3, 4)
steps = st.lists(
    st.one_of(
        st.sampled_from([(24,), (6, 4), (2, 12), (4, 3, 2), (1, 24), (2, 3, 2, 2)]).map(
            lambda shape: ("reshape", shape)
        ),
        st.randoms(use_true_random=False).map(lambda random: ("transpose", random)),
        st.integers(0, 3).map(lambda axis: ("reverse", axis)),
    ),
    max_size=5,
)


@given(steps)
def test_any_rearrangement_is_what_numpy_does_and_is_undone(steps):
    form, expected = Form(SHAPE), np.arange(24).reshape(SHAPE)
    start = jnp.asarray(expected)
    for kind, what in steps:
        if kind == "reshape":
            form, expected = form.reshape(what), expected.reshape(what)
        elif kind == "transpose":
            order = list(range(expected.ndim))
            what.shuffle(order)
            form, expected = form.transpose(order), expected.transpose(order)
        else:
            axis = what % expected.ndim
            form, expected = form.reverse([axis]), np.flip(expected, axis)
    assert form.result == expected.shape
    np.testing.assert_array_equal(form(start), expected)
    np.testing.assert_array_equal(form.undo(form(start)), start)


def test_equal_rearrangements_are_equal():
    plain = Form(SHAPE)
    assert plain.transpose((1, 0, 2)).transpose((1, 0, 2)) == plain
    assert plain.reshape((6, 4)).reshape((24,)) == plain.reshape((24,))
    assert plain.reshape(SHAPE) == plain
    assert hash(plain.reshape((24,))) == hash(Form(SHAPE).reshape((24,)))


def test_nothing_is_computed_for_a_parameter_as_it_is():
    jaxpr = jax.make_jaxpr(Form(SHAPE))(jnp.ones(SHAPE))
    assert not jaxpr.eqns
