"""How far the quadratic model of a batch's loss is followed."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from locoprop_optax._quadratic.linearization import PlaneModel
from locoprop_optax._utils.hyperparams import check_positive, check_share
from locoprop_optax._utils.reductions import norms


@dataclass(frozen=True)
class TrustRegion:
    r"""How far `scale_by_quadratic_model` follows the model of a batch's loss.

    The model holds near the parameters, and for the batch that it is made of. Where a
    softmax or a sigmoid saturates, its curvature vanishes while the slope does not, so
    that its minimum lies anywhere; where a batch is small, it asks for a step that
    suits these examples alone. Hence three bounds and a look:

    1. It promises no fall below the least loss :math:`\ell_0`. With the slopes
       :math:`s` and the curvature :math:`M` in the span of the direction and the last
       step, and :math:`r = \ell - \ell_0`, the curvature is

       .. math:: M + \frac{s s^\top}{2 r},

       which makes the step shorter by :math:`1 + s^\top M^{-1} s / 2r`, and the model's
       minimum :math:`-\tfrac12 s^\top M^{-1} s` by as much, so that it stays above
       :math:`-r`. The term is the Gauss-Newton matrix of the loss as the square of its
       root. It is small where the model promises a small part of the loss. Between two
       measurements a batch has no model but its slope, and the step is shortened by
       :math:`1 + p / 2r`, with the fall p that the slope along it promises. Far past
       the fit, one wrong example else moves all parameters as far as they may.
    2. The momentum :math:`\rho` is between 0 and its largest value; with a learning
       rate :math:`\eta < 1` it may be larger by :math:`1 - \eta`, the part of the last
       step that was not taken and is still ahead.
    3. No parameter moves by more than a share of its norm, or of
       :math:`\sqrt{d_\text{out}}` where that is larger, the norm of a matrix with
       outputs as large as its inputs and of a vector of ones. The whole step is
       shortened for it.
    4. The loss of the same batch, or of that part of it whose curvature is given, is
       looked at after every few steps, and where there is doubt: after a shortened
       step, after a loss that has doubled, and where the slope promises more than the
       whole loss. Where it would rise by more than a thousandth, which rounding can
       cause, the step is halved until it does not, down to 1/64; the next step tries
       1.5 times that share. A step after which it still rises is refused: it is not
       taken, and the velocity is forgotten.

    Attributes:
      least_loss: :math:`\ell_0`, which the loss cannot be below; None if it has none. A
        loss that is below it all the same is not bounded. Default: 0.
      max_momentum: the largest :math:`\rho`, in [0, 1). Default: 0.95.
      max_relative_step: the largest step of a parameter, relative to it. Default:
        0.1.
      shorten: whether steps are shortened and refused. Default: True.

    Raises:
      ValueError: if a number is out of its range.

    Example:
      >>> import locoprop_optax as loco
      >>> region = loco.TrustRegion(max_momentum=0.9, max_relative_step=0.05)
      >>> tx = loco.scale_by_quadratic_model(trust_region=region)
    """

    least_loss: float | None = 0.0
    max_momentum: float = 0.95
    max_relative_step: float = 0.1
    shorten: bool = True

    def __post_init__(self):
        check_share("max_momentum", self.max_momentum)
        check_positive("max_relative_step", self.max_relative_step)

    def bounded(self, model: PlaneModel, value: Array) -> PlaneModel:
        """The model of a batch's loss that promises no fall below the least loss."""
        room = self._room(value)
        return model if room is None else above_least(model, room)

    def _room(self, value: Array) -> Array | None:
        """How far the loss may fall; None if there is no least loss."""
        return None if self.least_loss is None else jnp.abs(value - self.least_loss)

    def minimum(
        self,
        model: PlaneModel,
        beta: Array | None,
        rho: Array | None,
        rate: float | Array = 1.0,
    ) -> tuple[Array, Array]:
        """The step size and the momentum, as far as they are not given.

        Args:
          model: what is made small.
          beta: the step size, if it is given.
          rho: the momentum, if it is given.
          rate: the learning rate, the part of a step that is taken.
        """
        if rho is None:
            _, free = model.minimum(beta, None)
            left = 1.0 - jnp.minimum(rate, 1.0)
            rho = jnp.clip(free, 0.0, self.max_momentum + left)
        return model.minimum(beta, rho)

    def unmeasured(self, promised: Array, value: Array) -> Array:
        """How much of a step is taken of whose batch only the slope is known.

        Args:
          promised: the fall that the slope along the step promises.
          value: the loss.
        """
        room = self._room(value)
        if room is None:
            return jnp.ones_like(value)
        promised = jnp.maximum(promised, 0.0)
        return jnp.where(promised > 0, 2 * room / (2 * room + promised), 1.0)

    def length(self, step: Any, params: Any, rate: float | Array = 1.0) -> Array:
        """How much of a step no parameter moves too far by, if `rate` is taken."""
        longest = rate * relative_length(step, params)
        bound = self.max_relative_step
        return jnp.where(longest > bound, bound / longest, 1.0)


def above_least(model: PlaneModel, room: Array) -> PlaneModel:
    """The model that promises no fall by more than `room`, if that is positive."""
    has_room = room > 0
    added = jnp.outer(model.slopes, model.slopes) / (2 * jnp.where(has_room, room, 1.0))
    return model._replace(matrix=model.matrix + jnp.where(has_room, added, 0.0))


def relative_length(step: Any, params: Any) -> Float[Array, ""]:
    """The longest of the steps of all parameters, relative to the parameter."""
    steps, leaves = map(jax.tree.leaves, (step, params))
    if not leaves:
        return jnp.zeros((), jnp.float32)
    units = np.array([leaf.shape[-1] if leaf.ndim else 1 for leaf in leaves])
    return jnp.max(norms(steps) / jnp.maximum(norms(leaves), units**0.5))
