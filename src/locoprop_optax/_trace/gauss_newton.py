"""The Gauss-Newton model of a traced loss, and sampled cotangents for its layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax

from locoprop_optax._quadratic.linearization import Linearization
from locoprop_optax._records.layers import Cut, Layers
from locoprop_optax._records.paths import by_path, is_masked, map_by_path
from locoprop_optax._trace.collect import (
    go_back,
    joined_cotangents,
    not_perturbed,
    uses_of,
)
from locoprop_optax._trace.cut_loss import CutLoss
from locoprop_optax._trace.trace import Trace
from locoprop_optax._utils.dtypes import at_least_float32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GaussNewton:
    """A traced loss at some parameters and arguments; what it says is made when asked.

    Attributes:
      arrays: the parameters' leaves, then all other arrays that the trace takes.
      value: the loss.
      gradient: of the loss in the parameters' leaves.
      values: those at the cut.
      derivative: from changes of the leaves and of the results of all uses of layers to
        those of the loss and of the values at the cut; linearized in the pass whose
        gradient was taken.
      key: for sampled cotangents; None to take one from the bits of the arguments.
      traced: the trace.
      layers: the layers.
      cut: where the loss is cut.
    """

    arrays: list[Any]
    value: Any
    gradient: list[Any]
    values: list[Any]
    derivative: Callable[..., Any]
    key: Any
    traced: Trace = field(metadata={"static": True})
    layers: Layers = field(metadata={"static": True})
    cut: Cut = field(metadata={"static": True})

    def linearize(self, params: Any) -> Linearization:
        """The loss near the parameters, for changes in the form of `params`.

        Parameters that an outer transformation masks do not change.
        """
        leaves, loss = self._leaves_and_loss()
        uses = uses_of(self.traced, self.layers)

        def whole(change):
            """The change of all leaves."""
            held = {
                p: leaf for p, leaf in by_path(change).items() if not is_masked(leaf)
            }
            return [
                held[path].astype(leaf.dtype) if path in held else jnp.zeros_like(leaf)
                for path, leaf in zip(self.traced.paths, leaves, strict=True)
            ]

        def jvp(change):
            changes = whole(change)
            return loss.values(changes, *self.derivative(changes, not_perturbed(uses)))

        def loss_at(change):
            moved: Any = optax.apply_updates(leaves, whole(change))
            return loss.behind(loss.values_at(moved))

        loss_gradient, hvp = jax.linearize(jax.grad(loss.behind), self._values())
        return Linearization(
            value=at_least_float32(self.value),
            loss_gradient=loss_gradient,
            jvp=jvp,
            vjp=lambda cotangents: jax.linear_transpose(jvp, params)(cotangents)[0],
            hvp=hvp,
            loss_at=loss_at,
        )

    def gradient_of(self, params: Any) -> Any:
        """The gradient of the loss in the form of `params`, masked where they are."""
        known = dict(zip(self.traced.paths, self.gradient, strict=True))
        return map_by_path(
            lambda path, leaf: leaf if is_masked(leaf) else known[path], params
        )

    def penalties(self) -> dict[str, jax.Array] | None:
        """The gradients of what the loss has in parameters behind its cut, by path.

        None if it is not cut.
        """
        leaves, loss = self._leaves_and_loss()
        cut = self.cut
        if not cut.values:
            return None
        if not cut.params:
            return {}
        found = jax.grad(loss.behind)(self._values())
        return {
            self.traced.paths[at]: gradient.astype(leaves[at].dtype)
            for at, gradient in zip(cut.params, found[len(cut.values) :], strict=True)
        }

    def sampled_cotangents(self) -> list[dict[str, jax.Array]]:
        """The cotangents of each layer for sampled labels; none without curvature."""
        leaves, loss = self._leaves_and_loss()
        if not self.cut.values:
            return []
        seeds = loss.sample(self._values(), self.key)
        uses = uses_of(self.traced, self.layers)
        nothing = jnp.zeros_like(self.value)
        drawn = [s.astype(v.dtype) for s, v in zip(seeds, self.values, strict=True)]
        _, cotangents = go_back(self.derivative, leaves, uses, nothing, drawn)
        return [
            {
                layer.path: joined_cotangents(layer, uses[layer.path], cotangents)
                for layer in self.layers
            }
        ]

    def _leaves_and_loss(self) -> tuple[list[Any], CutLoss]:
        count = len(self.traced.paths)
        loss = CutLoss(self.traced.graph, self.cut, self.arrays[count:])
        return self.arrays[:count], loss

    def _values(self) -> list[Any]:
        leaves, loss = self._leaves_and_loss()
        return loss.values(leaves, self.value, self.values)
