"""How a parameter is turned into the operand of a product: its entries, rearranged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

Step = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Form:
    """Reshapes, transposes and reversals, one after another; each can be undone.

    Attributes:
      shape: of the parameter.
      steps: what is done, and with which shape, permutation or axes.
    """

    shape: tuple[int, ...]
    steps: tuple[Step, ...] = ()

    @property
    def result(self) -> tuple[int, ...]:
        """The shape that comes out."""
        return self._shapes()[-1]

    def __call__(self, array: jax.Array) -> jax.Array:
        """The parameter, rearranged."""
        for name, numbers in self.steps:
            array = _rearranged(array, name, numbers)
        return array

    def undo(self, array: jax.Array) -> jax.Array:
        """The inverse."""
        backwards = list(zip(self.steps, self._shapes(), strict=False))[::-1]
        for (name, numbers), before in backwards:
            if name == "reshape":
                numbers = before
            elif name == "transpose":
                numbers = tuple(int(n) for n in np.argsort(numbers))
            array = _rearranged(array, name, numbers)
        return array

    def reshape(self, shape: Sequence[int]) -> Form:
        """This form, then a reshape."""
        shape = tuple(map(int, shape))
        if shape == self.result:
            return self
        *before, last = self.steps or (None,)
        if last and last[0] == "reshape":
            return replace(self, steps=tuple(before)).reshape(shape)
        return self._then("reshape", shape)

    def transpose(self, order: Sequence[int]) -> Form:
        """This form, then a transpose."""
        order = tuple(map(int, order))
        *before, last = self.steps or (None,)
        if last and last[0] == "transpose":
            order = tuple(last[1][n] for n in order)
            return replace(self, steps=tuple(before)).transpose(order)
        if order == tuple(range(len(order))):
            return self
        return self._then("transpose", order)

    def reverse(self, axes: Sequence[int]) -> Form:
        """This form, then a reversal of axes."""
        return self._then("reverse", tuple(map(int, axes)))

    def _then(self, name: str, numbers: tuple[int, ...]) -> Form:
        return replace(self, steps=(*self.steps, (name, numbers)))

    def _shapes(self) -> list[tuple[int, ...]]:
        shapes = [self.shape]
        for name, numbers in self.steps:
            shape = shapes[-1]
            if name == "reshape":
                shape = numbers
            elif name == "transpose":
                shape = tuple(shape[n] for n in numbers)
            shapes.append(shape)
        return shapes


def _rearranged(array: jax.Array, name: str, numbers: tuple[int, ...]) -> jax.Array:
    if name == "reshape":
        return array.reshape(numbers)
    if name == "transpose":
        return array.transpose(numbers)
    return jax.lax.rev(array, numbers)
