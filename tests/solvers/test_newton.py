from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import locoprop_optax as loco
from tests.helpers import layers_for, problem_of, random_layer, solved, update_of


@pytest.mark.usefixtures("float64")
def test_damping_is_relative_to_the_mean_eigenvalue():
    params, layer = random_layer(0, 6, 4, 3, "sigmoid", bias=False)
    problem = problem_of(params, layer, gamma=0.5)
    make = partial(
        loco.scale_by_locoprop,
        target=loco.targets.gradient_descent(0.5),
        solver=loco.solvers.majorized_newton(num_steps=1, damping=0.2),
    )
    gram = layer.inputs.T @ layer.inputs
    bound = 0.25 * np.mean(np.linalg.eigvalsh(gram))
    hessian = 0.25 * gram + 0.2 * bound * jnp.eye(4)
    expected = jnp.linalg.solve(hessian, problem.gradient_at_start()["kernel"])
    np.testing.assert_allclose(
        solved(make, params, layer)["kernel"], expected, rtol=1e-9
    )


def test_majorized_newton_needs_a_bound():
    params, layer = random_layer(0, 6, 4, 3)
    make = partial(loco.scale_by_locoprop, loss=loco.losses.matching_loss(jnp.sin))
    with pytest.raises(
        ValueError, match=r"bound on the curvature of .*'sin'.*identity"
    ):
        solved(make, params, layer)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"num_steps": 0}, ValueError, "at least 1, got 0"),
        ({"damping": -0.1}, ValueError, "damping must not be negative, got -0.1"),
        ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
        ({"stride": 0.5}, TypeError, "stride is a count .* must be a Python int"),
    ],
)
def test_majorized_newton_errors(options, error, match):
    with pytest.raises(error, match=match):
        loco.solvers.majorized_newton(**options)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [2, 40])
def test_few_rows_are_solved_before_they_are_multiplied(rows, bias):
    params, layer = random_layer(0, rows, 9, 7, "tanh", bias=bias)
    problem = problem_of(params, layer, gamma=0.5)
    assert (problem.factors_at_start() is None) == (rows == 40)
    make = partial(
        loco.scale_by_locoprop,
        target=loco.targets.gradient_descent(0.5),
        solver=loco.solvers.majorized_newton(num_steps=1, damping=0.2),
    )
    design, gradient = layer.inputs, problem.gradient_at_start()
    right = gradient["kernel"]
    if bias:
        design = jnp.pad(design, ((0, 0), (0, 1)), constant_values=1.0)
        right = jnp.concatenate([right, gradient["bias"][None]])
    gram = design.T @ design
    damping = 0.2 * jnp.trace(gram) / len(gram)
    expected = jnp.linalg.solve(gram + damping * jnp.eye(len(gram)), right)
    found = solved(make, params, layer)
    np.testing.assert_allclose(found["kernel"], expected[:9], rtol=1e-9)
    if bias:
        np.testing.assert_allclose(found["bias"], expected[9], rtol=1e-9)


def test_a_penalty_of_the_step_is_no_product_of_rows():
    params, layer = random_layer(0, 2, 9, 7)
    held = problem_of(params, layer, regularizer=loco.regularizers.squared_l2(0.1))
    assert held.factors_at_start() is None


@pytest.mark.usefixtures("float64")
def test_exact_is_foof():
    params, layer = random_layer(0, 6, 4, 3, "tanh")
    make = partial(
        loco.scale_by_locoprop,
        loss=loco.losses.squared_loss(),
        target=loco.targets.gradient_descent(0.7),
        solver=loco.solvers.exact(damping=0.2),
    )
    x = np.c_[layer.inputs, np.ones(6)]
    gram = x.T @ x
    damped = gram + 0.2 * np.trace(gram) / 5 * np.eye(5)
    expected = 0.7 * np.linalg.solve(damped, x.T @ layer.cotangents)
    found = solved(make, params, layer)
    np.testing.assert_allclose(found["kernel"], expected[:-1], rtol=1e-9)
    np.testing.assert_allclose(found["bias"], expected[-1], rtol=1e-9)


def test_exact_solves_the_squared_loss_only():
    params, layer = random_layer(0, 6, 4, 3, "tanh")
    make = partial(loco.scale_by_locoprop, solver=loco.solvers.exact(0.1))
    with pytest.raises(ValueError, match=r"exact solves the squared loss, not .*tanh"):
        solved(make, params, layer)


@pytest.mark.parametrize("make", ["majorized_newton", "exact"])
@pytest.mark.usefixtures("float64")
def test_curvature_averaged_over_batches(make):
    ema, average = 0.6, 0.0
    solver = {
        "majorized_newton": loco.solvers.majorized_newton(1, 0.1, ema=ema),
        "exact": loco.solvers.exact(0.1, ema=ema),
    }[make]
    params, _ = random_layer(0, 6, 4, 3)
    tx = loco.scale_by_locoprop(
        layers_for({"layer": params}),
        loss=loco.losses.squared_loss(),
        target=loco.targets.gradient_descent(0.7),
        solver=solver,
    )
    state = tx.init({"layer": params})
    for k in range(3):
        n = 6 + k
        _, layer = random_layer(k, n, 4, 3)
        updates, state = tx.update(
            {"layer": dict(layer.gradient)},
            state,
            {"layer": params},
            intermediates=loco.Intermediates({"layer/kernel": layer}),
        )
        x = np.c_[layer.inputs, np.ones(n)]
        average = ema * average + (1 - ema) * x.T @ x / n
        curvature = n * average / (1 - ema ** (k + 1))
        damped = curvature + 0.1 * np.trace(curvature) / 5 * np.eye(5)
        expected = 0.7 * np.linalg.solve(damped, x.T @ layer.cotangents)
        np.testing.assert_allclose(updates["layer"]["kernel"], expected[:-1], rtol=1e-8)


def update_of_product(spec, x, kernel, solver):
    """A step on a loss with one product, given as einsum writes it."""
    params = {"layer": kernel}

    def loss_fn(params):
        return jnp.sum(jnp.einsum(spec, x, params["layer"]) ** 2)

    return update_of(partial(loco.scale_by_locoprop, solver=solver), loss_fn, params)


@pytest.mark.usefixtures("float64")
def test_ema_of_a_kernel_that_is_used_transposed():
    params, layer = random_layer(0, 6, 4, 3)
    x, kernel = layer.inputs, params["kernel"]
    solver = loco.solvers.majorized_newton(1, ema=0.5)
    straight = update_of_product("ni,io->no", x, kernel, solver)
    swapped = update_of_product("ni,oi->no", x, kernel.T, solver)
    np.testing.assert_allclose(swapped["layer"].T, straight["layer"], rtol=1e-9)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("spec", "x", "kernel"),
    [
        ("ni,iho->nho", (6, 4), (4, 3, 2)),
        ("lni,lio->lno", (2, 6, 4), (2, 4, 3)),
        ("lni,ilo->lno", (2, 6, 4), (4, 2, 3)),
    ],
)
def test_the_first_average_is_the_batch_for_heads_and_stacks(spec, x, kernel):
    drawn = np.random.default_rng(0)
    x, kernel = (jnp.asarray(drawn.normal(size=shape)) for shape in (x, kernel))
    averaged, alone = (
        update_of_product(spec, x, kernel, loco.solvers.majorized_newton(1, ema=ema))
        for ema in (0.5, 0.0)
    )
    np.testing.assert_allclose(averaged["layer"], alone["layer"], rtol=1e-9)


def test_ema_refuses_what_diverges():
    with pytest.raises(ValueError, match=r"ema must be in \[0, 1\)"):
        loco.solvers.majorized_newton(1, ema=1.0)
    with pytest.raises(ValueError, match=r"ema=0.5 needs num_steps=1, got 2"):
        loco.solvers.majorized_newton(2, ema=0.5)


@pytest.mark.parametrize("num_steps", [1, 9])
@pytest.mark.usefixtures("float64")
def test_curvature_of_every_third_example(num_steps):
    """Many steps work on the whole batch, for which the part is a preconditioner."""
    params, layer = random_layer(0, 17, 4, 3)
    problem = problem_of(params, layer, gamma=0.7, loss=loco.losses.squared_loss())
    make = partial(
        loco.scale_by_locoprop,
        loss=loco.losses.squared_loss(),
        target=loco.targets.gradient_descent(0.7),
        solver=loco.solvers.majorized_newton(num_steps, 0.5, stride=3),
    )
    x = np.c_[layer.inputs, np.ones(17)]
    part = x[::3]
    curvature = 17 / 6 * part.T @ part
    strength = 0.5 * np.trace(curvature) / 5
    gradient = problem.gradient_at_start()
    gradient = np.vstack([gradient["kernel"], gradient["bias"]])
    step = np.zeros((5, 3))
    for _ in range(num_steps):
        residual = gradient + (x.T @ x + strength * np.eye(5)) @ step
        step -= np.linalg.solve(curvature + strength * np.eye(5), residual)
    found = solved(make, params, layer)
    np.testing.assert_allclose(found["kernel"], -step[:-1], rtol=1e-8)
    np.testing.assert_allclose(found["bias"], -step[-1], rtol=1e-8)


@pytest.mark.usefixtures("float64")
def test_curvature_has_as_many_rows_as_columns():
    params, layer = random_layer(0, 14, 4, 3)  # five columns with the bias

    def step(stride):
        solver = loco.solvers.majorized_newton(1, 0.1, stride=stride)
        return solved(partial(loco.scale_by_locoprop, solver=solver), params, layer)

    chex.assert_trees_all_close(step(9), step(2), rtol=1e-12)
    assert not np.allclose(step(2)["kernel"], step(1)["kernel"])


@pytest.mark.usefixtures("float64")
def test_curvature_of_every_second_image():
    """A convolution's examples are images, all positions of which are rows."""
    model = nn.Conv(3, (3,), param_dtype=jnp.float64)
    x = jax.random.normal(jax.random.key(0), (4, 5, 2))
    params = model.init(jax.random.key(1), x)["params"]

    def step(x, weights, stride):
        def loss_fn(params):
            return jnp.sum(weights * model.apply({"params": params}, x) ** 2)

        layers = loco.layers(loss_fn)(params)
        _, grads, intermediates = loco.value_and_grad(loss_fn, layers)(params)
        tx = loco.scale_by_locoprop(
            layers,
            target=loco.targets.gradient_descent(1.0),
            solver=loco.solvers.majorized_newton(1, 0.1, stride=stride),
        )
        return tx.update(grads, tx.init(params), params, intermediates=intermediates)[0]

    chosen = jnp.asarray([1.0, 0.0, 1.0, 0.0])[:, None, None]
    alone = step(x[::2], 1.0, stride=1)
    among_others = step(x, chosen, stride=2)
    chex.assert_trees_all_close(among_others, optax.tree.scale(0.5, alone), rtol=1e-9)


def test_stride_refuses_an_axis_that_counts_no_examples():
    solver = loco.solvers.majorized_newton(stride=2)
    match = r"Layer 'layer': stride takes entries of the first axis.*shape \(4,\)"
    with pytest.raises(ValueError, match=match):
        update_of_product("bi,bio->bo", jnp.ones((6, 4)), jnp.ones((6, 4, 3)), solver)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transfer", ["identity", "tanh"])
def test_an_inverse_that_rounding_spoils_gets_more_damping(transfer, bias):
    params, layer = random_layer(0, 5, 40, 3, transfer, bias=bias)
    solver = loco.solvers.majorized_newton(num_steps=2, damping=0.0)
    target = loco.targets.gradient_descent(0.1)
    tree, intermediates = {"layer": params}, loco.Intermediates({"layer/kernel": layer})
    tx = loco.scale_by_locoprop(
        layers_for(tree), target=target, solver=solver, diagnostics=True
    )
    state = tx.init(tree)
    for count in (1, 2):  # five examples of forty inputs: the curvature is singular
        step, state = tx.update(tree, state, tree, intermediates=intermediates)
        assert state.solver.raised_damping == count
    seen = loco.diagnostics_of(state)["layer/kernel"]
    assert np.isfinite(
        np.concatenate([s.ravel() for s in step["layer"].values()])
    ).all()
    assert seen.objective_after < seen.objective_before


@pytest.mark.usefixtures("float64")
def test_damping_that_suffices_is_not_raised():
    params, layer = random_layer(0, 5, 40, 3, "tanh")
    tree, intermediates = {"layer": params}, loco.Intermediates({"layer/kernel": layer})
    for damping in (1e-5, 0.1):
        solver = loco.solvers.majorized_newton(damping=damping)
        tx = loco.scale_by_locoprop(layers_for(tree), solver=solver)
        _, state = tx.update(tree, tx.init(tree), tree, intermediates=intermediates)
        assert state.solver.raised_damping == 0
