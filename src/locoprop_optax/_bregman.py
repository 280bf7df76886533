"""Bregman divergences of a layer's parameters, as regularizers."""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from locoprop_optax._hyperparams import ScalarOrSchedule, at, check_positive
from locoprop_optax._layers import LayerError, LayerParams
from locoprop_optax._transfers import LOG, Transfer, arsinh
from locoprop_optax.losses import MatchingLoss


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bregman:
    r"""The penalty :math:`\lambda D_\psi(\theta, \theta_0)`, a matching loss.

    Attributes:
      strength: :math:`\lambda`, or a schedule of it.
      mirror: :math:`\nabla\psi` with its potential :math:`\psi`, as a transfer function
        applied to the weights.
    """

    strength: ScalarOrSchedule
    mirror: Transfer = field(metadata={"static": True})

    @property
    def curvature(self) -> float | Array | None:
        r"""The bound :math:`\lambda \max \psi''`; None if there is none."""
        bound = self.mirror.derivative_bound
        return None if bound is None else self._strength * bound

    @property
    def _strength(self) -> float | Array:
        assert not callable(self.strength)
        return self.strength

    def at(self, count: Array) -> "Bregman":
        """The same with its strength at step `count`."""
        return replace(self, strength=at(self.strength, count))

    def value(self, step: LayerParams, params: LayerParams) -> Float[Array, ""]:
        """The penalty, summed over the layer's parameters."""
        divergence = MatchingLoss(self.mirror).value
        old = {name: self.mirror.function(p) for name, p in params.items()}
        total = sum(divergence(params[name] + s, old[name]) for name, s in step.items())
        return jnp.asarray(self._strength * total)

    def gradient(self, step: LayerParams, params: LayerParams) -> LayerParams:
        r"""The vector :math:`\lambda (\nabla\psi(\theta) - \nabla\psi(\theta_0))`."""
        dual = self.mirror.function
        return {
            name: self._strength * (dual(params[name] + s) - dual(params[name]))
            for name, s in step.items()
        }

    def mirror_step(
        self, step: LayerParams, gradient: LayerParams, params: LayerParams
    ) -> LayerParams:
        """The next step of `solvers.mirror_descent`."""
        dual, primal = self.mirror.function, self.mirror.inverse
        if primal is None:
            raise LayerError(
                f"mirror_descent needs the inverse of {self.mirror.name!r}. Give it to "
                "the Transfer as `inverse=`."
            )
        return {
            n: primal(dual(params[n] + s) - gradient[n] / self._strength) - params[n]
            for n, s in step.items()
        }


def bregman(strength: ScalarOrSchedule, mirror: Transfer) -> Bregman:
    r"""A Bregman divergence of the new parameters to the old ones.

    .. math::
      R(\Delta) = \lambda \big[ \psi(\theta_0 + \Delta) - \psi(\theta_0)
      - \langle \nabla\psi(\theta_0), \Delta \rangle \big]

    Args:
      strength: :math:`\lambda > 0`, a float or a schedule.
      mirror: the transfer function :math:`\nabla\psi` on weights, with its `potential`
        :math:`\psi`; its `inverse` is needed by `solvers.mirror_descent`, its
        `derivative_bound` by `solvers.majorized_newton`.

    Returns:
      The regularizer.

    Raises:
      ValueError: if `strength` is not positive.

    Example:
      >>> import locoprop_optax as loco
      >>> r = loco.regularizers.bregman(0.5, loco.losses.as_transfer("identity"))
      >>> r.curvature
      0.5

    References:
      Amid, Anil, Warmuth, 2022, section 2.
    """
    check_positive("strength", strength)
    return Bregman(strength, mirror)


def relative_entropy(strength: ScalarOrSchedule) -> Bregman:
    r"""The unnormalized relative entropy to the old parameters, which are positive.

    .. math::
      R(\Delta) = \lambda \sum \theta \log \frac{\theta}{\theta_0} - \theta + \theta_0

    With `solvers.mirror_descent` it gives the unnormalized exponentiated gradient,
    :math:`\theta_0\, e^{-\nabla / \lambda}`. All parameters of a local layer, its bias
    too, have to be positive and stay so; others become NaN.

    Args:
      strength: :math:`\lambda > 0`, a float or a schedule.

    Returns:
      The regularizer. Its curvature has no bound.

    Raises:
      ValueError: if `strength` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> import locoprop_optax as loco
      >>> r = loco.regularizers.relative_entropy(1.0)
      >>> step, params = {"kernel": jnp.array([1.0])}, {"kernel": jnp.array([1.0])}
      >>> round(float(r.value(step, params)), 4)  # 2 log 2 - 2 + 1
      0.3863

    References:
      Kivinen, Warmuth, "Exponentiated Gradient versus Gradient Descent for Linear
      Predictors", 1997.
    """
    return bregman(strength, LOG)


def signed_entropy(strength: ScalarOrSchedule, scale: float = 1.0) -> Bregman:
    r"""The relative entropy for parameters of both signs.

    .. math::
      \psi(\theta) = \theta \operatorname{arsinh}\frac{\theta}{\beta}
      - \sqrt{\theta^2 + \beta^2}

    With `solvers.mirror_descent` it gives the exponentiated gradient EG± for
    :math:`\theta = \theta^+ - \theta^-` with :math:`\theta^+ \theta^- = \beta^2 / 4`.
    Large weights move in proportion to their size, small ones additively.

    Args:
      strength: :math:`\lambda > 0`, a float or a schedule.
      scale: :math:`\beta > 0`, the size of weights that count as small.

    Returns:
      The regularizer. The bound of its curvature is :math:`\lambda / \beta`.

    Raises:
      ValueError: if `strength` or `scale` is not positive.

    Example:
      >>> import locoprop_optax as loco
      >>> loco.regularizers.signed_entropy(0.5, scale=0.1).curvature
      5.0

    References:
      Ghai, Hazan, Singer, `Exponentiated Gradient Meets Gradient Descent
      <https://arxiv.org/abs/1902.01903>`_, 2020.
    """
    check_positive("scale", scale)
    return bregman(strength, arsinh(scale))
