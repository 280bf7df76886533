import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from locoprop_optax._utils.average import Average


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=8), st.floats(0, 0.99))
def test_the_average_follows_its_formula(seen, decay):
    average = Average.empty({"x": jnp.zeros(2)})
    for number in seen:
        average = average.moved({"x": jnp.full(2, number)}, decay)
    powers = decay ** np.arange(len(seen))[::-1]
    expected = np.sum(powers * seen) / np.sum(powers)
    np.testing.assert_allclose(average.value()["x"], expected, rtol=1e-4, atol=1e-4)


def test_without_decay_it_is_the_last():
    average = Average.empty(jnp.zeros(()))
    for number in (3.0, 5.0):
        average = average.moved(jnp.asarray(number), 0.0)
    assert average.value() == 5
