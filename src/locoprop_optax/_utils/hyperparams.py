"""Numbers the user sets: checked when made, read when a step is taken."""

from typing import Any, TypeAlias

import jax
import numpy as np
import optax
from jax.core import Tracer

ScalarOrSchedule: TypeAlias = float | jax.Array | optax.Schedule


def at(value: ScalarOrSchedule, count: jax.Array) -> Any:
    """The value of a hyperparameter at the step `count`."""
    return value(count) if callable(value) else value


def check_positive(name: str, value: ScalarOrSchedule) -> None:
    """Raise a `ValueError` for a number that is known and not above zero."""
    if _is_known(value) and not np.all(np.asarray(value) > 0):
        raise ValueError(f"{name} must be positive, got {value}.")


def check_not_negative(name: str, value: ScalarOrSchedule) -> None:
    """Raise a `ValueError` for a number that is known and below zero."""
    if _is_known(value) and not np.all(np.asarray(value) >= 0):
        raise ValueError(f"{name} must not be negative, got {value}.")


def check_share(name: str, value: float) -> None:
    """Raise a `ValueError` for a number that is not in [0, 1)."""
    if _is_known(value) and not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}.")


def check_static(name: str, value: float) -> None:
    """Raise unless `value` is a Python number."""
    if not isinstance(value, int | float):
        raise TypeError(
            f"{name} shapes the compiled step or its state and must be a Python "
            f"number, got {value!r}. Under optax.inject_hyperparams name it in "
            "`static_args`."
        )


def check_count(name: str, value: int) -> None:
    """Raise unless `value` is a Python integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{name} is a count that shapes the compiled step and must be a Python "
            f"int, got {value!r}. Under optax.inject_hyperparams name it in "
            "`static_args`."
        )
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")


def _is_known(value: Any) -> bool:
    return not callable(value) and not isinstance(value, Tracer)
