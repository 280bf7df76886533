"""The ready optimizer: LocoProp with a fallback for all other parameters."""

import optax

from locoprop_optax import losses, regularizers, solvers, targets
from locoprop_optax._quadratic.model import incoming, minimize_along
from locoprop_optax._quadratic.trust_region import TrustRegion
from locoprop_optax._records.layers import Layers
from locoprop_optax._transforms.fallback import with_fallback
from locoprop_optax._transforms.scale_by_locoprop import scale_by_locoprop
from locoprop_optax._utils.hyperparams import ScalarOrSchedule, at, check_count


def locoprop(
    layers: Layers,
    learning_rate: ScalarOrSchedule = 1.0,
    *,
    loss: losses.LossFactory | None = None,
    target: targets.Target | None = None,
    regularizer: regularizers.Regularizer | None = None,
    solver: solvers.Solver | None = None,
    trust_region: TrustRegion | None = TrustRegion(),
    refresh_every: int | None = None,
    weight_decay: ScalarOrSchedule = 0.0,
    fallback: optax.GradientTransformation | None = None,
    stack_layers: bool | str | None = None,
    precision: str | None = None,
    diagnostics: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""LocoProp with our best defaults: no rate and no momentum to tune.

    The step :math:`d` of `scale_by_locoprop`, whose length and momentum
    `scale_by_quadratic_model` takes from the Gauss-Newton model of the whole loss:

    .. math::
      z \leftarrow \rho z - \beta d, \qquad
      \theta \leftarrow \theta + \alpha \eta\, z - \eta \lambda_w \theta

    The share :math:`\alpha` is 1 but where the step would be too long for a layer, or
    where the loss would rise after it, as `TrustRegion` says.

    Args:
      layers: what `layers(loss_fn)` found.
      learning_rate: :math:`\eta`, the share of that step, a float or a schedule. A
        decay to zero over the last fifth of the training averages the noise of the last
        batches out. Default: 1, all of it.
      loss: the local loss. Default: `losses.matching_loss()`.
      target: the local target. Default: `targets.natural_gradient(1.0, damping=0.75,
        decay=0.8)`.
      regularizer: the local regularizer. Default: `regularizers.none()`.
      solver: how the problems are solved. Default:
        `solvers.majorized_newton(1, damping=0.3, ema=0.8)`.
      trust_region: how far the model is trusted. A loss that can be below zero needs
        another `least_loss`. None follows the model wherever it leads. Default:
        `TrustRegion()`.
      refresh_every: the number of steps from one to the next that makes curvature and
        inverses anew, as in `scale_by_locoprop`; step size and momentum are measured
        twice as often. Default: 16.
      weight_decay: :math:`\lambda_w \ge 0`, decoupled, for the layers.
      fallback: a complete optimizer for all parameters that are no layers, and for
        tables that are looked up. Default: `optax.adamw(1e-2)`.
      stack_layers: whether equal layers are solved together, as in
        `scale_by_locoprop`.
      precision: of the solver's matrix products, as in `scale_by_locoprop`.
      diagnostics: whether the state holds `LayerDiagnostics`, as in
        `scale_by_locoprop`.

    Returns:
      A transformation whose `update` takes `params` and `intermediates`, from
      `value_and_grad(loss_fn, layers)`. Both belong in one `jax.jit`, so that they
      share the forward pass.

    Raises:
      TypeError: from `update`, if `params` or `intermediates` is missing, or the
        intermediates have no Gauss-Newton model.
      ValueError: from `update`, if the intermediates do not fit the parameters.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, optax
      >>> import locoprop_optax as loco
      >>> model, x = nn.Dense(2), jnp.eye(3)
      >>> loss_fn = lambda params, x: jnp.mean((model.apply(params, x) - 1) ** 2)
      >>> params = model.init(jax.random.key(0), x)
      >>> layers = loco.layers(loss_fn)(params, x)
      >>> tx = loco.locoprop(layers)
      >>> state = tx.init(params)
      >>> capture = loco.value_and_grad(loss_fn, layers)
      >>> loss, grads, intermediates = capture(params, x)
      >>> updates, state = tx.update(
      ...     grads, state, params, intermediates=intermediates)
      >>> bool(loss_fn(optax.apply_updates(params, updates), x) < loss)
      True

    References:
      Amid, Anil, Warmuth, `LocoProp: Enhancing BackProp via Local Loss Optimization
      <https://arxiv.org/abs/2106.06199>`_, 2022; Martens, Grosse, `Optimizing Neural
      Networks with Kronecker-factored Approximate Curvature
      <https://arxiv.org/abs/1503.05671>`_, 2015, for the target and section 7. The
      solver, and putting them together, are ours.
    """
    # None, since optax.inject_hyperparams traces each default that is a number.
    refresh_every = 16 if refresh_every is None else refresh_every
    check_count("refresh_every", refresh_every)
    usual_target = targets.natural_gradient(1.0, damping=0.75, decay=0.8)
    usual_solver = solvers.majorized_newton(1, damping=0.3, ema=0.8)

    def decay(count):
        return -at(learning_rate, count) * at(weight_decay, count)

    local = optax.chain(
        scale_by_locoprop(
            layers,
            loss=loss,
            target=usual_target if target is None else target,
            regularizer=regularizer,
            solver=usual_solver if solver is None else solver,
            refresh_every=refresh_every,
            stack_layers=stack_layers,
            precision=precision,
            diagnostics=diagnostics,
        ),
        minimize_along(
            incoming,
            learning_rate=learning_rate,
            damping=0.0,
            damping_decay=1.0,
            average_decay=0.9,
            measure_every=max(1, refresh_every // 2),
            trust_region=trust_region,
        ),
        optax.add_decayed_weights(decay),
    )
    return with_fallback(local, fallback, layers)
