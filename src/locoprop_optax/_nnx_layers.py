"""The NNX modules that are linear in their parameters, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from locoprop_optax._layers import LayerParams
from locoprop_optax._linear_maps import (
    DENSE,
    Channelwise,
    LinearMap,
    check_channelwise,
    dense_general,
    explicit_product,
)

_REGISTERED: dict[type[nnx.Module], tuple[int, int]] = {}


def register_linear(
    module: type[nnx.Module], *, groups: int = 1, channel_axis: int = -1
) -> type[nnx.Module]:
    r"""Makes capture know a leaf module of your own that is linear in its parameters.

    The module owns `nnx.Param`s `kernel` and, if it likes, `bias`. It computes

    .. math::
      a_{\dots o} = \sum_k X(x)_{\dots k}\, W_{k o} + b_o

    with channels o on the output's last axis, for any function X of its input. This is
    checked on random numbers whenever the module is captured in a trace.

    Args:
      module: the module's class; it is called with one array. Usable as a decorator.
      groups: how many groups of channels see inputs of their own.
      channel_axis: the kernel's axis that counts output channels.

    Returns:
      The class.

    Raises:
      ValueError: when a call is captured, if the module is not linear in this way.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> import locoprop_optax as loco
      >>> @loco.nnx.register_linear
      ... class Scaled(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.kernel = nnx.Param(jax.random.normal(rngs.params(), (4, 3)))
      ...     def __call__(self, x):
      ...         return 2 * x @ self.kernel
    """
    _REGISTERED[module] = (groups, channel_axis)
    return module


def linear_map_of(
    module: Any, params: Mapping[str, jax.Array], args: tuple[Any, ...]
) -> LinearMap | None:
    """How a module's output depends on its parameters; None if that is not known."""
    if type(module) in _REGISTERED:
        linear_map = Channelwise(_forward(module, params), *_REGISTERED[type(module)])
        check_channelwise(linear_map, type(module).__name__, params, args[0])
        return linear_map
    if "kernel" not in params or set(params) - {"kernel", "bias"}:
        return None
    kind: Any = type(module)  # a subclass may compute something else
    if kind is nnx.Linear:
        return DENSE if module.dot_general is jax.lax.dot_general else None
    if kind is nnx.LinearGeneral:
        if module.dot_general is not None:
            return None
        groups, features = tuple(module.batch_axis), len(module.out_features)
        return dense_general(jnp.ndim(args[0]), groups, module.axis, features)
    if kind is nnx.Einsum:
        spec = next((a for a in args[1:] if isinstance(a, str)), module.einsum_str)
        return explicit_product(str(spec), args[0], params["kernel"])
    if kind is nnx.Conv and module.mask is None:
        return Channelwise(_forward(module, params), module.feature_group_count)
    if kind is nnx.ConvTranspose and module.mask is None:
        axis = -2 if module.transpose_kernel else -1
        return Channelwise(_forward(module, params), channel_axis=axis)
    return None


@dataclass(frozen=True)
class _Forward:
    """A module's own forward function, hashable; what is not given counts as zero."""

    graphdef: nnx.GraphDef
    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    def __call__(self, params: LayerParams, inputs: jax.Array) -> jax.Array:
        dtype = jnp.result_type(*params.values())
        state = {
            name: nnx.Param(params.get(name, jnp.zeros(shape, dtype)))
            for name, shape in self.shapes
        }
        module: Any = nnx.merge(self.graphdef, nnx.State(state))
        return module(inputs)


def _forward(module: nnx.Module, params: Mapping[str, jax.Array]) -> _Forward:
    alone = nnx.clone(module)
    for name in [n for n in vars(alone) if n.startswith("locoprop_")]:
        delattr(alone, name)
    graphdef, _ = nnx.split(alone)
    return _Forward(graphdef, tuple((name, p.shape) for name, p in params.items()))
