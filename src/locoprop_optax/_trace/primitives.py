"""Every primitive of JAX that a trace is searched for, and its parameters.

Primitives are compared as objects, so that one that is renamed fails at import.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core
from jax.extend.core import primitives as p

CAST = {p.convert_element_type_p, p.reduce_precision_p}
UNCHANGED = {
    p.copy_p,
    p.name_p,
    p.sharding_constraint_p,
    jax.lax.optimization_barrier_p,
}
RESHAPE, TRANSPOSE, SQUEEZE, REVERSE, BROADCAST = (
    p.reshape_p,
    p.transpose_p,
    p.squeeze_p,
    p.rev_p,
    p.broadcast_in_dim_p,
)
SHAPE_ONLY = CAST | UNCHANGED | {RESHAPE, SQUEEZE, BROADCAST}

ADD = {p.add_p, p.add_jaxvals_p}
SUMS = ADD | {p.sub_p}
STOP_GRADIENT = p.stop_gradient_p
DOT, CONVOLUTION = p.dot_general_p, p.conv_general_dilated_p
LOOKUP, SLICE = p.gather_p, p.slice_p
ASSEMBLING = {p.concatenate_p, p.pad_p}
PRODUCTS = {DOT, CONVOLUTION}

CALLS = {p.jit_p, p.closed_call_p, p.call_p}
REMAT, SCAN, COND, WHILE = p.remat_p, p.scan_p, p.cond_p, p.while_p
CUSTOM = {p.custom_jvp_call_p, p.custom_vjp_call_p}
CUSTOM_JVP = p.custom_jvp_call_p
ON_MESH = {p.pmax_p, p.pmin_p, p.psum_p, p.sharding_constraint_p}

ELEMENTWISE: dict[core.Primitive, Callable[..., Any]] = {
    p.abs_p: np.abs,
    p.add_p: np.add,
    p.add_jaxvals_p: np.add,
    p.and_p: np.bitwise_and,
    p.asinh_p: np.arcsinh,
    p.atan_p: np.arctan,
    p.atan2_p: np.arctan2,
    p.clamp_p: lambda low, a, high: np.clip(a, low, high),
    p.cos_p: np.cos,
    p.cosh_p: np.cosh,
    p.div_p: np.divide,
    p.eq_p: np.equal,
    p.erf_p: np.vectorize(math.erf),
    p.erfc_p: np.vectorize(math.erfc),
    p.exp_p: np.exp,
    p.exp2_p: np.exp2,
    p.expm1_p: np.expm1,
    p.ge_p: np.greater_equal,
    p.gt_p: np.greater,
    p.integer_pow_p: lambda a, y: np.asarray(a, float) ** y,
    p.is_finite_p: np.isfinite,
    p.le_p: np.less_equal,
    p.log_p: np.log,
    p.log1p_p: np.log1p,
    p.logistic_p: lambda a, **_: 1 / (1 + np.exp(-np.asarray(a))),
    p.lt_p: np.less,
    p.max_p: np.maximum,
    p.min_p: np.minimum,
    p.mul_p: np.multiply,
    p.ne_p: np.not_equal,
    p.neg_p: np.negative,
    p.not_p: np.logical_not,
    p.or_p: np.bitwise_or,
    p.pow_p: np.power,
    p.rsqrt_p: lambda a, **_: 1 / np.sqrt(a),
    p.select_n_p: lambda which, off, on: np.where(which, on, off),
    p.sign_p: np.sign,
    p.sin_p: np.sin,
    p.sinh_p: np.sinh,
    p.sqrt_p: np.sqrt,
    p.square_p: np.square,
    p.stop_gradient_p: lambda a, **_: a,
    p.sub_p: np.subtract,
    p.tan_p: np.tan,
    p.tanh_p: np.tanh,
}
INTEGER_POW, MULTIPLY, SELECT = p.integer_pow_p, p.mul_p, p.select_n_p


def called(equation: core.JaxprEqn) -> core.ClosedJaxpr | None:
    """The one function that an equation calls as it is; None if it does not."""
    body = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    return core.ClosedJaxpr(body, ()) if isinstance(body, core.Jaxpr) else body


def branches(equation: core.JaxprEqn) -> Sequence[core.ClosedJaxpr]:
    """The functions between which a `cond` chooses."""
    return equation.params["branches"]


def functions_in(equation: core.JaxprEqn) -> list[core.Jaxpr]:
    """All functions that an equation runs."""
    found = []
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, core.Jaxpr):
                found.append(item)
    return found


def order(equation: core.JaxprEqn) -> Sequence[int]:
    """In which order a reshape reads the axes of its operand."""
    dimensions = equation.params.get("dimensions")
    if equation.primitive == RESHAPE and dimensions is not None:
        return dimensions
    return range(len(shape_of(equation.invars[0])))


def shape_of(atom: Any) -> tuple[int, ...]:
    """The shape of a variable or a literal."""
    return tuple(atom.aval.shape)


def dtype_of(atom: Any) -> Any:
    """The dtype of a variable or a literal."""
    return atom.aval.dtype


class Scan(NamedTuple):
    """What a scan does.

    Attributes:
      body: its function.
      consts: how many of its operands are the same in each turn.
      carries: how many are handed from turn to turn.
      length: the number of turns.
      options: how `jax.lax.scan` is told the rest.
    """

    body: core.ClosedJaxpr
    consts: int
    carries: int
    length: int
    options: Mapping[str, Any]

    @classmethod
    def of(cls, equation: core.JaxprEqn) -> Scan:
        """The parameters of a scan's equation."""
        params = equation.params
        return cls(
            params["jaxpr"],
            params["num_consts"],
            params["num_carry"],
            params["length"],
            {key: params[key] for key in ("length", "reverse", "unroll")},
        )


class Gather(NamedTuple):
    """Which rows of a table a gather reads, and how its axes are laid out.

    Attributes:
      axis: of the table that the rows are counted along.
      batched: axes of the table that go along with axes of the indices.
      index_batched: those of the indices.
      kept: axes of the result that are the other axes of the table.
      clips: whether indices out of the table mean its first or last row.
    """

    axis: int
    batched: tuple[int, ...]
    index_batched: tuple[int, ...]
    kept: tuple[int, ...]
    clips: bool

    @classmethod
    def of(cls, equation: core.JaxprEqn) -> Gather | None:
        """What a gather does; None if it reads no whole rows along one axis."""
        numbers = equation.params["dimension_numbers"]
        batched = tuple(numbers.operand_batching_dims)
        if len(numbers.start_index_map) != 1:
            return None
        (axis,) = numbers.start_index_map
        shape = shape_of(equation.invars[0])
        one = {axis, *batched}
        whole = [1 if at in one else size for at, size in enumerate(shape)]
        sizes = equation.params["slice_sizes"]
        if [*sizes] != whole or {*numbers.collapsed_slice_dims} != {axis}:
            return None
        return cls(
            axis,
            batched,
            tuple(numbers.start_indices_batching_dims),
            tuple(numbers.offset_dims),
            equation.params["mode"] == jax.lax.GatherScatterMode.CLIP,
        )


def sliced(equation: core.JaxprEqn) -> list[slice]:
    """What a slice takes of each axis."""
    params = equation.params
    starts, stops = params["start_indices"], params["limit_indices"]
    steps = params["strides"] or [1] * len(starts)
    return list(map(slice, starts, stops, steps))


def off_mesh(params: Mapping[str, Any]) -> dict[str, Any]:
    """An equation's parameters without where its results are."""
    return {**params, **dict.fromkeys({"sharding", "out_sharding"} & set(params))}


def remat_options(equation: core.JaxprEqn) -> dict[str, Any]:
    """How `jax.checkpoint` is told what a remat does."""
    return {key: equation.params[key] for key in ("policy", "prevent_cse")}
