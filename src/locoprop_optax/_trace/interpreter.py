"""Runs a traced loss so that its layers' inputs and cotangents are recorded.

At each use of a layer the product's other operand is recorded, and zeros are added to
its result, whose gradient is the cotangent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr
from jax.extend import core

from locoprop_optax._trace import primitives
from locoprop_optax._trace.graph import evaluate_alone
from locoprop_optax._trace.primitives import Scan, branches, called, remat_options
from locoprop_optax._trace.uses import Use
from locoprop_optax._utils.sharding import typed, zeros


class Wanted(NamedTuple):
    """Which of an equation's results are asked for."""

    results: tuple[int, ...]


class Record(NamedTuple):
    """What one use of a layer leaves behind, as the trace has it.

    Attributes:
      inputs: the operand that is the layer's input; None if there is none.
      outputs: the result.
    """

    inputs: Any
    outputs: Any


# By the places of equations, one level for each function around them.
Places = dict[int, Any]


def places_of(values: Mapping[tuple[int, ...], Any]) -> Places:
    """Values by position, as nested dictionaries by place."""
    places: Places = {}
    for (*around, last), value in values.items():
        inner = places
        for place in around:
            inner = inner.setdefault(place, {})
        inner[last] = value
    return places


def value_at(places: Places, position: Sequence[int]) -> Any:
    """The value at a position."""
    value: Any = places
    for place in position:
        value = value[place]
    return value


def no_perturbations(uses: Iterable[Use]) -> Places:
    """Zeros in the shapes of all uses' results, those of loops stacked in front."""
    return places_of({use.position: zeros(typed(use.value), use.scans) for use in uses})


def interpret(
    closed: core.ClosedJaxpr,
    uses: Places,
    operands: Sequence[Any],
    perturbations: Places,
    wanted: Places | None = None,
) -> tuple[list[Any], Places, Places]:
    """The results of a function, the records of the uses in it, and values in it.

    What holds no use and nothing that is asked for is left as it is.

    Args:
      closed: the function.
      uses: those in it, by place.
      operands: what it is called with.
      perturbations: what is added to the result of each use.
      wanted: the results of equations that are asked for. Not inside loops and
        conditions.
    """
    wanted = wanted or {}
    jaxpr = closed.jaxpr
    known: dict[Any, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    known.update(zip(jaxpr.invars, operands, strict=True))
    records: Places = {}
    found: Places = {}
    if not uses and not wanted:
        return eval_jaxpr(jaxpr, closed.consts, *operands), records, found
    start, last_read = 0, _last_reads(jaxpr)
    for place in sorted({*uses, *wanted}):
        equation = jaxpr.eqns[place]
        _run_between(jaxpr, start, place, known, last_read)
        values = [_value(atom, known) for atom in equation.invars]
        use, added = uses.get(place, {}), perturbations.get(place, {})
        asked = wanted.get(place, {})
        if isinstance(use, Use):
            results, records[place] = _record(jaxpr, equation, use, values, added)
        elif use or isinstance(asked, dict):
            inner = asked if isinstance(asked, dict) else {}
            opened = _open(equation, use, values, added, inner)
            results, records[place], found[place] = opened
        else:
            results = evaluate_alone(jaxpr, equation, values)
        if isinstance(asked, Wanted):
            found[place] = {at: results[at] for at in asked.results}
        known.update(zip(equation.outvars, results, strict=True))
        start = place + 1
    _run_between(jaxpr, start, len(jaxpr.eqns), known, last_read)
    return [_value(atom, known) for atom in jaxpr.outvars], records, found


def _value(atom: Any, known: Mapping[Any, Any]) -> Any:
    return atom.val if isinstance(atom, core.Literal) else known[atom]


def _last_reads(jaxpr: core.Jaxpr) -> dict[Any, int]:
    """The place of the last equation that reads each variable."""
    places = {
        atom: place
        for place, equation in enumerate(jaxpr.eqns)
        for atom in equation.invars
        if not isinstance(atom, core.Literal)
    }
    results = (a for a in jaxpr.outvars if not isinstance(a, core.Literal))
    return places | dict.fromkeys(results, len(jaxpr.eqns))


def _run_between(
    jaxpr: core.Jaxpr,
    start: int,
    stop: int,
    known: dict[Any, Any],
    last_read: Mapping[Any, int],
) -> None:
    """Runs some equations as they are."""
    some = jaxpr.eqns[start:stop]
    made = dict.fromkeys(var for equation in some for var in equation.outvars)
    given = dict.fromkeys(
        atom
        for equation in some
        for atom in equation.invars
        if not isinstance(atom, core.Literal) and atom not in made
    )
    results = [var for var in made if last_read.get(var, -1) >= stop]
    part = jaxpr.replace(
        constvars=[], invars=list(given), outvars=results, eqns=list(some)
    )
    values = eval_jaxpr(part, [], *(known[var] for var in given))
    known.update(zip(results, values, strict=True))


def _record(
    jaxpr: core.Jaxpr,
    equation: core.JaxprEqn,
    use: Use,
    values: Sequence[Any],
    perturbation: Any,
) -> tuple[list[Any], Record]:
    (result,) = evaluate_alone(jaxpr, equation, values)
    other = None if use.other is None else values[use.other]
    return [result + perturbation], Record(other, result)


def _open(
    equation: core.JaxprEqn,
    uses: Places,
    values: Sequence[Any],
    perturbations: Places,
    wanted: Places,
) -> tuple[list[Any], Places, Places]:
    """Runs the function of an equation that holds uses, or what is asked for."""
    if equation.primitive == primitives.SCAN:
        return *_scan(Scan.of(equation), uses, values, perturbations), {}
    if equation.primitive == primitives.COND:
        return *_cond(branches(equation), uses, values, perturbations), {}
    body = called(equation)
    assert body is not None
    function = partial(interpret, body, uses, wanted=wanted)
    if equation.primitive == primitives.REMAT:
        function = jax.checkpoint(function, **remat_options(equation))
    return function(values, perturbations)


def _scan(
    scan: Scan, uses: Places, values: Sequence[Any], perturbations: Places
) -> tuple[list[Any], Places]:
    split = scan.consts + scan.carries
    consts, start, slices = (
        list(values[: scan.consts]),
        list(values[scan.consts : split]),
        list(values[split:]),
    )

    def turn(carry, given):
        operands, added = given
        results, records, _ = interpret(
            scan.body, uses, [*consts, *carry, *operands], added
        )
        return results[: scan.carries], (results[scan.carries :], records)

    end, (stacked, records) = jax.lax.scan(
        turn, start, (slices, perturbations), **scan.options
    )
    return [*end, *stacked], records


def _cond(
    choices: Sequence[core.ClosedJaxpr],
    uses: Places,
    values: Sequence[Any],
    perturbations: Places,
) -> tuple[list[Any], Places]:
    """Runs the chosen branch; what the others would have recorded is zero."""
    index, *operands = values
    shapes = {
        number: jax.eval_shape(
            partial(interpret, choices[number], uses[number]),
            operands,
            perturbations[number],
        )[1]
        for number in uses
    }

    def branch(number, operands, perturbations):
        untaken = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        results, records, _ = interpret(
            choices[number],
            uses.get(number, {}),
            operands,
            perturbations.get(number, {}),
        )
        return results, {**untaken, **({number: records} if number in uses else {})}

    return jax.lax.switch(
        index,
        [partial(branch, number) for number in range(len(choices))],
        operands,
        perturbations,
    )
