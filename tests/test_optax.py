"""LocoProp inside the transformations of Optax.

Each either equals what a hand-written loop gives, or raises an error that explains.
"""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from optax import contrib

import locoprop_optax as loco
from tests.helpers import local_steps, regression, slow, train_step

LOSS, PARAMS, BATCH = regression()
LAYERS = loco.layers(LOSS)(PARAMS, BATCH)
BLOCK = local_steps(LAYERS, 0.2)


def train(tx, steps=4, **extra):
    """Parameters after some steps, and the optimizer's state."""
    capture, params = loco.value_and_grad(LOSS, LAYERS), PARAMS

    @jax.jit
    def step(params, state):
        loss, grads, intermediates = capture(params, BATCH)
        given = {"value": loss, **extra}
        updates, state = tx.update(
            grads, state, params, intermediates=intermediates, **given
        )
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def by_hand(change=lambda k, updates: updates, steps=4):
    """Parameters after a loop in which each step's updates are changed by hand."""
    capture, params = loco.value_and_grad(LOSS, LAYERS), PARAMS
    state = BLOCK.init(params)
    for k in range(steps):
        _, grads, intermediates = capture(params, BATCH)
        updates, state = BLOCK.update(grads, state, params, intermediates=intermediates)
        params = optax.apply_updates(params, change(k, updates))
    return params


def only(name):
    return lambda k, updates: {
        layer: jax.tree.map(lambda u, on=layer == name: u if on else 0 * u, leaves)
        for layer, leaves in updates.items()
    }


def mask(name):
    return {
        layer: dict.fromkeys(leaves, layer == name) for layer, leaves in PARAMS.items()
    }


HALF = optax.scale(0.5)
EQUAL = {
    "chain": (optax.chain(BLOCK, HALF), lambda k, u: jax.tree.map(lambda x: x / 2, u)),
    "named_chain": (
        optax.named_chain(("loco", BLOCK), ("half", HALF)),
        lambda k, u: jax.tree.map(lambda x: x / 2, u),
    ),
    "masked": (
        optax.chain(
            optax.masked(BLOCK, mask("first")),
            optax.masked(optax.set_to_zero(), mask("second")),
        ),
        only("first"),
    ),
    "partition": (
        optax.partition({True: BLOCK, False: optax.set_to_zero()}, mask("second")),
        only("second"),
    ),
    "partition of whole layers": (
        optax.partition(
            {True: BLOCK, False: optax.set_to_zero()}, {"first": False, "second": True}
        ),
        only("second"),
    ),
    "multi_transform": (
        optax.multi_transform(
            {True: BLOCK, False: optax.set_to_zero()}, mask("second")
        ),
        only("second"),
    ),
    "freeze": (
        optax.chain(BLOCK, optax.transforms.freeze(mask("first"))),
        only("second"),
    ),
    "apply_if_finite": (optax.apply_if_finite(BLOCK, 3), lambda k, u: u),
    "conditionally_transform": (
        optax.conditionally_transform(BLOCK, lambda step: step >= 0),
        lambda k, u: u,
    ),
    "conditionally_mask": (
        optax.conditionally_mask(BLOCK, lambda step: step < 2),
        lambda k, u: jax.tree.map(lambda x: x * (k < 2), u),
    ),
    "snapshot": (
        optax.chain(BLOCK, optax.snapshot("norm", optax.tree.norm)),
        lambda k, u: u,
    ),
    "monitor": (
        optax.chain(BLOCK, optax.monitor({"norm": optax.tree.norm})),
        lambda k, u: u,
    ),
    "reduce_on_plateau": (
        optax.chain(BLOCK, contrib.reduce_on_plateau()),
        lambda k, u: u,
    ),
    "scale_by_schedule": (
        optax.chain(BLOCK, optax.scale_by_schedule(lambda k: 1 / (1 + k))),
        lambda k, u: jax.tree.map(lambda x: x / (1 + k), u),
    ),
    "with_extra_args_support": (optax.with_extra_args_support(BLOCK), lambda k, u: u),
}


FEW = ("chain", "partition", "apply_if_finite", "with_extra_args_support")


@pytest.mark.parametrize("name", [n if n in FEW else slow(n) for n in EQUAL])
def test_equals_a_loop_by_hand(name):
    tx, change = EQUAL[name]
    chex.assert_trees_all_close(train(tx)[0], by_hand(change), rtol=2e-4, atol=1e-5)


def test_conditionally_transform_skips_the_block():
    tx = optax.conditionally_transform(BLOCK, lambda step: step < 0)
    raw = jax.grad(LOSS)(PARAMS, BATCH)
    after, _ = train(tx, steps=1)
    chex.assert_trees_all_close(
        after, jax.tree.map(jnp.add, PARAMS, raw), rtol=1e-5, atol=1e-6
    )


def test_apply_if_finite_skips_a_broken_batch():
    x, y = BATCH
    tx = optax.apply_if_finite(local_steps(LAYERS), 3)
    state = tx.init(PARAMS)
    step = jax.jit(train_step(LOSS, LAYERS, tx))
    after, state, _ = step(PARAMS, state, (x.at[0, 0].set(jnp.nan), y))
    chex.assert_trees_all_equal(after, PARAMS)
    after, state, _ = step(PARAMS, state, (x, y))
    assert not jnp.allclose(after["first"]["kernel"], PARAMS["first"]["kernel"])
    assert all(bool(jnp.all(jnp.isfinite(p))) for p in jax.tree.leaves(after))


def test_injected_schedules_reach_every_number():
    def make(learning_rate, gamma, damping, strength):
        return local_steps(
            LAYERS,
            learning_rate,
            target=loco.targets.normalized(gamma),
            regularizer=loco.regularizers.squared_l2(strength),
            solver=loco.solvers.majorized_newton(damping=damping),
        )

    def linear(start, end):
        return optax.linear_schedule(start, end, 4)

    numbers = [(0.3, 0.1), (0.1, 0.05), (0.2, 0.1), (0.1, 0.3)]
    injected = optax.inject_hyperparams(make)(*(linear(*n) for n in numbers))
    inside = make(*(linear(*n) for n in numbers))
    chex.assert_trees_all_close(train(injected)[0], train(inside)[0], rtol=1e-4)
    assert float(train(injected)[1].hyperparams["gamma"]) < 0.1


def test_schedule_free_trains():
    inner = local_steps(LAYERS, 0.3)
    tx = contrib.schedule_free(inner, 0.3, b1=0.9)
    trained, state = train(tx, steps=40)
    evaluated = contrib.schedule_free_eval_params(state, trained)
    assert LOSS(evaluated, BATCH) < 0.7 * LOSS(PARAMS, BATCH)


def test_flattened_parameters_are_an_error_that_explains():
    with pytest.raises(ValueError, match=r"hold no 'first/kernel'.*optax.flatten"):
        train(optax.flatten(loco.scale_by_locoprop(LAYERS)))


def test_dropped_extra_arguments_are_an_error_that_explains():
    inner = loco.scale_by_locoprop(LAYERS)
    dropping = optax.GradientTransformation(
        inner.init, lambda updates, state, params: inner.update(updates, state, params)
    )
    with pytest.raises(TypeError, match="drops its extra arguments"):
        train(optax.with_extra_args_support(dropping))


@pytest.mark.parametrize(
    "tx", [loco.scale_by_locoprop(LAYERS), loco.locoprop_m(LAYERS, 1e-3)]
)
def test_joined_micro_batches_equal_the_large_batch(tx):
    loss_fn, params, (x, y) = regression(batch=12)
    capture = loco.value_and_grad(loss_fn, LAYERS)
    _, grads, whole = capture(params, (x, y))
    parts = [capture(params, (x[i : i + 4], y[i : i + 4])) for i in (0, 4, 8)]
    joined = loco.join_intermediates(*(part[2] for part in parts))
    mean_grads = jax.tree.map(lambda *g: sum(g) / 3, *(part[1] for part in parts))
    chex.assert_trees_all_close(joined.layers, whole.layers, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(
        joined.gauss_newton.gradient, whole.gauss_newton.gradient, rtol=1e-4, atol=1e-6
    )
    results = [
        tx.update(g, tx.init(params), params, intermediates=i)[0]
        for g, i in ((grads, whole), (mean_grads, joined))
    ]
    chex.assert_trees_all_close(*results, rtol=1e-3, atol=1e-6)


def test_numbers_of_targets_and_solvers_can_be_injected():
    def make(damping, decay, tolerance):
        return local_steps(
            LAYERS,
            target=loco.targets.natural_gradient(0.1, damping, decay),
            solver=loco.solvers.conjugate_gradient(3, damping, tolerance=tolerance),
        )

    injected = optax.inject_hyperparams(make)(damping=0.2, decay=0.5, tolerance=1e-3)
    plain = make(0.2, 0.5, 1e-3)
    chex.assert_trees_all_close(train(injected)[0], train(plain)[0], rtol=1e-3)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (
            lambda ema: local_steps(LAYERS, solver=loco.solvers.exact(ema=ema)),
            "ema",
        ),
        (
            lambda scale: local_steps(
                LAYERS, regularizer=loco.regularizers.signed_entropy(1.0, scale)
            ),
            "scale",
        ),
    ],
)
def test_what_shapes_the_state_must_be_static(make, name):
    with pytest.raises(TypeError, match=f"{name} shapes .*static_args"):
        train(optax.inject_hyperparams(make)(**{name: 0.5}))


def test_joining_parts_with_and_without_sampled_cotangents():
    _, _, part = loco.value_and_grad(LOSS, LAYERS)(PARAMS, BATCH)
    both = loco.add_sampled_cotangents(part, part)
    joined = loco.join_intermediates(both, both).layers["first/kernel"]
    assert joined.sampled_cotangents.shape == (16, 5)
    with pytest.raises(ValueError, match="hold sampled_cotangents, others do not"):
        loco.join_intermediates(both, part)


def test_joining_different_layers_names_them():
    fewer = loco.layers(LOSS, exclude="first/*")(PARAMS, BATCH)
    _, _, whole = loco.value_and_grad(LOSS, LAYERS)(PARAMS, BATCH)
    _, _, part = loco.value_and_grad(LOSS, fewer)(PARAMS, BATCH)
    with pytest.raises(ValueError, match="not in all of them: 'first/kernel'"):
        loco.join_intermediates(whole, part)
    with pytest.raises(ValueError, match="at least one part"):
        loco.join_intermediates()


def test_joining_parts_of_unequal_size():
    halves = jax.tree.map(lambda leaf: leaf[:3], BATCH), BATCH
    parts = [loco.value_and_grad(LOSS, LAYERS)(PARAMS, half)[2] for half in halves]
    with pytest.raises(ValueError, match=r"the shapes \(3, 5\), \(8, 5\), expected"):
        loco.join_intermediates(*parts)
