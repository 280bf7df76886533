"""Finds the transfer function that a traced loss applies to a pre-activation.

Functions are compared by their values, not by how they are written: what a trace does
to a pre-activation is evaluated and held against every known transfer function.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from locoprop_optax._graph import Equation, Graph, body_of, tap_p
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
    "transpose",
}
_ELEMENTWISE = {
    *("abs", "add", "add_any", "and", "asinh", "atan", "atan2", "ceil", "clamp", "cos"),
    *("cosh", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor"),
    *("ge", "gt", "integer_pow", "is_finite", "le", "log", "log1p", "logistic", "lt"),
    *("max", "min", "mul", "ne", "neg", "not", "or", "pow", "round", "rsqrt"),
    *("select_n", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub"),
    *("tan", "tanh", "xor"),
}
_GRID = np.linspace(-6.1, 6.0, 73, dtype=np.float32)
_LARGEST_TEST = 2**25


class Finding(NamedTuple):
    """A transfer function, and how it was decided on."""

    transfer: Transfer
    reason: str


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
    with jax.ensure_compile_time_eval():
        if outermost and (found := _matching_of_loss(graph, tap, known)):
            return Finding(found, "the loss is its matching loss")
        return _elementwise_consumer(graph, tap, known)


def _elementwise_consumer(
    graph: Graph, tap: Equation, known: Sequence[Transfer]
) -> Finding:
    """Looks for a known function that everything after the tap goes through."""
    (start,) = tap.outputs
    consumers = graph.consumers()
    values: dict[int, Any] = {start: _GRID}
    ancestors: dict[int, set[int]] = {start: set()}

    def is_gateway(number: int) -> bool:
        inside = ancestors[number]
        return all(
            u not in graph.results
            and all(inside_or(number, e) for e in consumers.get(u, ()))
            for u in inside
        )

    def inside_or(number: int, equation: Equation) -> bool:
        return all(o == number or o in ancestors[number] for o in equation.outputs)

    size = math.prod(graph.avals[start].shape)
    for equation in graph.equations:
        if not any(i in ancestors for i in equation.inputs if isinstance(i, int)):
            _evaluate_constant(equation, graph, values)
            continue
        if math.prod(graph.avals[equation.outputs[0]].shape) != size:
            continue
        operands = [_value(i, graph, values) for i in equation.inputs]
        if any(o is None for o in operands) or not _is_elementwise(equation):
            continue
        (number,) = equation.outputs
        values[number] = _evaluate(equation.primitive, equation.params, operands)
        reads = {i for i in equation.inputs if isinstance(i, int) and i in ancestors}
        ancestors[number] = reads.union(*(ancestors[i] for i in reads))
        match = _closest(values[number], known)
        if match is not None and is_gateway(number):
            return Finding(match, "applied to the pre-activation")
    users = sorted({e.primitive.name for e in consumers.get(start, ())})
    if start in graph.results:
        users.append("a result")
    return Finding(IDENTITY, f"no known function: goes to {', '.join(users) or 'none'}")


def _closest(value: Any, known: Sequence[Transfer]) -> Transfer | None:
    value = np.broadcast_to(np.asarray(value, np.float32), _GRID.shape)
    slope, alpha = value[0] / _GRID[0], value[0] / np.expm1(_GRID[0])
    families = [leaky_relu(_rounded(slope))] if 0 < slope < 1 else []
    families += [elu(_rounded(alpha))] if 0 < alpha < 10 else []
    for transfer in (*known, *families):
        if transfer.over_last_axis or transfer is IDENTITY:
            continue
        expected = np.asarray(transfer.function(jnp.asarray(_GRID)))
        if np.allclose(value, expected, rtol=2e-5, atol=2e-5):
            return transfer
    return None


def _rounded(number: float) -> float:
    """A parameter that was read off float32 values."""
    return float(f"{number:.6g}")


def _value(atom: Any, graph: Graph, values: Mapping[int, Any]) -> Any:
    """What is known of an operand on the grid: its values there, a number, or None."""
    if isinstance(atom, core.Literal):
        return atom.val
    if atom in graph.constants and np.size(graph.constants[atom]) == 1:
        return np.reshape(graph.constants[atom], ())
    return values.get(atom)


def _evaluate_constant(equation: Equation, graph: Graph, values: dict) -> None:
    """Follows numbers that are broadcast or cast before they meet the tap."""
    operands = [_value(i, graph, values) for i in equation.inputs]
    scalar = all(o is not None and np.ndim(o) == 0 for o in operands) and operands
    if scalar and _is_elementwise(equation):
        (number,) = equation.outputs
        values[number] = _evaluate(equation.primitive, equation.params, operands)


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
    """The value of an elementwise equation on the grid, in float32 throughout."""
    name = primitive.name
    if name == "convert_element_type":
        dtype = params["new_dtype"]
        return jnp.asarray(operands[0], jnp.float32 if _is_float(dtype) else dtype)
    if name in _SHAPE_ONLY:
        return operands[0]
    if name in _ELEMENTWISE:
        arrays = [jnp.asarray(o) for o in operands]
        floats = [a.astype(jnp.float32) if _is_float(a.dtype) else a for a in arrays]
        return primitive.bind(*jnp.broadcast_arrays(*floats), **params)
    closed = body_of(params)
    assert closed is not None
    body = closed.jaxpr
    values = dict(zip(body.invars, operands, strict=True))

    def read(atom):
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for inner in body.eqns:
        result = _evaluate(inner.primitive, inner.params, list(map(read, inner.invars)))
        values[inner.outvars[0]] = result
    return read(body.outvars[0])


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
    tail = _equations_after(graph, start)
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
        if number in graph.constants
        else _stand_in(graph.avals[number], rng)
        for number in sorted(given)
    }

    def loss_of(preactivations):
        values = {**others, start: preactivations}

        def read(atom):
            return atom.val if isinstance(atom, core.Literal) else values[atom]

        for equation in equations:
            results = equation.evaluate(list(map(read, equation.inputs)))
            values.update(zip(equation.outputs, results, strict=True))
        return jnp.sum(values[loss])

    gradient = jax.jit(jax.grad(loss_of))
    points = [
        jnp.asarray(1.5 * rng.standard_normal(aval.shape), aval.dtype) for _ in range(3)
    ]
    gradients = [np.asarray(gradient(p), np.float64) for p in points]
    for transfer in known:
        outputs = [np.asarray(transfer.function(p), np.float64) for p in points]
        if _proportional(gradients, outputs):
            return transfer
    return None


def _proportional(gradients: list[np.ndarray], outputs: list[np.ndarray]) -> bool:
    """Whether differences of the one are fixed weights, not negative, times those."""
    (g1, g2), (f1, f2) = (
        (values[0] - values[1], values[0] - values[2])
        for values in (gradients, outputs)
    )
    left, right = g1 * f2, g2 * f1
    scale = np.max(np.abs(left), initial=0.0)
    if not np.isfinite(scale) or scale == 0:
        return False
    same = np.max(np.abs(left - right)) < 1e-3 * scale
    return bool(same and np.min(g1 * f1) > -1e-3 * np.max(np.abs(g1 * f1)))


def _equations_after(graph: Graph, start: int) -> list[Equation]:
    """The equations that depend on a number, in order."""
    reached, tail = {start}, []
    for equation in graph.equations:
        if any(i in reached for i in equation.inputs if isinstance(i, int)):
            tail.append(equation)
            reached.update(equation.outputs)
    return tail


def _needed_for(
    graph: Graph, tail: Sequence[Equation], start: int
) -> tuple[list[Equation], set[int]]:
    """The tail and what it reads, such as labels, back to inputs and other taps.

    Returns:
      The equations, in order, and the numbers that have to be given to them.
    """
    needed = {i for e in tail for i in e.inputs if isinstance(i, int)} - {start}
    equations = []
    for equation in reversed(graph.equations):
        made_here = not needed.isdisjoint(equation.outputs)
        in_tail = any(equation is e for e in tail)
        if equation.primitive is not tap_p and (made_here or in_tail):
            equations.append(equation)
            needed.update(i for i in equation.inputs if isinstance(i, int))
    made = {start}.union(*(equation.outputs for equation in equations))
    return equations[::-1], needed - made


def _stand_in(aval: Any, rng: np.random.Generator) -> Any:
    if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), aval.shape)
    if _is_float(aval.dtype):
        return jnp.asarray(rng.uniform(0.1, 0.9, aval.shape), aval.dtype)
    if aval.dtype == jnp.bool_:
        return jnp.ones(aval.shape, aval.dtype)
    return jnp.asarray(rng.integers(0, 2, aval.shape), aval.dtype)
