"""What a traced loss says of each captured layer."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jax.extend import core

from locoprop_optax._graph import Equation, Graph, body_of, tap_p
from locoprop_optax._transfer_detection import Finding, find_transfer
from locoprop_optax.losses import Transfer


class Sighting(NamedTuple):
    """One call of one layer in a trace.

    Attributes:
      layer: the layer's path.
      call: which of the layer's calls, as counted while it was traced.
      finding: its transfer function.
      trouble: why a probe would not reach this call whole; None if it would.
    """

    layer: str
    call: int
    finding: Finding
    trouble: str | None


def survey(closed: core.ClosedJaxpr, known: Sequence[Transfer]) -> list[Sighting]:
    """All calls of tapped layers in the trace of a loss, its first result.

    Args:
      closed: the trace.
      known: the transfer functions to look for, in the order of preference.
    """
    found = [s for s, _ in _sightings(Graph.of(closed), known, outermost=True)]
    seen = [(s.layer, s.call) for s in found]
    return [
        s._replace(trouble=s.trouble or _REPLAYED)
        if seen.count((s.layer, s.call)) > 1
        else s
        for s in found
    ]


_BROADCAST = "its parameters are broadcast across {}, so its records would be summed"
_REPLAYED = (
    "it is called more than once through one jitted function, whose cached trace "
    "cannot tell the calls apart"
)


def _sightings(
    graph: Graph, known: Sequence[Transfer], *, outermost: bool
) -> Iterator[tuple[Sighting, set[int]]]:
    """Each call, with the positions of the graph's inputs that its probe is from."""
    for equation in graph.equations:
        if equation.primitive is tap_p:
            finding = find_transfer(graph, equation, known, outermost=outermost)
            params = equation.params
            trouble = _BROADCAST.format("a vmap") if params["broadcast"] else None
            sighting = Sighting(params["layer"], params["call"], finding, trouble)
            yield sighting, graph.sources(equation.inputs[0])
    for wrap in graph.wraps:
        for body, offset in _bodies(wrap):
            for sighting, sources in _sightings(body, known, outermost=False):
                trouble = sighting.trouble or _trouble_in(wrap, sources)
                atoms = [wrap.inputs[at + offset] for at in sources]
                outer = set().union(*(graph.sources(atom) for atom in atoms))
                yield sighting._replace(trouble=trouble), outer


def _bodies(wrap: Equation) -> Iterator[tuple[Graph, int]]:
    """The functions an equation runs, and where their arguments start."""
    name, params = wrap.primitive.name, wrap.params
    if name == "cond":
        yield from ((Graph.of(branch), 1) for branch in params["branches"])
    elif name == "while":
        yield Graph.of(params["body_jaxpr"]), params["cond_nconsts"]
    else:
        body = body_of(params)
        assert body is not None, f"{name} holds a tap in no body of its own"
        yield Graph.of(body), 0


def _trouble_in(wrap: Equation, sources: set[int]) -> str | None:
    """Why a probe would not survive inside an equation; None if it would."""
    name, params = wrap.primitive.name, wrap.params
    if name == "cond":
        return None
    if name == "scan":
        whole = params["num_consts"] + params["num_carry"]
        sliced = all(at >= whole for at in sources)
        return None if sliced else _BROADCAST.format("the turns of a scan")
    if name in ("custom_vjp_call", "custom_jvp_call"):
        return "a custom derivative rule around it hides it"
    return f"it is called inside a {name}, which keeps no record of each turn"
