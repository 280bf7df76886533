"""What knows Flax's Linen: its training state, and its models as functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax
from flax.training import train_state

from locoprop_optax._quadratic.linearization import ModelAndLoss
from locoprop_optax._records.intermediates import Intermediates

__all__ = ["TrainState", "model_and_loss"]


def model_and_loss(
    apply_fn: Callable[..., Any],
    loss_fn: Callable[[Any], jax.Array],
    *inputs: Any,
    collections: Mapping[str, Any] | None = None,
    mutable: Sequence[str] = (),
    **options: Any,
) -> ModelAndLoss:
    """Parts a loss into a model and a loss of its outputs, for one batch.

    `curveball` and `scale_by_quadratic_model` take the two functions.

    Args:
      apply_fn: the model's `apply`.
      loss_fn: from the model's outputs to a scalar.
      *inputs: what the model is called with.
      collections: the collections beside `params`, such as batch statistics.
      mutable: those that a pass changes.
      **options: other options of `apply_fn`, such as `rngs`, which stay the same in all
        passes of a step.

    Returns:
      The functions of the parameters, and one to the changed collections.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn
      >>> import locoprop_optax as loco
      >>> model, x = nn.BatchNorm(use_running_average=False), jnp.ones((4, 3))
      >>> variables = model.init(jax.random.key(0), x)
      >>> functions = loco.linen.model_and_loss(
      ...     model.apply, lambda outputs: jnp.mean(outputs**2), x,
      ...     collections={"batch_stats": variables["batch_stats"]},
      ...     mutable=["batch_stats"])
      >>> functions.model_fn(variables["params"]).shape
      (4, 3)
      >>> list(functions.mutated(variables["params"]))
      ['batch_stats']
    """

    def run(params):
        variables = {"params": params, **(collections or {})}
        return apply_fn(variables, *inputs, mutable=list(mutable), **options)

    return ModelAndLoss(
        model_fn=lambda params: run(params)[0],
        loss_fn=loss_fn,
        mutated=lambda params: run(params)[1],
    )


class TrainState(train_state.TrainState):
    """Flax's `TrainState`, whose `apply_gradients` takes the intermediates.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn
      >>> import locoprop_optax as loco
      >>> model, x = nn.Dense(2), jnp.eye(3)
      >>> loss_fn = lambda params, x: jnp.mean((model.apply(params, x) - 1) ** 2)
      >>> params = model.init(jax.random.key(0), x)
      >>> layers = loco.layers(loss_fn)(params, x)
      >>> state = loco.linen.TrainState.create(
      ...     apply_fn=model.apply, params=params, tx=loco.locoprop(layers))
      >>> capture = loco.value_and_grad(loss_fn, layers)
      >>> loss, grads, intermediates = capture(state.params, x)
      >>> state = state.apply_gradients(grads=grads, intermediates=intermediates)
      >>> int(state.step)
      1
    """

    def apply_gradients(
        self, *, grads: Any, intermediates: Intermediates | None = None, **kwargs: Any
    ) -> TrainState:
        """Takes one step of the optimizer.

        Args:
          grads: the gradients.
          intermediates: each layer's intermediates, from `value_and_grad`.
          **kwargs: other fields to replace, as in Flax.

        Returns:
          The state after the step.
        """
        updates, opt_state = optax.with_extra_args_support(self.tx).update(
            grads, self.opt_state, self.params, intermediates=intermediates
        )
        params = optax.apply_updates(self.params, updates)
        return self.replace(
            step=self.step + 1, params=params, opt_state=opt_state, **kwargs
        )
