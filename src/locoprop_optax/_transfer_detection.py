"""Finds the transfer function that a traced loss applies to a pre-activation.

Functions are compared by their values, not by how they are written: what a trace does
to a pre-activation is evaluated and held against every known transfer function.
"""

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from locoprop_optax._graph import Equation, Graph, body_of, run, tap_p
from locoprop_optax._sharding import outside_shards
from locoprop_optax._transfers import IDENTITY, Transfer, elu, leaky_relu

_SHAPE_ONLY = {
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "expand_dims",
    "name",
    "optimization_barrier",
    "reduce_precision",
    "reshape",
    "sharding_constraint",
    "squeeze",
}
_ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "abs": np.abs,
    "add": np.add,
    "add_any": np.add,
    "and": np.bitwise_and,
    "asinh": np.arcsinh,
    "atan": np.arctan,
    "atan2": np.arctan2,
    "clamp": lambda low, a, high: np.clip(a, low, high),
    "cos": np.cos,
    "cosh": np.cosh,
    "div": np.divide,
    "eq": np.equal,
    "erf": np.vectorize(math.erf),
    "erfc": np.vectorize(math.erfc),
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "ge": np.greater_equal,
    "gt": np.greater,
    "integer_pow": lambda a, y: np.asarray(a, float) ** y,
    "is_finite": np.isfinite,
    "le": np.less_equal,
    "log": np.log,
    "log1p": np.log1p,
    "logistic": lambda a, **_: 1 / (1 + np.exp(-np.asarray(a))),
    "lt": np.less,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "ne": np.not_equal,
    "neg": np.negative,
    "not": np.logical_not,
    "or": np.bitwise_or,
    "pow": np.power,
    "rsqrt": lambda a, **_: 1 / np.sqrt(a),
    "select_n": lambda which, off, on: np.where(which, on, off),
    "sign": np.sign,
    "sin": np.sin,
    "sinh": np.sinh,
    "sqrt": np.sqrt,
    "square": np.square,
    "stop_gradient": lambda a, **_: a,
    "sub": np.subtract,
    "tan": np.tan,
    "tanh": np.tanh,
}
_GRID = np.linspace(-8.1, 8.0, 73)
_LARGEST_TEST = 2**25


class Finding(NamedTuple):
    """A transfer function, how it was decided on, and whether by the loss."""

    transfer: Transfer
    reason: str
    by_loss: bool = False


def find_transfer(
    graph: Graph, tap: Equation, known: Sequence[Transfer], *, outermost: bool
) -> Finding:
    """The transfer function behind a tap.

    Args:
      graph: the trace that holds the tap, its first result the loss if `outermost`.
      tap: the equation.
      known: the transfer functions to look for, in the order of preference.
      outermost: whether `graph` is the whole loss rather than the body of a loop.
    """
    with jax.ensure_compile_time_eval(), outside_shards():
        if outermost and (found := _matching_of_loss(graph, tap, known)):
            return Finding(found, "the loss is its matching loss", by_loss=True)
        finding = _elementwise_consumer(graph, tap, known)
    size = math.prod(graph.avals[tap.outputs[0]].shape)
    if outermost and finding.transfer == IDENTITY and size > _LARGEST_TEST:
        return Finding(IDENTITY, "too large to test the loss; name it in transfers=")
    return finding


def _elementwise_consumer(
    graph: Graph, tap: Equation, known: Sequence[Transfer]
) -> Finding:
    """Looks for the last known function that all after the tap goes through."""
    (start,) = tap.outputs
    size = math.prod(graph.avals[start].shape)
    values: dict[int, Any] = {start: _GRID}
    ancestors: dict[int, set[int]] = {start: set()}
    found = None

    def is_gateway(number: int) -> bool:
        """Whether all that comes after the tap comes after this number."""
        inside = ancestors[number]
        readers = {at for n in inside for at in graph.consumers.get(n, ())}
        outputs = {o for at in readers for o in graph.equations[at].outputs}
        return inside.isdisjoint(graph.results) and outputs <= {number} | inside

    pending = list(graph.consumers.get(start, ()))
    while pending:
        at = heapq.heappop(pending)
        equation = graph.equations[at]
        number, *others = equation.outputs
        same_size = math.prod(graph.avals[number].shape) == size
        if others or number in values or not same_size or not _is_elementwise(equation):
            continue
        operands = [_value(i, graph, values) for i in equation.inputs]
        if any(o is None for o in operands):
            continue
        values[number] = _evaluate(equation.primitive, equation.params, operands)
        reads = {i for i in equation.inputs if isinstance(i, int) and i in ancestors}
        ancestors[number] = reads.union(*(ancestors[i] for i in reads))
        match = _closest(values[number], known)
        if match is not None and is_gateway(number):
            found = match
        for consumer in graph.consumers.get(number, ()):
            heapq.heappush(pending, consumer)
    if found is not None:
        return Finding(found, "applied to the pre-activation")
    users = {
        graph.equations[at].primitive.name for at in graph.consumers.get(start, ())
    }
    ends = ["a result"] if start in graph.results else []
    goes_to = ", ".join(sorted(users) + ends) or "nothing"
    return Finding(IDENTITY, f"no known function: goes to {goes_to}")


def _closest(value: Any, known: Sequence[Transfer]) -> Transfer | None:
    value = np.broadcast_to(np.asarray(value, float), _GRID.shape)
    for transfer in (*known, *_families(value)):
        if transfer.over_last_axis or transfer == IDENTITY:
            continue
        if np.all(np.abs(value - _on_grid(transfer)) < 2e-5 * (1 + np.abs(value))):
            return transfer
    return None


def _families(value: np.ndarray) -> tuple[Transfer, ...]:
    """The members of families of functions that agree where they differ most."""
    slope, alpha = value[0] / _GRID[0], value[0] / np.expm1(_GRID[0])
    leaky = (leaky_relu(_rounded(slope)),) if 0 < slope < 1 else ()
    return leaky + ((elu(_rounded(alpha)),) if 0 < alpha < 10 else ())


@cache
def _on_grid(transfer: Transfer) -> np.ndarray:
    return _apply(transfer, _GRID)


def _apply(transfer: Transfer, a: np.ndarray) -> np.ndarray:
    """A function's values, without compiling it where that can be avoided."""
    closed = jax.make_jaxpr(transfer.function)(np.zeros(1, np.float32))
    if transfer.over_last_axis or not all(map(_is_elementwise, closed.jaxpr.eqns)):
        return np.asarray(jax.jit(transfer.function)(np.float32(a)))
    return np.asarray(_evaluate_jaxpr(closed, [a]))


def _rounded(number: Any) -> float:
    """A parameter that was read off float32 values."""
    return float(f"{number:.6g}")


def _value(atom: Any, graph: Graph, values: dict[int, Any]) -> Any:
    """What is known of an operand on the grid: its values there, a number, or None."""
    if isinstance(atom, core.Literal):
        return atom.val
    if atom in graph.constants and np.size(graph.constants[atom]) == 1:
        return np.reshape(graph.constants[atom], ())
    if atom not in values:
        values[atom] = _scalar(atom, graph, values)
    return values[atom]


def _scalar(number: int, graph: Graph, values: dict[int, Any]) -> Any:
    """The one number that an array holds throughout, if it is known."""
    equation = graph.makers.get(number)
    if equation is None or not _is_elementwise(equation):
        return None
    operands = [_value(i, graph, values) for i in equation.inputs]
    if any(o is None or np.ndim(o) > 0 for o in operands):
        return None
    return _evaluate(equation.primitive, equation.params, operands)


def _is_elementwise(equation: Any) -> bool:
    """Whether an equation, or all that it calls, works on each element by itself."""
    name, params = equation.primitive.name, equation.params
    if name in _SHAPE_ONLY or name in _ELEMENTWISE:
        return True
    body = body_of(params)
    if body is None or name in ("scan", "while"):
        return False
    plain = len(body.jaxpr.outvars) == 1 and not body.jaxpr.constvars
    return plain and all(map(_is_elementwise, body.jaxpr.eqns))


def _evaluate(primitive: Any, params: Mapping[str, Any], operands: list[Any]) -> Any:
    """The value of an elementwise equation on the grid, in float64 throughout."""
    name = primitive.name
    if name == "convert_element_type":
        dtype = params["new_dtype"]
        return np.asarray(operands[0], float if _is_float(dtype) else dtype)
    if name in _SHAPE_ONLY:
        return operands[0]
    if name in _ELEMENTWISE:
        power = {"y": params["y"]} if name == "integer_pow" else {}
        with np.errstate(all="ignore"):
            return _ELEMENTWISE[name](*operands, **power)
    body = body_of(params)
    assert body is not None
    return _evaluate_jaxpr(body, operands)


def _evaluate_jaxpr(closed: core.ClosedJaxpr, operands: list[Any]) -> Any:
    """The one result of elementwise equations on the grid."""
    values = dict(zip(closed.jaxpr.invars, operands, strict=True))

    def read(atom):
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in closed.jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        result = _evaluate(equation.primitive, equation.params, inputs)
        values[equation.outvars[0]] = result
    return read(closed.jaxpr.outvars[0])


def _is_float(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def _matching_of_loss(
    graph: Graph, tap: Equation, known: Sequence[Transfer]
) -> Transfer | None:
    r"""The transfer function of which the loss is the matching loss, if there is one.

    Then :math:`\partial L / \partial a = w (f(a) - y)` with weights w and labels y
    that do not depend on a, so that the gradient's differences are proportional to
    those of f. This is tested at three random points, with random numbers in place of
    everything that does not depend on a.
    """
    (start,) = tap.outputs
    aval = graph.avals[start]
    tail = graph.after(start)
    loss = graph.results[0]
    reaches = any(loss in e.outputs for e in tail)
    final = all(equation.primitive is not tap_p for equation in tail)
    if (
        not isinstance(loss, int)
        or not (reaches and final)
        or math.prod(aval.shape) > _LARGEST_TEST
    ):
        return None
    rng = np.random.default_rng(0)
    equations, given = _needed_for(graph, tail, start)
    others = {
        number: graph.constants[number]
        if _is_usable(graph.constants.get(number))
        else _stand_in(graph.avals[number], rng)
        for number in sorted(given)
    }

    def loss_of(preactivations):
        return jnp.sum(run(equations, {**others, start: preactivations})[loss])

    gradient = jax.jit(jax.grad(loss_of))
    tolerance = max(1e-3, 4 * float(jnp.finfo(aval.dtype).eps))
    points = 1.5 * rng.standard_normal((3, *aval.shape))
    gradients = [gradient(np.asarray(point, aval.dtype)) for point in points]
    for transfer in known:
        if transfer.conjugate is None:  # not monotone
            continue
        outputs = [_apply(transfer, point) for point in points]
        if _proportional(gradients, outputs, tolerance):
            return transfer
    return None


def _proportional(
    gradients: Sequence[Any], outputs: Sequence[Any], tolerance: float
) -> bool:
    """Whether differences of the one are fixed weights, not negative, times those."""

    def differences(values):
        first, second, third = (np.asarray(v, np.float64) for v in values)
        return first - second, first - third

    (g1, g2), (f1, f2) = differences(gradients), differences(outputs)
    left, right = g1 * f2, g2 * f1
    scale = np.max(np.abs(left), initial=0.0)
    if not np.isfinite(scale) or scale == 0:
        return False
    same = np.max(np.abs(left - right)) < tolerance * scale
    return bool(same and np.min(g1 * f1) > -tolerance * np.max(np.abs(g1 * f1)))


def _needed_for(
    graph: Graph, tail: Sequence[Equation], start: int
) -> tuple[list[Equation], set[int]]:
    """The tail and what it reads, such as labels, back to inputs and other taps.

    Returns:
      The equations, in order, and the numbers that have to be given to them.
    """
    needed = {i for e in tail for i in e.inputs if isinstance(i, int)} - {start}
    in_tail = {number for e in tail for number in e.outputs}
    equations = []
    for equation in reversed(graph.equations):
        outputs = set(equation.outputs)
        wanted = not (outputs.isdisjoint(needed) and outputs.isdisjoint(in_tail))
        if equation.primitive is not tap_p and wanted:
            equations.append(equation)
            needed.update(i for i in equation.inputs if isinstance(i, int))
    made = {start}.union(*(equation.outputs for equation in equations))
    return equations[::-1], needed - made


def _is_usable(constant: Any) -> bool:
    """Whether it is known, and not of a batch with a bad number in it."""
    if constant is None:
        return False
    plain = not _is_float(jnp.result_type(constant))
    return plain or bool(np.isfinite(np.asarray(constant)).all())


def _stand_in(aval: Any, rng: np.random.Generator) -> Any:
    if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), aval.shape)
    if _is_float(aval.dtype):
        return jnp.asarray(rng.uniform(0.1, 0.9, aval.shape), aval.dtype)
    if aval.dtype == jnp.bool_:
        return jnp.ones(aval.shape, aval.dtype)
    return jnp.asarray(rng.integers(0, 2, aval.shape), aval.dtype)
