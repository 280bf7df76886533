"""The Linen modules that are linear in their parameters, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import FlaxError

from locoprop_optax._layers import LayerParams
from locoprop_optax._linear_maps import (
    DENSE,
    Channelwise,
    LinearMap,
    check_channelwise,
    dense_general,
    explicit_product,
)


class _Options(NamedTuple):
    groups: int
    channel_axis: int


_REGISTERED: dict[type[nn.Module], _Options] = {}


def register_linear(
    module: type[nn.Module], *, groups: int = 1, channel_axis: int = -1
) -> type[nn.Module]:
    r"""Makes capture know a leaf module of your own that is linear in its parameters.

    The module owns a `kernel` and, if it likes, a `bias`. It computes

    .. math::
      a_{\dots o} = \sum_k X(x)_{\dots k}\, W_{k o} + b_o

    with channels o on the output's last axis, for any function X of its input. This is
    checked on random numbers whenever the module is captured in a trace.

    Args:
      module: the module's class; it is called with one array. Usable as a decorator.
      groups: how many groups of channels see inputs of their own, as in a grouped
        convolution.
      channel_axis: the kernel's axis that counts output channels.

    Returns:
      The class.

    Raises:
      ValueError: when a call is captured, if the module is not linear in this way.

    Example:
      >>> import flax.linen as nn
      >>> import locoprop_optax as loco
      >>> @loco.linen.register_linear
      ... class Scaled(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         init = nn.initializers.lecun_normal()
      ...         return 2 * x @ self.param("kernel", init, (x.shape[-1], 3))
    """
    _REGISTERED[module] = _Options(groups, channel_axis)
    return module


def linear_map_of(
    module: Any, params: Mapping[str, jax.Array], args: tuple[Any, ...]
) -> LinearMap | None:
    """How a module's output depends on its parameters; None if that is not known."""
    if type(module) in _REGISTERED:
        options = _REGISTERED[type(module)]
        linear_map = Channelwise(_forward(module, params), *options)
        check_channelwise(linear_map, type(module).__name__, params, args[0])
        return linear_map
    if "kernel" not in params or set(params) - {"kernel", "bias"}:
        return None
    kind: Any = type(module)  # a subclass may compute something else
    if kind in (nn.Dense, nn.DenseGeneral):
        if module.dot_general is not None or module.dot_general_cls is not None:
            return None
        if kind is nn.Dense:
            return DENSE
        features = 1 if isinstance(module.features, int) else len(module.features)
        ndim = jnp.ndim(args[0])
        return dense_general(ndim, module.batch_dims, module.axis, features)
    if kind is nn.Einsum:
        spec = next((a for a in args[1:] if isinstance(a, str)), module.einsum_str)
        return explicit_product(str(spec), args[0], params["kernel"])
    if kind is nn.Conv and module.mask is None:
        return Channelwise(_forward(module, params), module.feature_group_count)
    if kind is nn.ConvTranspose and module.mask is None:
        axis = -2 if module.transpose_kernel else -1
        return Channelwise(_forward(module, params), channel_axis=axis)
    return None


@dataclass(frozen=True)
class _Forward:
    """A module's own forward function, hashable; what is not given counts as zero."""

    module: nn.Module
    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    def __call__(self, params: LayerParams, inputs: jax.Array) -> jax.Array:
        dtype = jnp.result_type(*params.values())
        given = {
            name: params[name] if name in params else jnp.zeros(shape, dtype)
            for name, shape in self.shapes
        }
        try:
            output = self.module.apply({"params": given}, inputs)
        except FlaxError as error:  # inputs of another shape
            raise ValueError(str(error)) from error
        assert isinstance(output, jax.Array)
        return output


def _forward(module: nn.Module, params: Mapping[str, jax.Array]) -> _Forward:
    lists: dict[str, Any] = {
        field.name: tuple(value)
        for field in fields(module)
        if isinstance(value := getattr(module, field.name, None), list)
    }
    alone = module.clone(parent=None, name=None, **lists)
    return _Forward(alone, tuple((name, p.shape) for name, p in params.items()))
