r"""CurveBall: momentum and curvature in one vector."""

import jax
import optax

from locoprop_optax._quadratic.model import minimize_along
from locoprop_optax._transforms.keep_finite import keep_finite
from locoprop_optax._utils.hyperparams import ScalarOrSchedule


def curveball(
    learning_rate: ScalarOrSchedule = 1.0,
    damping: float = 10.0,
    *,
    step_size: ScalarOrSchedule | None = None,
    momentum: ScalarOrSchedule | None = None,
    damping_decay: float = 0.999,
    adapt_every: int = 5,
    trusted: tuple[float, float] = (0.5, 1.5),
    damping_range: tuple[float, float] = (1e-8, 1e8),
) -> optax.GradientTransformationExtraArgs:
    r"""CurveBall: a step that is improved once, on the Gauss-Newton model, each batch.

    With the model's outputs :math:`\Phi`, their Jacobian :math:`J`, and the gradient
    :math:`\nabla \ell` and Hessian :math:`H` of the loss in them,

    .. math::
      d = J^\top (H J z + \nabla \ell) + \lambda z, \qquad
      z \leftarrow \rho z - \beta d, \qquad
      \theta \leftarrow \theta + \eta z ,

    where :math:`\beta` and :math:`\rho` minimize the damped model over the span of
    :math:`z` and :math:`d`, as `scale_by_quadratic_model` does. Memory is that of SGD
    with momentum; a step takes the products by :math:`J` of two more forward passes.

    Args:
      learning_rate: :math:`\eta > 0`, a float or a schedule.
      damping: :math:`\lambda \ge 0` at the start, usually 1 to 10. With the default
        `damping_decay` it takes about 2300 steps to change by a factor of 10, so it is
        a real hyperparameter.
      step_size: :math:`\beta`, to fix it. Default None: from the model.
      momentum: :math:`\rho`, to fix it. Default None: from the model.
      damping_decay: as in `scale_by_quadratic_model`; 1 keeps :math:`\lambda`.
      adapt_every: as in `scale_by_quadratic_model`.
      trusted: as in `scale_by_quadratic_model`.
      damping_range: as in `scale_by_quadratic_model`.

    Returns:
      A transformation whose `update` takes `params`, `model_fn` and `loss_fn`, as
      `scale_by_quadratic_model`. Its updates are ready for `optax.apply_updates`. The
      gradients may be passed in, and are then used, so that terms beside the loss are
      allowed for; with None in their place they are computed inside.

    Raises:
      TypeError: as `scale_by_quadratic_model`.
      ValueError: as `scale_by_quadratic_model`.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, optax
      >>> import locoprop_optax as loco
      >>> model, x = nn.Dense(2), jnp.eye(3)
      >>> model_fn = lambda params: model.apply(params, x)
      >>> loss_fn = lambda outputs: jnp.mean((outputs - 1) ** 2)
      >>> params = model.init(jax.random.key(0), x)
      >>> tx = loco.curveball(damping=0.1)
      >>> state = tx.init(params)
      >>> for _ in range(9):
      ...     updates, state = tx.update(
      ...         None, state, params, model_fn=model_fn, loss_fn=loss_fn)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(loss_fn(model_fn(params)) < 0.01)
      True

    References:
      Henriques, Ehrhardt, Albanie, Vedaldi, `Small Steps and Giant Leaps: Minimal
      Newton Solvers for Deep Learning <https://arxiv.org/abs/1805.08095>`_, ICCV 2019,
      algorithm 1 and equations 17 to 20.
    """

    def improve(near, gradients, z, strength):
        linear = near.linearize()
        curved = linear.hvp(linear.jvp(z))
        if gradients is None:
            curved = optax.tree.add(curved, linear.loss_gradient)
        direction = jax.tree.map(
            lambda pulled, v: pulled + strength * v, linear.vjp(curved), z
        )
        if gradients is not None:
            direction = optax.tree.add(direction, gradients)
        return direction

    return keep_finite(
        minimize_along(
            improve,
            learning_rate=learning_rate,
            damping=damping,
            step_size=step_size,
            momentum=momentum,
            damping_decay=damping_decay,
            adapt_every=adapt_every,
            trusted=trusted,
            damping_range=damping_range,
            trust_region=None,
        )
    )
