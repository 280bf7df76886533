"""Targets around targets."""

import jax.numpy as jnp

from locoprop_optax._utils.hyperparams import check_share
from locoprop_optax.targets._target import Displacement, Target, zeros_for


def clipped(target: Target) -> Target:
    r"""Another target, moved to the range of the transfer function.

    .. math::
      t = \operatorname{clip}\big(f(a_0) - \delta\big)

    A tanh is then asked for nothing beyond 1, so that each local problem has a finite
    minimum, or its infimum at zero loss. For the squared loss, whose targets are
    pre-activations, it changes nothing.

    Args:
      target: the other target.

    Returns:
      The target.

    Example:
      >>> import locoprop_optax as loco
      >>> target = loco.targets.clipped(loco.targets.gradient_descent(10.0))
    """

    def update(layer, loss, state, count):
        displacement, state = target.update(layer, loss, state, count)
        start = loss.output(layer.preactivations)
        goal = loss.project(start - displacement.outputs)
        return Displacement(start - goal), state

    return target._replace(update=update)


def momentum(target: Target, decay: float = 0.9) -> Target:
    r"""Another target, with momentum in the mean over the examples.

    Examples differ from batch to batch; what can be remembered of their displacements
    :math:`\delta_i` is the mean. Each is moved on by its velocity,

    .. math::
      \delta_i' = \delta_i + \mu v, \qquad
      v \leftarrow \mu v + \operatorname{mean}_i \delta_i ,

    so that the mean displacement is the new velocity.

    Args:
      target: the other target.
      decay: :math:`\mu` in [0, 1).

    Returns:
      The target. Its state holds :math:`v`, one number for each unit, beside the state
      of the other target.

    Raises:
      ValueError: if `decay` is not in [0, 1).

    Example:
      >>> import locoprop_optax as loco
      >>> target = loco.targets.momentum(loco.targets.normalized(0.05), 0.9)

    References:
      Polyak, "Some methods of speeding up the convergence of iteration methods", 1964.
    """
    check_share("decay", decay)

    def init(layer, params):
        velocity = zeros_for(layer, params, params["kernel"].shape[-1])
        return target.init(layer, params), velocity

    def update(layer, loss, state, count):
        inner, velocity = state
        units = layer.cotangents.shape[-1]
        displacement, inner = target.update(layer, loss, inner, count)
        kept = decay * velocity
        outputs = displacement.outputs + kept
        mean = jnp.mean(displacement.outputs.reshape(-1, units), axis=0)
        velocity = kept + mean.astype(kept.dtype)
        return Displacement(outputs), (inner, velocity)

    def refresh(layer, loss, state, count):
        inner, velocity = state
        return target.refresh(layer, loss, inner, count), velocity

    return Target(init, update, refresh, target.samples)
