"""What must hold of every capture."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax

import locoprop_optax as loco
from locoprop_optax._records.paths import map_by_path


def assert_close(found, expected):
    # bfloat16 products are rounded where XLA fuses them, or not
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def backprop_step(layers, params, grads, intermediates):
    """One local step of any optimizer is that of backprop."""
    tx = loco.scale_by_locoprop(
        layers,
        target=loco.targets.gradient_descent(1.0),
        solver=loco.solvers.first_order(optax.sgd(0.1), 1),
    )
    return tx.update(grads, tx.init(params), params, intermediates=intermediates)[0]


def newton_objectives(layers, params, intermediates):
    """The squared loss before an exact step, and after it, by layer."""
    alone = {p: replace(la, elsewhere=None) for p, la in intermediates.layers.items()}
    intermediates = loco.Intermediates(alone)
    tx = loco.scale_by_locoprop(
        layers,
        loss=loco.losses.squared_loss(),
        target=loco.targets.gradient_descent(1.0),
        solver=loco.solvers.majorized_newton(num_steps=1, damping=1e-3),
    )
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params, intermediates=intermediates)
    steps, objectives = layers.split(updates), {}
    for path, layer in intermediates.layers.items():

        def objective(change, inputs, cotangents, layer=layer):
            moved = layer.linear_map(change, inputs)
            return jnp.sum(cotangents**2), jnp.sum((moved - cotangents) ** 2)

        for _ in range(layer.stack_dims):
            objective = jax.vmap(objective)
        penalty = layer.penalty or jax.tree.map(jnp.zeros_like, steps[path])
        step = {name: steps[path][name] - penalty[name] for name in steps[path]}
        cotangents = layer.cotangents.astype(jnp.float32)
        objectives[path] = objective(step, layer.inputs, cotangents)
    return objectives


def preactivations_again(layers, params, intermediates):
    """Each pre-activation, as the layer makes it of its inputs and parameters."""
    own, made = layers.split(params), {}
    for path, layer in intermediates.layers.items():
        forward = layer.linear_map
        for _ in range(layer.stack_dims):
            forward = jax.vmap(forward)
        made[path] = forward(own[path], layer.inputs).astype(jnp.float32)
    return made


def assert_usable(layers, params, grads, intermediates):
    """The intermediates are whole, and the optimizers do with them what they should."""

    @jax.jit  # one compilation, where each operation would have its own
    def found(params, grads, intermediates):
        return (
            backprop_step(layers, params, grads, intermediates),
            newton_objectives(layers, params, intermediates),
            preactivations_again(layers, params, intermediates),
        )

    updates, objectives, made = found(params, grads, intermediates)
    known = layers.paths
    expected = map_by_path(lambda path, g: (0.1 if path in known else 1.0) * g, grads)
    assert_close(updates, expected)
    for path, layer in intermediates.layers.items():
        before, after = map(np.asarray, objectives[path])
        assert np.all(after <= before * (1 + 1e-4))
        assert np.all(after < 0.9999 * before + 1e-12)
        if str(layer.linear_map) == "summand":
            continue  # its pre-activation holds what it is added to
        a = layer.preactivations
        tolerance = 5e-2 if a.dtype.itemsize < 4 else 1e-4
        np.testing.assert_allclose(
            made[path], a.astype(jnp.float32), rtol=tolerance, atol=tolerance
        )
    dtypes = [layer.preactivations.dtype for layer in intermediates.layers.values()]
    tolerance = 2e-2 if jnp.bfloat16 in dtypes else 1e-4
    loco.check_intermediates(layers, params, grads, intermediates, tolerance)


def assert_captured(loss_fn, params, *args):
    """Gradients are those of the untouched loss, and layers the same under jit.

    Returns:
      The layers and their intermediates.
    """
    loss, grads = jax.jit(jax.value_and_grad(loss_fn))(params, *args)
    layers = loco.layers(loss_fn)(params, *args)
    under_jit = []
    jax.make_jaxpr(lambda *a: under_jit.append(loco.layers(loss_fn)(*a)))(params, *args)
    assert under_jit == [layers]
    capture = jax.jit(loco.value_and_grad(loss_fn, layers))
    found, found_grads, intermediates = capture(params, *args)
    assert_close((found, found_grads), (loss, grads))
    assert jax.tree.structure(found_grads) == jax.tree.structure(grads)
    assert_usable(layers, params, found_grads, intermediates)
    return layers, intermediates
