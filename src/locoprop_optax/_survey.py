"""What a traced loss says of each captured layer."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jax.extend import core

from locoprop_optax._graph import Equation, Graph, bodies_of, body_of, tap_p
from locoprop_optax._transfer_detection import Finding, find_transfer
from locoprop_optax._transfers import Transfer


class Sighting(NamedTuple):
    """One call of one layer in a trace.

    Attributes:
      layer: the layer's path.
      number: which of the layer's calls, as counted while it was traced.
      note: what was noted of the call when its tap was set.
      finding: its transfer function.
      trouble: why a probe would not give this call's record; None if it would.
    """

    layer: str
    number: int
    note: Any
    finding: Finding
    trouble: str | None


def survey(
    closed: core.ClosedJaxpr, kernels: Mapping[int, str], known: Sequence[Transfer]
) -> list[Sighting]:
    """All calls of tapped layers in the trace of a loss, its first result.

    Args:
      closed: the trace.
      kernels: the layer of each of the trace's inputs that is a kernel.
      known: the transfer functions to look for, in the order of preference.
    """
    graph, found = Graph.of(closed), []
    for sighting, _, kernel in _sightings(graph, known, outermost=True):
        trouble = sighting.trouble
        if kernel is None or kernels.get(kernel) != sighting.layer:
            trouble = trouble or _COMPUTED
        elif graph.used_apart(kernel, sighting.layer):
            trouble = trouble or _TIED
        found.append(sighting._replace(trouble=trouble))
    seen = [(s.layer, s.number) for s in found]
    return [
        s._replace(trouble=s.trouble or _REPLAYED)
        if seen.count((s.layer, s.number)) > 1
        else s
        for s in found
    ]


_BROADCAST = "its parameters are broadcast across {}, so its records would be summed"
_REPLAYED = (
    "a call of it comes from a jitted function's cached trace, which cannot be told "
    "from another call; use the function without jit inside the loss"
)
_SHARDED = (
    "it is called inside a shard_map; shard the arrays under jax.jit instead, or put "
    "the shard_map around the whole training step, with locoprop_optax.averaged"
)
_TIED = "its kernel is also multiplied with something else, as tied weights are"
_COMPUTED = (
    "the kernel that it uses is not its parameter itself but computed from it, or "
    "its gradient is stopped"
)


def _sightings(
    graph: Graph, known: Sequence[Transfer], *, outermost: bool
) -> Iterator[tuple[Sighting, set[int], int | None]]:
    """Each call, with the graph's inputs that its probe and its kernel come from."""
    for equation in graph.equations:
        if equation.primitive is tap_p:
            params = equation.params
            probe, kernel, _ = equation.inputs
            sighting = Sighting(
                layer=params["layer"],
                number=params["number"],
                note=params["note"],
                finding=find_transfer(graph, equation, known, outermost=outermost),
                trouble=_BROADCAST.format("a vmap") if params["broadcast"] else None,
            )
            yield sighting, graph.sources(probe), graph.origin(kernel)
    for wrap in graph.wraps:
        for body, offset in bodies_of(wrap):
            for sighting, probe, kernel in _sightings(body, known, outermost=False):
                trouble = sighting.trouble or _trouble_in(wrap, probe)
                atoms = [wrap.inputs[at + offset] for at in probe]
                outer_kernel = (
                    None
                    if kernel is None
                    else graph.origin(wrap.inputs[kernel + offset])
                )
                outer_probe = set().union(*(graph.sources(atom) for atom in atoms))
                yield sighting._replace(trouble=trouble), outer_probe, outer_kernel


def _trouble_in(wrap: Equation, probe: set[int]) -> str | None:
    """Why a probe would not survive inside an equation; None if it would."""
    name, body = wrap.primitive.name, body_of(wrap.params)
    if name == "cond":
        return None
    if name == "scan" and body is not None:
        given, taken = map(_ranks, (wrap.source.invars, body.jaxpr.invars))
        sliced = all(given[at] > taken[at] for at in probe)
        return None if sliced else _BROADCAST.format("the turns of a scan")
    if name == "shard_map":
        return _SHARDED
    if name.startswith("custom_"):
        return "a custom derivative rule around it hides it"
    return f"it is called inside a {name}, which keeps no record of each turn"


def _ranks(atoms: Sequence[Any]) -> list[int]:
    return [atom.aval.ndim for atom in atoms]
