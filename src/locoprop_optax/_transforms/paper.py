"""The paper's optimizers: a few first-order steps on each local problem."""

from typing import Any

import optax

from locoprop_optax import losses, regularizers, solvers, targets
from locoprop_optax._records.layers import Layers
from locoprop_optax._transforms.fallback import with_fallback
from locoprop_optax._transforms.scale_by_locoprop import scale_by_locoprop
from locoprop_optax._utils.hyperparams import ScalarOrSchedule


def locoprop_m(
    layers: Layers,
    learning_rate: ScalarOrSchedule,
    *,
    activation_learning_rate: ScalarOrSchedule = 10.0,
    num_local_steps: int = 10,
    decay_floor: float = 0.25,
    optimizer: solvers.OptimizerFromRate | None = None,
    regularizer: regularizers.Regularizer | None = None,
    fallback: optax.GradientTransformation | None = None,
    stack_layers: bool | str | None = None,
    precision: str | None = None,
    diagnostics: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""The paper's LocoProp-M: matching losses, a few steps of RMSProp each.

    .. math::
      \theta_\text{new} \approx \arg\min_\theta D_F\big(a(\theta),\,
      f(a_0) - \gamma g\big)

    The defaults are those of the authors' published notebook, for a loss averaged
    over a batch of 1000, to be used with a linear warm-up over 5 % of training and
    a linear decay to zero.

    Args:
      layers: what `layers(loss_fn)` found.
      learning_rate: of the local optimizer, a float or a schedule; 1e-5 in the
        notebook.
      activation_learning_rate: :math:`\gamma > 0`, a float or a schedule.
      num_local_steps: the number of steps on each local problem, at least 1.
      decay_floor: the step size decays linearly within a batch to this share.
      optimizer: the local optimizer, a function from a learning rate. Default:
        RMSProp as TensorFlow 1 defines it, with second-moment decay 0.9 from an
        initial value of 1, momentum 0.999 and epsilon 1e-5 inside the root.
      regularizer: the local regularizer. Default: `regularizers.none()`.
      fallback: a complete optimizer for all parameters that are no layers, and for
        tables that are looked up. Default: one step of the local optimizer along
        :math:`\gamma` times the backprop gradient, which is what one local step is.
      stack_layers: whether equal layers are solved together, as in
        `scale_by_locoprop`.
      precision: of the solver's matrix products, as in `scale_by_locoprop`.
      diagnostics: whether the state holds `LayerDiagnostics`, as in
        `scale_by_locoprop`.

    Returns:
      A transformation whose `update` takes `params` and `intermediates`.

    Raises:
      TypeError: if `num_local_steps` is no Python int; from `update`, if `params` or
        `intermediates` is missing.
      ValueError: if `activation_learning_rate` is not positive or `num_local_steps`
        below 1; from `update`, if the intermediates do not fit the parameters.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, optax
      >>> import locoprop_optax as loco
      >>> model, x = nn.Dense(2), jnp.eye(3)
      >>> loss_fn = lambda params, x: jnp.mean((model.apply(params, x) - 1) ** 2)
      >>> params = model.init(jax.random.key(0), x)
      >>> schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-5, 100, 2000)
      >>> tx = loco.locoprop_m(loco.layers(loss_fn)(params, x), schedule)

    References:
      Amid, Anil, Warmuth, `LocoProp: Enhancing BackProp via Local Loss Optimization
      <https://arxiv.org/abs/2106.06199>`_, 2022, algorithm 1, and the notebook in
      google-research/locoprop.
    """
    return _reference(
        losses.matching_loss(),
        learning_rate,
        activation_learning_rate=activation_learning_rate,
        num_local_steps=num_local_steps,
        decay_floor=decay_floor,
        optimizer=optimizer,
        regularizer=regularizer,
        fallback=fallback,
        layers=layers,
        stack_layers=stack_layers,
        precision=precision,
        diagnostics=diagnostics,
    )


def locoprop_s(
    layers: Layers,
    learning_rate: ScalarOrSchedule,
    *,
    activation_learning_rate: ScalarOrSchedule = 10.0,
    num_local_steps: int = 10,
    decay_floor: float = 0.25,
    optimizer: solvers.OptimizerFromRate | None = None,
    regularizer: regularizers.Regularizer | None = None,
    fallback: optax.GradientTransformation | None = None,
    stack_layers: bool | str | None = None,
    precision: str | None = None,
    diagnostics: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""The paper's LocoProp-S: squared losses, a few steps of RMSProp each.

    .. math::
      \theta_\text{new} \approx \arg\min_\theta
      \tfrac12 \lVert a(\theta) - (a_0 - \gamma g) \rVert^2

    All else is as in `locoprop_m`.

    Args:
      layers: what `layers(loss_fn)` found.
      learning_rate: of the local optimizer, a float or a schedule.
      activation_learning_rate: :math:`\gamma > 0`, a float or a schedule.
      num_local_steps: the number of steps on each local problem, at least 1.
      decay_floor: the step size decays linearly within a batch to this share.
      optimizer: the local optimizer, as in `locoprop_m`.
      regularizer: the local regularizer. Default: `regularizers.none()`.
      fallback: a complete optimizer for all other parameters, as in `locoprop_m`.
      stack_layers: whether equal layers are solved together, as in
        `scale_by_locoprop`.
      precision: of the solver's matrix products, as in `scale_by_locoprop`.
      diagnostics: whether the state holds `LayerDiagnostics`, as in
        `scale_by_locoprop`.

    Returns:
      A transformation whose `update` takes `params` and `intermediates`.

    Raises:
      TypeError: as `locoprop_m`.
      ValueError: as `locoprop_m`.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn
      >>> import locoprop_optax as loco
      >>> model, x = nn.Dense(2), jnp.eye(3)
      >>> loss_fn = lambda params, x: jnp.mean((model.apply(params, x) - 1) ** 2)
      >>> params = model.init(jax.random.key(0), x)
      >>> tx = loco.locoprop_s(loco.layers(loss_fn)(params, x), 1e-5)

    References:
      Amid, Anil, Warmuth, `LocoProp: Enhancing BackProp via Local Loss Optimization
      <https://arxiv.org/abs/2106.06199>`_, 2022, section 3.1.
    """
    return _reference(
        losses.squared_loss(),
        learning_rate,
        activation_learning_rate=activation_learning_rate,
        num_local_steps=num_local_steps,
        decay_floor=decay_floor,
        optimizer=optimizer,
        regularizer=regularizer,
        fallback=fallback,
        layers=layers,
        stack_layers=stack_layers,
        precision=precision,
        diagnostics=diagnostics,
    )


def tensorflow_rmsprop(learning_rate: Any) -> optax.GradientTransformation:
    """RMSProp as TensorFlow 1 defines it, with the settings of the notebook."""
    return optax.rmsprop(
        learning_rate, decay=0.9, eps=1e-5, initial_scale=1.0, momentum=0.999
    )


def _reference(
    loss: losses.LossFactory,
    learning_rate: ScalarOrSchedule,
    *,
    activation_learning_rate: ScalarOrSchedule,
    num_local_steps: int,
    decay_floor: float,
    optimizer: solvers.OptimizerFromRate | None,
    regularizer: regularizers.Regularizer | None,
    fallback: optax.GradientTransformation | None,
    layers: Layers,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """The paper's algorithm with either loss."""
    optimizer = tensorflow_rmsprop if optimizer is None else optimizer
    step = scale_by_locoprop(
        layers,
        loss=loss,
        target=targets.gradient_descent(activation_learning_rate),
        regularizer=regularizer,
        solver=solvers.first_order(
            optimizer, num_local_steps, decay_floor, learning_rate=learning_rate
        ),
        **options,
    )
    if fallback is None:
        gamma = optax.scale_by_learning_rate(activation_learning_rate, flip_sign=False)
        fallback = optax.chain(gamma, optimizer(learning_rate))
    return with_fallback(optax.chain(step, optax.scale(-1.0)), fallback, layers)
