import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import locoprop_optax as loco
from tests.helpers import regression, train_step


class Normed(nn.Module):
    """A model with a layer that is not local."""

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(name="norm")(nn.Dense(5, name="first")(x))
        return nn.Dense(3, name="second")(nn.relu(x))


@pytest.mark.parametrize(
    "make",
    [
        loco.locoprop_momentum,
        lambda: loco.locoprop_m(1e-3),
        lambda: loco.locoprop_s(1e-3),
    ],
)
def test_training_lowers_the_loss(make):
    loss_fn, params, batch = regression(Normed(), batch=32)
    tx = make()
    step, state = jax.jit(train_step(loss_fn, tx)), tx.init(params)
    before = loss_fn(params, batch)
    for _ in range(50):
        params, state, loss = step(params, state, batch)
    assert loss < 0.7 * before


def update_of(tx, loss_fn, params, batch):
    _, grads, intermediates = loco.linen.value_and_grad(loss_fn)(params, batch)
    return tx.update(grads, tx.init(params), params, intermediates=intermediates)[0]


def test_locoprop_momentum_is_the_documented_chain():
    loss_fn, params, batch = regression()
    by_hand = optax.chain(
        loco.scale_by_locoprop(
            loss=loco.losses.matching_loss(),
            target=loco.targets.normalized(0.05),
            regularizer=loco.regularizers.none(),
            solver=loco.solvers.limited(loco.solvers.majorized_newton(2, 0.1), 0.05),
        ),
        optax.trace(0.9),
        optax.add_decayed_weights(0.01),
        optax.scale_by_learning_rate(0.1),
    )
    chex.assert_trees_all_close(
        update_of(loco.locoprop_momentum(weight_decay=0.01), loss_fn, params, batch),
        update_of(by_hand, loss_fn, params, batch),
    )


def test_other_parameters_go_to_the_fallback():
    loss_fn, params, batch = regression(Normed())
    grads = jax.grad(loss_fn)(params, batch)
    updates = update_of(
        loco.locoprop_momentum(fallback=optax.sgd(0.5)), loss_fn, params, batch
    )
    chex.assert_trees_all_close(
        updates["norm"], jax.tree.map(lambda g: -0.5 * g, grads["norm"]), rtol=1e-5
    )
    excluding = loco.locoprop_momentum(fallback=optax.sgd(0.5), exclude="first")
    updates = update_of(excluding, loss_fn, params, batch)
    chex.assert_trees_all_close(
        updates["first"], jax.tree.map(lambda g: -0.5 * g, grads["first"]), rtol=1e-5
    )


def test_fallback_of_the_reference_is_its_one_local_step():
    loss_fn, params, batch = regression(Normed())
    grads = jax.grad(loss_fn)(params, batch)
    one_step = update_of(
        loco.locoprop_m(1e-2, num_local_steps=1), loss_fn, params, batch
    )
    optimizer = optax.rmsprop(
        1e-2, decay=0.9, eps=1e-5, initial_scale=1.0, momentum=0.999
    )
    scaled = jax.tree.map(lambda g: 10.0 * g, grads)
    expected, _ = optimizer.update(scaled, optimizer.init(params))
    chex.assert_trees_all_close(one_step, expected, rtol=1e-3, atol=1e-7)


def test_injected_hyperparameters_equal_plain_ones():
    loss_fn, params, batch = regression()

    def make(learning_rate, gamma, damping):
        return loco.locoprop_momentum(
            learning_rate,
            target=loco.targets.normalized(gamma),
            solver=loco.solvers.majorized_newton(damping=damping),
        )

    injected = optax.inject_hyperparams(make)(0.2, 0.1, 0.3)
    chex.assert_trees_all_close(
        update_of(injected, loss_fn, params, batch),
        update_of(make(0.2, 0.1, 0.3), loss_fn, params, batch),
        rtol=1e-6,
    )
    state = injected.init(params)
    assert set(state.hyperparams) == {"learning_rate", "gamma", "damping"}


def test_injecting_a_count_says_what_to_do():
    loss_fn, params, batch = regression()
    injected = optax.inject_hyperparams(loco.locoprop_m)(1e-3)
    with pytest.raises(TypeError, match=r"number of local steps.*`static_args`"):
        injected.init(params)
    static = optax.inject_hyperparams(
        loco.locoprop_m, static_args=("num_local_steps", "decay_floor")
    )(1e-3)
    plain = loco.locoprop_m(1e-3)
    chex.assert_trees_all_close(
        update_of(static, loss_fn, params, batch),
        update_of(plain, loss_fn, params, batch),
        rtol=1e-5,
    )


def test_state_maps_like_any_optax_state():
    _, params, _ = regression()
    for tx in (loco.locoprop_momentum(), loco.locoprop_m(1e-3)):
        state = tx.init(params)
        mapped = optax.tree.map_params(tx, lambda leaf: leaf + 1, state)
        assert jax.tree.structure(mapped) == jax.tree.structure(state)
        first = jax.tree.leaves(mapped)
        changed = [
            not np.array_equal(a, b)
            for a, b in zip(first, jax.tree.leaves(state), strict=True)
        ]
        assert any(changed)


@pytest.mark.parametrize("make", [loco.locoprop_m, loco.locoprop_s])
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"activation_learning_rate": 0.0}, "γ.* must be positive, got 0.0"),
        ({"num_local_steps": 0}, "local steps.* at least 1, got 0"),
    ],
)
def test_reference_errors(make, options, match):
    with pytest.raises(ValueError, match=match):
        make(1e-5, **options)


def test_bfloat16_parameters_keep_small_steps():
    params = {"a": {"kernel": jnp.full((4, 3), 100.0, jnp.bfloat16)}}
    x = jnp.eye(4, dtype=jnp.bfloat16)
    layer = loco.LayerIntermediates(
        x,
        x @ params["a"]["kernel"],
        jnp.full((4, 3), 1e-3, jnp.bfloat16),
        {"kernel": jnp.full((4, 3), 1e-3, jnp.bfloat16)},
    )
    tx = loco.scale_by_locoprop(
        target=loco.targets.gradient_descent(1.0),
        solver=loco.solvers.first_order(optax.sgd(0.1), 5, decay_floor=1.0),
    )
    updates, _ = tx.update(
        params, tx.init(params), params, intermediates=loco.Intermediates({"a": layer})
    )
    expected = 1e-3 * (1 - 0.9**5)
    np.testing.assert_allclose(updates["a"]["kernel"], expected, rtol=1e-2)
