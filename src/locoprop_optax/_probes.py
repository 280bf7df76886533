"""Probes: a layer's intermediates as a gradient.

A probe is an array of zeros that travels with a layer's parameters. The layer's output
passes through an identity that also takes the probe, and whose derivative returns the
layer's input, pre-activation and cotangent as the probe's gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Record(NamedTuple):
    """What one call of a layer leaves behind; also the form of its probe."""

    inputs: jax.Array
    preactivations: jax.Array
    cotangents: jax.Array


class Seeded(NamedTuple):
    """The probe of a call at which a pass back begins, and with which cotangents."""

    record: Record
    seed: jax.Array


Probes = dict[str, dict[str, Any]]  # by layer, then by call


@jax.custom_vjp
def _probed(probe: Record, inputs: jax.Array, preactivations: jax.Array) -> jax.Array:
    del probe, inputs
    return preactivations


def _probed_forward(probe, inputs, preactivations):
    del probe
    return preactivations, (inputs, preactivations)


def _probed_backward(saved, cotangents):
    inputs, preactivations = saved
    return Record(inputs, preactivations, cotangents), None, cotangents


_probed.defvjp(_probed_forward, _probed_backward)


@jax.custom_vjp
def _seeded(probe: Seeded, inputs: jax.Array, preactivations: jax.Array) -> jax.Array:
    """As `_probed`, but with the seed in place of the cotangents that come back."""
    del probe, inputs
    return preactivations


def _seeded_forward(probe, inputs, preactivations):
    return preactivations, (inputs, preactivations, probe.seed)


def _seeded_backward(saved, cotangents):
    del cotangents
    inputs, preactivations, seed = saved
    gradient = Seeded(Record(inputs, preactivations, seed), jnp.zeros_like(seed))
    return gradient, None, seed


_seeded.defvjp(_seeded_forward, _seeded_backward)


def recorded(
    probe: Record | Seeded, inputs: jax.Array, preactivations: jax.Array
) -> jax.Array:
    """The pre-activations; the gradient of `probe` is the call's record."""
    pass_by = _seeded if isinstance(probe, Seeded) else _probed
    return pass_by(probe, inputs, preactivations)
