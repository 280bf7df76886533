import jax
import jax.numpy as jnp
import numpy as np
import pytest

from locoprop_optax._utils.every import every, interval, is_due


@pytest.mark.parametrize(
    ("most", "count", "expected"),
    [
        (1, 0, 1),
        (1, 1000, 1),
        (8, 0, 1),
        (8, 15, 1),
        (8, 16, 2),
        (8, 31, 2),
        (8, 32, 4),
        (8, 64, 8),
        (8, 10**6, 8),
        (6, 10**6, 4),
    ],
)
def test_intervals_grow_with_the_steps_up_to_the_longest(most, count, expected):
    assert interval(most, jnp.asarray(count)) == expected


def test_every_turn_is_made_and_nothing_else():
    made = []

    @jax.jit
    def step(count):
        def make():
            jax.debug.callback(made.append, count)
            return count

        return every(4, count, make, lambda: -count)

    for count in range(64):
        result = step(jnp.asarray(count))
        assert result == (count if is_due(4, jnp.asarray(count)) else -count)
    jax.effects_barrier()
    turns = [*range(16), *range(16, 32, 2), *range(32, 64, 4)]
    np.testing.assert_array_equal(sorted(map(int, made)), turns)


def test_what_is_made_at_each_step_is_no_branch():
    traced = jax.make_jaxpr(lambda c: every(1, c, lambda: c, lambda: -c))(0)
    assert not traced.jaxpr.eqns
