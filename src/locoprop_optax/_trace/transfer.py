"""Finds the transfer function that a traced loss applies to a pre-activation.

Functions are compared by their values, not by how they are written: what a trace does
to a pre-activation is evaluated and held against every known transfer function.
"""

import heapq
import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from locoprop_optax._trace import primitives
from locoprop_optax._trace.graph import Equation, Graph, is_number, run
from locoprop_optax._trace.primitives import SHAPE_ONLY, called
from locoprop_optax._trace.uses import Use
from locoprop_optax._utils.sharding import off_mesh
from locoprop_optax.losses._transfers import IDENTITY, Transfer, elu, leaky_relu

_NEAR_ZERO = np.geomspace(1e-4, 1.0, 25)
_GRID = np.sort([-30.0, 30.0, *np.linspace(-8.1, 8.0, 73), *-_NEAR_ZERO, *_NEAR_ZERO])
_LARGEST_TEST = 2**25


class Finding(NamedTuple):
    """A transfer function, how it was decided on, and whether by the loss."""

    transfer: Transfer
    reason: str
    by_loss: bool = False


def find_transfer(use: Use, products: set[int], known: Sequence[Transfer]) -> Finding:
    """The transfer function behind a use of a layer.

    Args:
      use: the use.
      products: the pre-activations in its graph.
      known: the transfer functions to look for, in the order of preference.
    """
    graph, start = use.graph, use.preactivation
    with jax.ensure_compile_time_eval(), off_mesh():
        if use.outermost and (found := matching_of_loss(graph, start, products, known)):
            return Finding(found, "the loss is its matching loss", by_loss=True)
        finding = _elementwise_consumer(use, known)
    size = math.prod(graph.avals[start].shape)
    if use.outermost and finding.transfer == IDENTITY and size > _LARGEST_TEST:
        return Finding(IDENTITY, "too large to test the loss; name it in transfers=")
    return finding


def _elementwise_consumer(use: Use, known: Sequence[Transfer]) -> Finding:
    """Looks for the last known function that all after a pre-activation goes through.

    What the loss does not depend on, such as logging, is passed over, and so is
    dropout.
    """
    graph, start, live = use.graph, use.preactivation, use.live
    size = math.prod(graph.avals[start].shape)
    values: dict[int, Any] = {start: _GRID}
    ancestors: dict[int, set[int]] = {start: set()}
    found = None

    def is_gateway(number: int) -> bool:
        """Whether all that comes after the pre-activation comes after this number."""
        inside = ancestors[number]
        readers = {at for n in inside for at in graph.consumers.get(n, ())}
        outputs = {o for at in readers for o in graph.equations[at].outputs}
        return inside.isdisjoint(use.results) and outputs & live <= {number} | inside

    pending = list(graph.consumers.get(start, ()))
    while pending:
        at = heapq.heappop(pending)
        equation = graph.equations[at]
        number, *others = equation.outputs
        same_size = math.prod(graph.avals[number].shape) == size
        if others or number in values or not same_size or not _is_elementwise(equation):
            continue
        operands = [_value(i, graph, values) for i in equation.inputs]
        value = _dropped_out(equation, operands)
        if value is None and all(o is not None for o in operands):
            value = _evaluate(equation.source, operands)
        if value is None:
            continue
        values[number] = value
        reads = {i for i in equation.inputs if is_number(i) and i in ancestors}
        ancestors[number] = reads.union(*(ancestors[i] for i in reads))
        match = _closest(values[number], known)
        if match is not None and is_gateway(number):
            found = match
        for consumer in graph.consumers.get(number, ()):
            heapq.heappush(pending, consumer)
    if found is not None:
        return Finding(found, "applied to the pre-activation")
    users = {
        graph.equations[at].primitive.name
        for at in graph.consumers.get(start, ())
        if not live.isdisjoint(graph.equations[at].outputs)
    }
    ends = ["a result"] if start in use.results else []
    goes_to = ", ".join(sorted(users) + ends) or "nothing"
    return Finding(IDENTITY, f"no known function: goes to {goes_to}")


def _dropped_out(equation: Equation, operands: list[Any]) -> Any:
    """The grid, if zeros are put in places of a multiple of it that are not known."""
    if equation.primitive != primitives.SELECT or operands[0] is not None:
        return None
    kept: list[Any] = [o for o in operands[1:] if o is None or np.any(o)]
    if len(kept) != 1 or np.shape(kept[0]) != _GRID.shape:
        return None
    factor = kept[0][0] / _GRID[0]
    is_multiple = factor > 0 and np.allclose(kept[0], factor * _GRID)
    return _GRID if is_multiple else None


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
    if atom not in values:
        values[atom] = _scalar(atom, graph, values)
    return values[atom]


def _scalar(number: int, graph: Graph, values: dict[int, Any]) -> Any:
    """The one number that an array holds throughout, if it is known."""
    equation = graph.producers.get(number)
    if equation is None or not _is_elementwise(equation):
        return None
    operands = [_value(i, graph, values) for i in equation.inputs]
    if any(o is None or np.ndim(o) > 0 for o in operands):
        return None
    return _evaluate(equation.source, operands)


def _is_elementwise(equation: Equation | core.JaxprEqn) -> bool:
    """Whether an equation, or all that it calls, works on each element by itself."""
    source = equation.source if isinstance(equation, Equation) else equation
    if source.primitive in SHAPE_ONLY or source.primitive in primitives.ELEMENTWISE:
        return True
    body = called(source)
    if body is None or source.primitive not in _TRANSPARENT:
        return False
    plain = len(body.jaxpr.outvars) == 1 and not body.jaxpr.constvars
    return plain and all(map(_is_elementwise, body.jaxpr.eqns))


_TRANSPARENT = primitives.CALLS | primitives.CUSTOM


def _evaluate(equation: core.JaxprEqn, operands: list[Any]) -> Any:
    """The value of an elementwise equation on the grid, in float64 throughout."""
    primitive, params = equation.primitive, equation.params
    if primitive in primitives.CAST and "new_dtype" in params:
        dtype = params["new_dtype"]
        return np.asarray(operands[0], float if _is_float(dtype) else dtype)
    if primitive in SHAPE_ONLY:
        return operands[0]
    if primitive in primitives.ELEMENTWISE:
        power = {"y": params["y"]} if primitive == primitives.INTEGER_POW else {}
        with np.errstate(all="ignore"):
            return primitives.ELEMENTWISE[primitive](*operands, **power)
    body = called(equation)
    assert body is not None
    return _evaluate_jaxpr(body, operands)


def _evaluate_jaxpr(closed: core.ClosedJaxpr, operands: list[Any]) -> Any:
    """The one result of elementwise equations on the grid."""
    values = dict(zip(closed.jaxpr.invars, operands, strict=True))

    def read(atom):
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in closed.jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        result = _evaluate(equation, inputs)
        values[equation.outvars[0]] = result
    return read(closed.jaxpr.outvars[0])


def _is_float(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def matching_of_loss(
    graph: Graph, start: int, products: set[int], known: Sequence[Transfer]
) -> Transfer | None:
    r"""The transfer function of which the loss is the matching loss, if there is one.

    Then :math:`\partial L / \partial a = w (f(a) - y)` with weights w and labels y
    that do not depend on a, so that the gradient's differences are proportional to
    those of f. This is tested at three random points, with random numbers in place of
    everything that does not depend on a.
    """
    aval = graph.avals[start]
    tail = graph.dependents([start])
    loss = graph.results[0]
    reaches = any(loss in e.outputs for e in tail)
    final = all((products - {start}).isdisjoint(equation.outputs) for equation in tail)
    if (
        not is_number(loss)
        or not (reaches and final)
        or math.prod(aval.shape) > _LARGEST_TEST
    ):
        return None
    rng = np.random.default_rng(0)
    given = {*graph.inputs, *graph.held, *products, start}
    equations = graph.leading_to([loss], given)
    others = stand_ins(graph, equations, {start}, rng)

    def loss_of(preactivations):
        return jnp.sum(run(equations, {**others, start: preactivations})[loss])

    gradient = jax.jit(jax.grad(loss_of))
    tolerance = max(1e-3, 4 * float(jnp.finfo(aval.dtype).eps))
    points = 1.5 * rng.standard_normal((3, *aval.shape))
    gradients = [gradient(np.asarray(point, aval.dtype)) for point in points]
    for transfer in known:
        if transfer.conjugate is None:  # not monotone
            continue
        if transfer.over_last_axis and not aval.shape:
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


def stand_ins(
    graph: Graph, equations: Sequence[Equation], known: set[int], rng: Any
) -> dict[int, Any]:
    """Random numbers for what some equations read beside what is known."""
    made = {number for equation in equations for number in equation.outputs}
    read = {n for equation in equations for n in equation.inputs if is_number(n)}
    return {n: _stand_in(graph.avals[n], rng) for n in sorted(read - made - known)}


def _stand_in(aval: Any, rng: np.random.Generator) -> Any:
    if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), aval.shape)
    if _is_float(aval.dtype):
        return jnp.asarray(rng.uniform(0.1, 0.9, aval.shape), aval.dtype)
    if aval.dtype == jnp.bool_:
        return jnp.ones(aval.shape, aval.dtype)
    return jnp.asarray(rng.integers(0, 2, aval.shape), aval.dtype)
