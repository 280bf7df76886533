r"""Step size and momentum from the damped Gauss-Newton model of the loss.

With the model's outputs :math:`\Phi(\theta)`, a loss :math:`\ell(\Phi)`, the Jacobian
:math:`J` of the outputs and the Hessian :math:`H` of the loss in them, the model of the
change that a step :math:`s` makes is

.. math::
  q(s) = \nabla^\top s + \tfrac12 s^\top (J^\top H J + \lambda I)\, s .

References:
  Henriques, Ehrhardt, Albanie, Vedaldi, `Small Steps and Giant Leaps: Minimal Newton
  Solvers for Deep Learning <https://arxiv.org/abs/1805.08095>`_, 2019, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from locoprop_optax._quadratic.averaging import averaged, decay_at
from locoprop_optax._quadratic.backtracking import (
    LEAST,
    backtrack,
    first_share,
    in_doubt,
    rises,
)
from locoprop_optax._quadratic.linearization import (
    PlaneModel,
    on_the_plane,
    slopes_along,
)
from locoprop_optax._quadratic.near import Near
from locoprop_optax._quadratic.trust_region import TrustRegion
from locoprop_optax._transforms.keep_finite import keep_finite
from locoprop_optax._utils.average import Average
from locoprop_optax._utils.dtypes import at_least_float32
from locoprop_optax._utils.every import every, is_due
from locoprop_optax._utils.hyperparams import (
    ScalarOrSchedule,
    at,
    check_count,
    check_not_negative,
    check_positive,
    check_share,
    check_static,
)
from locoprop_optax._utils.reductions import all_finite
from locoprop_optax._utils.sharding import check_replicas


class ScaleByQuadraticModelState(NamedTuple):
    r"""State of `scale_by_quadratic_model` and of `curveball`, within `keep_finite`.

    Attributes:
      count: the number of updates so far.
      velocity: the last step :math:`z`, before the learning rate.
      damping: :math:`\lambda`.
      value: the loss before the last step.
      step_size: :math:`\beta` of the last step.
      momentum: :math:`\rho` of the last step.
      average: the averaged model in the plane.
      ratio: the loss's change over the model's, for the share of the step that was
        taken, when it was last compared; 0 before and where the model promised no fall.
      share: :math:`\alpha` of the last step.
      refused: whether the last step was not taken, because of the loss after it.
    """

    count: Int[Array, ""]
    velocity: Any
    damping: Float[Array, ""]
    value: Float[Array, ""]
    step_size: Float[Array, ""]
    momentum: Float[Array, ""]
    average: Average
    ratio: Float[Array, ""]
    share: Float[Array, ""]
    refused: Bool[Array, ""]


Direction = Callable[[Near, Any, Any, Array], Any]


def scale_by_quadratic_model(
    learning_rate: ScalarOrSchedule = 1.0,
    damping: float = 1.0,
    *,
    step_size: ScalarOrSchedule | None = None,
    momentum: ScalarOrSchedule | None = None,
    damping_decay: float = 0.95,
    average_decay: float = 0.0,
    measure_every: int = 1,
    adapt_every: int = 5,
    trusted: tuple[float, float] = (0.25, 0.75),
    damping_range: tuple[float, float] = (1e-8, 1e8),
    trust_region: TrustRegion | None = TrustRegion(),
) -> optax.GradientTransformationExtraArgs:
    r"""Step size and momentum for any direction, with no rate to tune.

    With the incoming direction :math:`d`, signed like a gradient, and the last step
    :math:`z`, it returns :math:`\eta` times the step in their span that minimizes
    :math:`q`:

    .. math::
      z \leftarrow \rho z - \beta d, \qquad
      \begin{pmatrix} \beta \\ -\rho \end{pmatrix} =
      \begin{pmatrix} d^\top \hat H d & z^\top \hat H d \\
        z^\top \hat H d & z^\top \hat H z \end{pmatrix}^{-1}
      \begin{pmatrix} \nabla^\top d \\ \nabla^\top z \end{pmatrix}, \qquad
      \hat H = J^\top H J + \lambda I .

    A batch's model holds near the parameters and for that batch. `TrustRegion` says how
    far it is followed, and what is done with a step after which the loss would rise.

    Every few steps the change of the loss is compared with :math:`q`, and
    :math:`\lambda` adapted. The comparison is of the step that it returns, for
    `optax.apply_updates`: what follows it in a chain is not seen. It costs two
    forward-mode products a step, and a pass forward for each comparison. Where z adds
    nothing to the span, as at the first step, it minimizes along d alone.

    Where the direction is damped by itself, as LocoProp's are, `damping=0.0` and
    `damping_decay=1.0` do best: :math:`\lambda` stays at zero.

    Args:
      learning_rate: :math:`\eta > 0`, a float or a schedule.
      damping: :math:`\lambda \ge 0` at the start; the state holds it from then on.
      step_size: :math:`\beta`, to fix it. Default None: from the model.
      momentum: :math:`\rho`, to fix it. Default None: from the model.
      damping_decay: what :math:`\lambda` is multiplied by, for each step since the last
        comparison, after a good one, and divided by after a bad one; in (0, 1]. 1 keeps
        it.
      average_decay: how much of the model in the plane is kept from one to the next, in
        [0, 1): step size and momentum are then those that would have been best for the
        last batches, and not for the one that the direction is made of, which promises
        more than the next will hold. At first less is kept, so that the average is over
        a quarter of the steps so far. Default: 0, each by itself.
      measure_every: the number of steps from one to the next whose step size and
        momentum come from the model; those between keep them, and cost no forward-mode
        product. At first it is each step, then at most an eighth of the steps so far.
        Default: 1, all steps.
      adapt_every: the number of steps from one comparison to the next; the first step
        has one.
      trusted: the ratio of the loss's change to the model's below which
        :math:`\lambda` grows, and that above which it shrinks. It grows, too, after a
        step that was shortened or refused.
      damping_range: the least and the largest :math:`\lambda`.
      trust_region: how far the model is trusted. None follows it wherever it leads.
        Default: `TrustRegion()`.

    Returns:
      A transformation whose `update` takes `params`, `model_fn`, a function from
      parameters to the model's outputs, any tree, and `loss_fn`, one from outputs to a
      scalar, convex and twice differentiable; outputs of fewer bits reach it in
      float32. Both are closed over the batch. `intermediates` with the loss's
      curvature can take their place, from
      `value_and_grad(loss_fn, layers)`. It stands behind `keep_finite`: a
      batch that leads to something not finite changes nothing. A step to where the loss
      is not finite is refused, the velocity forgotten, and :math:`\lambda` grows. Both
      are counted: `optax.tree.get(state, "skipped_steps")`.

    Raises:
      TypeError: if `adapt_every` is no Python int; from `update`, if `params` is
        missing, or the curvature and one of the functions.
      ValueError: if a number is out of its range.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, optax
      >>> import locoprop_optax as loco
      >>> model, x = nn.Dense(2), jnp.eye(3)
      >>> model_fn = lambda params: model.apply(params, x)
      >>> loss_fn = lambda outputs: jnp.mean((outputs - 1) ** 2)
      >>> total = lambda params: loss_fn(model_fn(params))
      >>> params = model.init(jax.random.key(0), x)
      >>> layers = loco.layers(total)(params)
      >>> tx = optax.chain(
      ...     loco.scale_by_locoprop(layers), loco.scale_by_quadratic_model())
      >>> loss, grads, intermediates = loco.value_and_grad(total, layers)(params)
      >>> updates, state = tx.update(
      ...     grads, tx.init(params), params, intermediates=intermediates,
      ...     model_fn=model_fn, loss_fn=loss_fn)
      >>> bool(total(optax.apply_updates(params, updates)) < loss)
      True

    References:
      Henriques et al., 2019, equations 17 to 20; Martens, Grosse, `Optimizing Neural
      Networks with Kronecker-factored Approximate Curvature
      <https://arxiv.org/abs/1503.05671>`_, 2015, sections 6 and 7.
    """
    return keep_finite(
        minimize_along(
            incoming,
            learning_rate=learning_rate,
            damping=damping,
            step_size=step_size,
            momentum=momentum,
            damping_decay=damping_decay,
            average_decay=average_decay,
            measure_every=measure_every,
            adapt_every=adapt_every,
            trusted=trusted,
            damping_range=damping_range,
            trust_region=trust_region,
        )
    )


def incoming(near: Near, updates: Any, velocity: Any, damping: Array) -> Any:
    """The direction that comes in."""
    del near, velocity, damping
    return updates


def minimize_along(
    direction: Direction,
    *,
    learning_rate: ScalarOrSchedule,
    damping: float,
    damping_decay: float,
    step_size: ScalarOrSchedule | None = None,
    momentum: ScalarOrSchedule | None = None,
    average_decay: float = 0.0,
    measure_every: int = 1,
    adapt_every: int = 5,
    trusted: tuple[float, float] = (0.25, 0.75),
    damping_range: tuple[float, float] = (1e-8, 1e8),
    trust_region: TrustRegion | None = TrustRegion(),
) -> optax.GradientTransformationExtraArgs:
    """Minimizes the damped model over the span of a direction and the last step.

    A step is not finite where something that it is made of is not; the optimizer that
    this is a part of stands behind `keep_finite`.

    Args:
      direction: from (what is known of the loss, updates, last step, damping) to the
        direction.
      learning_rate: as in `scale_by_quadratic_model`, as all others.
      damping: as there.
      damping_decay: as there.
      step_size: as there.
      momentum: as there.
      average_decay: as there.
      measure_every: as there.
      adapt_every: as there.
      trusted: as there.
      damping_range: as there.
      trust_region: as there.
    """
    check_positive("learning_rate", learning_rate)
    check_not_negative("damping", damping)
    check_static("average_decay", average_decay)
    check_share("average_decay", average_decay)
    check_count("measure_every", measure_every)
    check_count("adapt_every", adapt_every)
    if isinstance(damping_decay, int | float) and not 0 < damping_decay <= 1:
        raise ValueError(f"damping_decay must be in (0, 1], got {damping_decay}.")
    _check_interval("trusted", trusted)
    _check_interval("damping_range", damping_range)
    factor = damping_decay**adapt_every
    is_known = isinstance(damping, int | float) and isinstance(factor, int | float)
    is_undamped = is_known and damping == 0 and factor == 1  # and stays so

    def adapted(strength, ratio, compared, whole):
        grows = (compared & ~(ratio >= trusted[0])) | ~whole
        shrinks = compared & whole & (ratio > trusted[1])
        scale = jnp.where(grows, 1 / factor, jnp.where(shrinks, factor, 1.0))
        bounded = jnp.clip(strength * scale, *damping_range)
        return jnp.where(factor == 1, strength, bounded)

    def init(params):
        def zero():
            return jnp.zeros((), jnp.float32)

        return ScaleByQuadraticModelState(
            count=jnp.zeros((), jnp.int32),
            velocity=jax.tree.map(jnp.zeros_like, at_least_float32(params)),
            damping=jnp.asarray(damping, jnp.float32),
            value=zero(),
            step_size=zero(),
            momentum=zero(),
            average=Average.empty(PlaneModel.flat(slopes_along(None, [params]))),
            ratio=zero(),
            share=jnp.ones((), jnp.float32),
            refused=jnp.asarray(False),
        )

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        model_fn: Any = None,
        loss_fn: Any = None,
        intermediates: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, ScaleByQuadraticModelState]:
        del extra_args
        if params is None:
            raise TypeError("update needs `params`.")
        check_replicas()
        near = Near.of(params, model_fn, loss_fn, intermediates)
        z, strength, value = state.velocity, state.damping, near.value
        d = direction(near, updates, z, strength)
        rate = at(learning_rate, state.count)
        dtype = state.average.weight.dtype
        slopes = slopes_along(near.gradient, [d, z])

        def measured():
            model = on_the_plane(
                near.linearize(),
                slopes=None if near.gradient is None else slopes,
                plane=[d, z],
                damping=None if is_undamped else strength,
            ).astype(dtype)
            beta, rho = (
                None if fixed is None else jnp.asarray(at(fixed, state.count))
                for fixed in (step_size, momentum)
            )
            decay = decay_at(average_decay, measure_every, state.count)
            if trust_region is None:
                average = averaged(state.average, model, decay)
                beta, rho = average.value().minimum(beta, rho)
            else:
                bounded = trust_region.bounded(model, value)
                average = averaged(state.average, bounded, decay)
                beta, rho = trust_region.minimum(average.value(), beta, rho, rate)
            return beta.astype(dtype), rho.astype(dtype), model, average

        def as_before():
            model = PlaneModel.flat(slopes).astype(dtype)
            beta, rho = state.step_size.astype(dtype), state.momentum.astype(dtype)
            return beta, rho, model, state.average

        beta, rho, model, average = every(
            measure_every, state.count, measured, as_before
        )
        moved = jax.tree.map(
            lambda v, u: (rho * v - beta * u.astype(v.dtype)).astype(v.dtype), z, d
        )
        now = is_due(measure_every, state.count)
        slope = model.slope(beta, rho)
        whole = jnp.ones_like(state.share)
        if trust_region is not None:
            whole = trust_region.length(moved, params, rate)
            fraction = trust_region.unmeasured(-rate * whole * slope, value)
            whole = jnp.where(now, whole, whole * fraction)

        def times(length, like):
            return jax.tree.map(
                lambda v, p: (length.astype(v.dtype) * v).astype(p.dtype), moved, like
            )

        def change_after(length):
            return near.linearize().loss_at(times(length * rate, params)) - value

        finite = all_finite((model, value))  # its slopes hold the direction
        first = first_share(state.share)
        compared = now & (state.count % adapt_every == 0)
        doubted = in_doubt(first, value, state.value, whole * slope)
        shortens = trust_region is not None and trust_region.shorten
        looks = finite & (compared | (shortens & doubted))
        length, change = backtrack(
            *(change_after, first * whole, value),
            least=LEAST * whole,
            looks=looks,
            halves=shortens,
        )
        refused = looks & (rises(change, value) if shortens else ~jnp.isfinite(change))
        expected = model.change(length * rate, beta, rho)
        followed = jnp.where(refused, 0.0, _ratio(change, expected))
        ratio = jnp.where(looks & now, followed, state.ratio).astype(jnp.float32)
        as_tried = (length == first * whole) & ~refused
        share = jnp.where(as_tried, first, length / whole)
        length = jnp.where(refused, 0.0, length)
        new_state = ScaleByQuadraticModelState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            velocity=times(length, z),
            damping=adapted(strength, ratio, compared, as_tried),
            value=value.astype(jnp.float32),
            step_size=beta.astype(jnp.float32),
            momentum=rho.astype(jnp.float32),
            average=average,
            ratio=ratio,
            share=share.astype(jnp.float32),
            refused=refused,
        )
        step = times(jnp.where(finite, length * rate, jnp.nan), params)
        return step, new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _ratio(change: Array, expected: Array) -> Array:
    """The loss's change over the model's; 0 where that is no fall."""
    falls = expected < 0
    return jnp.where(falls, change / jnp.where(falls, expected, 1.0), 0.0)


def _check_interval(name: str, interval: tuple[float, float]) -> None:
    low, high = interval
    if not 0 <= low < high:
        raise ValueError(
            f"{name} must be two numbers, the first smaller and not negative, got "
            f"{interval}."
        )
