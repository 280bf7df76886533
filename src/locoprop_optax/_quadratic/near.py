"""The loss near the parameters, of which costs nothing what is not asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from locoprop_optax._quadratic.linearization import Linearization
from locoprop_optax._records.paths import is_masked
from locoprop_optax._utils.dtypes import at_least_float32


class Near(NamedTuple):
    """What is known of a loss near the parameters.

    Attributes:
      value: the loss.
      gradient: in the parameters; None if nobody has computed it.
      linearize: makes all else.
    """

    value: Array
    gradient: Any
    linearize: Callable[[], Linearization]

    @classmethod
    def of(cls, params: Any, model_fn: Any, loss_fn: Any, intermediates: Any) -> Near:
        """By hand, or from the intermediates.

        Raises:
          TypeError: if there is neither.
          ValueError: if the functions need parameters that are masked.
        """
        model = getattr(intermediates, "gauss_newton", None)
        if model is not None and (model_fn, loss_fn) == (None, None):
            return cls(
                value=at_least_float32(model.value),
                gradient=model.gradient_of(params),
                linearize=lambda: model.linearize(params),
            )
        for name, value in {"model_fn": model_fn, "loss_fn": loss_fn}.items():
            if value is None:
                raise TypeError(
                    "update needs intermediates with the Gauss-Newton model of the "
                    f"loss, or `{name}`. Take the intermediates from "
                    "loco.value_and_grad(loss_fn, layers). Or call "
                    "tx.update(updates, state, params, model_fn=..., loss_fn=...) with "
                    "a function from parameters to outputs and one from outputs to the "
                    "loss, both closed over the batch, as model_and_loss makes them. "
                    "loco.scale_by_locoprop needs neither."
                )
        _check_whole(params)
        linear = Linearization.of(model_fn, loss_fn, params)
        return cls(linear.value, None, lambda: linear)


def _check_whole(params: Any) -> None:
    leaves = jax.tree.leaves(params, is_leaf=is_masked)
    if any(map(is_masked, leaves)):
        raise ValueError(
            "A transformation around it, such as optax.masked or optax.partition, "
            "hides parameters from `model_fn`, which needs all of them. To freeze "
            "some, close `model_fn` over them and hand the others to the optimizer."
        )
