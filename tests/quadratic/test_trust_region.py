"""How far the quadratic model of a batch's loss is followed."""

from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import locoprop_optax as loco
from locoprop_optax._quadratic.linearization import PlaneModel
from locoprop_optax._quadratic.trust_region import above_least, relative_length
from tests.helpers import train_step, update_of


def model_of(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    root = scale * rng.normal(size=(3, 2))
    return PlaneModel(jnp.asarray(root.T @ root), jnp.asarray(rng.normal(size=2)))


@pytest.mark.usefixtures("float64")
@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-3, 1.0, 1e3]))
def test_no_fall_below_the_least_loss_is_promised(seed, scale):
    """The minimum is that of the model, divided as the docstring says."""
    model, room = model_of(seed, scale), 0.7
    bounded = above_least(model, jnp.asarray(room))

    def minimum(model):
        return -0.5 * model.slopes @ jnp.linalg.solve(model.matrix, model.slopes)

    whole = float(minimum(model))
    expected = whole / (1 - whole / room)
    np.testing.assert_allclose(minimum(bounded), expected, rtol=1e-5)
    assert -room < expected < 0


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("room", [0.0, -1.0])
def test_a_loss_below_the_least_is_not_bounded(room):
    model = model_of(0)
    chex.assert_trees_all_equal(above_least(model, jnp.asarray(room)), model)


@pytest.mark.usefixtures("float64")
def test_the_added_curvature_is_that_of_the_root_squared():
    """Where all residuals are one, it is all of the Gauss-Newton matrix, once more."""
    slope, loss = jnp.array([3.0, 0.0]), 2.0  # of r²/2 with r = 2 and r' = 1.5
    model = PlaneModel(jnp.diag(jnp.array([1.5**2, 1.0])), slope)
    bounded = above_least(model, jnp.asarray(loss))
    np.testing.assert_allclose(bounded.matrix[0, 0], 2 * 1.5**2)


@pytest.mark.usefixtures("float64")
@given(st.integers(0, 2**32 - 1))
def test_momentum_is_bounded_and_the_step_size_the_best_for_it(seed):
    model = model_of(seed)
    region = loco.TrustRegion(least_loss=None, max_momentum=0.5)
    beta, rho = region.minimum(model, None, None)
    assert 0 <= rho <= 0.5

    def change(beta, rho):
        return float(model.change(jnp.asarray(1.0), beta, rho))

    for nudge in (-1e-3, 1e-3):
        assert change(beta, rho) <= change(beta + nudge, rho) + 1e-12
    free = model.minimum(None, None)[1]
    np.testing.assert_allclose(rho, np.clip(free, 0, 0.5))


def test_what_is_fixed_stays_fixed():
    region = loco.TrustRegion()
    beta, rho = region.minimum(model_of(1), None, jnp.asarray(2.0))
    assert rho == 2.0
    beta, rho = region.minimum(model_of(1), jnp.asarray(3.0), None)
    assert beta == 3.0
    assert 0 <= rho <= region.max_momentum


def test_parameters_are_measured_by_their_norm_or_by_what_they_are_to_become():
    params = {"large": jnp.full((3, 4), 2.0), "zero": jnp.zeros((3, 4))}
    large, zero = jnp.full((3, 4), 0.2), jnp.full((3, 4), 0.1)
    step = {"large": large, "zero": jnp.zeros((3, 4))}
    np.testing.assert_allclose(relative_length(step, params), 0.1, rtol=1e-6)
    step = {"large": jnp.zeros((3, 4)), "zero": zero}
    expected = 0.1 * np.sqrt(12) / np.sqrt(4)
    np.testing.assert_allclose(relative_length(step, params), expected, rtol=1e-6)
    assert relative_length({"bias": jnp.ones(2)}, {"bias": jnp.zeros(2)}) == 1
    assert relative_length(jnp.ones(()), jnp.full((), 4.0)) == 0.25


def classifier(scale=1.0, rows=32):
    """A loss of a small network, its parameters, and a batch of inputs of a scale."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = scale * jax.random.normal(keys[0], (rows, 6))
    labels = jnp.argmax(x[:, :3], axis=-1)
    model = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(3)])
    params = model.init(keys[1], x)["params"]

    def loss_fn(params, batch):
        logits = model.apply({"params": params}, batch[0])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
        return losses.mean()

    return loss_fn, params, (x, labels)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_no_parameter_moves_further_than_its_share(scale):
    loss_fn, params, batch = classifier(scale)
    layers = loco.layers(loss_fn)(params, batch)
    tx = loco.locoprop(layers)
    step, state = jax.jit(train_step(loss_fn, layers, tx)), tx.init(params)
    for _ in range(5):
        moved, state, _ = step(params, state, batch)
        change = jax.tree.map(jnp.subtract, moved, params)
        assert relative_length(change, params) < 0.1001
        params = moved


def test_a_wrong_example_where_all_others_are_sure_does_not_throw_the_weights():
    """The curvature of all examples vanishes, the slope of one does not.

    Between two looks at the loss, too: the steps are the second and those after it.
    """
    loss_fn, params, (x, labels) = classifier()
    sure = jax.tree.map(lambda leaf: 60 * leaf, params)
    layers = loco.layers(loss_fn)(sure, (x, labels))
    tx = loco.locoprop(layers)
    step, state = jax.jit(train_step(loss_fn, layers, tx)), tx.init(sure)
    start, losses = float(loss_fn(sure, (x, labels))), []
    for k in range(12):
        wrong = labels.at[k].set((labels[k] + 1) % 3)
        sure, state, loss = step(sure, state, (x, wrong))
        losses.append(float(loss))
    assert start > 100
    assert max(losses) < 2 * start
    assert float(loss_fn(sure, (x, labels))) < start
    assert optax.tree.get(state, "skipped_steps") == 0


def walled(kind):
    """A model of one number whose loss rises wherever it goes."""

    def loss_fn(outputs):
        moved = jnp.any(outputs != 3.0)
        return 0.5 * jnp.sum(outputs**2) + jnp.where(moved, kind, 0.0)

    return {"model_fn": lambda p: p["w"], "loss_fn": loss_fn}


@pytest.mark.parametrize("kind", [1e3, jnp.inf])
def test_a_step_after_which_the_loss_still_rises_is_not_taken_but_counted(kind):
    params = {"w": jnp.array([3.0])}
    tx = loco.scale_by_quadratic_model(damping=0.0, damping_decay=1.0)
    state = optax.tree.set(tx.init(params), velocity={"w": jnp.array([1e-3])})
    for taken in range(3):
        updates, state = tx.update(params, state, params, **walled(kind))
        assert updates["w"] == 0
        assert optax.tree.get(state, "velocity")["w"] == 0
        assert optax.tree.get(state, "skipped_steps") == taken + 1
    free = {"model_fn": lambda p: p["w"], "loss_fn": lambda o: 0.5 * jnp.sum(o**2)}
    updates, state = tx.update(params, state, params, **free)
    assert updates["w"] < 0
    assert optax.tree.get(state, "skipped_steps") == 3


def test_penalties_do_not_go_through_the_inverse():
    """The step is that without the penalty, and the penalty's gradient as it is.

    With a scale of almost zero behind the first layer, its inverse is huge.
    """
    loss_fn, params, batch = classifier()
    small = {**params, "layers_2": jax.tree.map(lambda p: 1e-6 * p, params["layers_2"])}

    def penalized(params, batch):
        return loss_fn(params, batch) + 0.01 * optax.tree.norm(params, squared=True)

    steps = []
    for function in (loss_fn, penalized):
        make = partial(
            loco.scale_by_locoprop,
            target=loco.targets.natural_gradient(1.0, 0.5),
            solver=loco.solvers.majorized_newton(1, 0.3),
        )
        steps.append(update_of(make, function, small, batch))
    plain, both = steps
    expected = jax.tree.map(lambda step, p: step + 0.02 * p, plain, small)
    size = optax.tree.norm(plain)
    difference = optax.tree.sub(both, expected)
    assert optax.tree.norm(difference) < 1e-4 * size


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_momentum": 1.0}, r"max_momentum must be in \[0, 1\), got 1.0"),
        ({"max_relative_step": 0.0}, "max_relative_step must be positive, got 0.0"),
    ],
)
def test_bad_numbers(options, match):
    with pytest.raises(ValueError, match=match):
        loco.TrustRegion(**options)


def test_an_unmeasured_step_promises_no_fall_below_the_least_loss():
    region = loco.TrustRegion(least_loss=1.0)
    value = jnp.asarray(3.0)
    for promised in (0.0, 1.0, 4.0, 1e20):
        fraction = region.unmeasured(jnp.asarray(promised), value)
        np.testing.assert_allclose(fraction, 4.0 / (4.0 + promised), rtol=1e-6)
        assert fraction * promised <= 2 * (3.0 - 1.0)
    assert region.unmeasured(jnp.asarray(-2.0), value) == 1
    assert region.unmeasured(jnp.asarray(0.0), jnp.asarray(1.0)) == 1
    assert region.unmeasured(jnp.asarray(2.0), jnp.asarray(1.0)) == 0
    anywhere = loco.TrustRegion(least_loss=None)
    assert anywhere.unmeasured(jnp.asarray(9.0), value) == 1
