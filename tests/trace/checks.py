"""What must hold of every capture."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import locoprop_optax as loco


def assert_close(found, expected):
    # bfloat16 products are rounded where XLA fuses them, or not
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def assert_one_step_is_backprop(layers, params, grads, intermediates):
    tx = loco.locoprop_m(
        layers,
        0.1,
        activation_learning_rate=1.0,
        num_local_steps=1,
        optimizer=optax.sgd,
    )
    updates, _ = tx.update(grads, tx.init(params), params, intermediates=intermediates)
    assert_close(updates, jax.tree.map(lambda g: -0.1 * g, grads))


def assert_newton_lowers_every_objective(layers, params, intermediates):
    """The exact step of squared loss does what its normal equations say."""
    tx = loco.scale_by_locoprop(
        layers,
        loss=loco.losses.squared_loss(),
        target=loco.targets.gradient_descent(1.0),
        solver=loco.solvers.majorized_newton(num_steps=1, damping=1e-3),
    )
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params, intermediates=intermediates)
    assert all(bool(jnp.all(jnp.isfinite(u))) for u in jax.tree.leaves(updates))
    steps = layers.split(updates)
    for path, layer in intermediates.layers.items():

        def objective(change, inputs, cotangents, layer=layer):
            moved = layer.linear_map(change, inputs)
            return jnp.sum((moved - cotangents) ** 2), jnp.sum(cotangents**2)

        for _ in range(layer.stack_dims):
            objective = jax.vmap(objective)
        penalty = layer.penalty or jax.tree.map(jnp.zeros_like, steps[path])
        step = {name: steps[path][name] - penalty[name] for name in steps[path]}
        after, before = objective(
            step, layer.inputs, layer.cotangents.astype(jnp.float32)
        )
        assert np.all(np.asarray(after) <= np.asarray(before) * (1 + 1e-4))
        assert np.all(np.asarray(after) < 0.9999 * np.asarray(before) + 1e-12)


def assert_records_are_whole(layers, params, intermediates):
    """Each pre-activation is what the layer makes of its inputs and parameters."""
    own = layers.split(params)
    for path, layer in intermediates.layers.items():
        forward = layer.linear_map
        for _ in range(layer.stack_dims):
            forward = jax.vmap(forward)
        small = layer.preactivations.dtype.itemsize < 4
        tolerance = 5e-2 if small else 1e-4
        np.testing.assert_allclose(
            forward(own[path], layer.inputs).astype(jnp.float32),
            layer.preactivations.astype(jnp.float32),
            rtol=tolerance,
            atol=tolerance,
        )


def assert_usable(layers, params, grads, intermediates):
    """The intermediates are whole, and the optimizers do with them what they should."""
    dtypes = [layer.preactivations.dtype for layer in intermediates.layers.values()]
    tolerance = 2e-2 if jnp.bfloat16 in dtypes else 1e-4
    loco.check_intermediates(layers, params, grads, intermediates, tolerance)
    assert_records_are_whole(layers, params, intermediates)
    assert_one_step_is_backprop(layers, params, grads, intermediates)
    assert_newton_lowers_every_objective(layers, params, intermediates)


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
