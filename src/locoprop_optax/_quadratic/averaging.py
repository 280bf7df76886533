"""The model in the plane, averaged over the last batches."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from locoprop_optax._quadratic.linearization import PlaneModel
from locoprop_optax._utils.average import Average
from locoprop_optax._utils.every import interval

WINDOW = 4  # averages reach back over a quarter of all steps, at most
MOST = 10.0  # times the usual curvature


def decay_at(most: float, measure_every: int, count: Int[Array, ""]) -> Array:
    """How much of the average is kept at a step, up to `most`."""
    steps = count.astype(jnp.float32) + 1
    return jnp.clip(1 - WINDOW * interval(measure_every, count) / steps, 0.0, most)


def averaged(
    average: Average, model: PlaneModel, decay: float | Float[Array, ""]
) -> Average:
    """The average with a batch's model.

    The minimum of the sum is what would have been best for all batches, and those of
    which most is to be gained decide. With inverses that are old, a batch's curvature
    along d can be a thousand times the usual; its model then counts less, as it would
    else decide for long.
    """
    weight = jnp.where(average.weight > 0, average.weight, 1.0)
    usual, now = average.total.matrix[0, 0] / weight, model.matrix[0, 0]
    exceeds = (usual > 0) & (now > MOST * usual)
    share = jnp.where(exceeds, MOST * usual / jnp.where(exceeds, now, 1.0), 1.0)
    return average.moved(jax.tree.map(lambda leaf: share * leaf, model), decay)
