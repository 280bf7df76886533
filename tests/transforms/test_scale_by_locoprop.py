from dataclasses import replace
from functools import partial

import chex
import flax.linen as nn
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import locoprop_optax as loco
from tests.helpers import (
    MLP,
    layers_for,
    local_steps,
    random_layer,
    regression,
    solved,
    train_step,
    update_of,
)

OPTIMIZERS = {
    "sgd": optax.sgd(0.05),
    "momentum": optax.sgd(0.05, momentum=0.9),
    "rmsprop": optax.rmsprop(0.01),
    "adam": optax.adam(0.01),
}
BLOCKS = {
    "first_order": loco.solvers.first_order(optax.adam, 4, learning_rate=1e-2),
    "majorized_newton": loco.solvers.majorized_newton(2),
}


@pytest.mark.parametrize("loss", ["matching_loss", "squared_loss"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_local_step_trains_as_backprop_does(name, loss):
    loss_fn, params, batch = regression()
    layers = loco.layers(loss_fn)(params, batch)
    tx = optax.chain(
        loco.scale_by_locoprop(
            layers,
            loss=getattr(loco.losses, loss)(),
            target=loco.targets.gradient_descent(1.0),
            solver=loco.solvers.first_order(OPTIMIZERS[name], num_steps=1),
        ),
        optax.scale(-1.0),
    )
    step = jax.jit(train_step(loss_fn, layers, tx))
    state, reference = tx.init(params), OPTIMIZERS[name]
    expected, reference_state = params, reference.init(params)
    for _ in range(5):
        params, state, _ = step(params, state, batch)
        grads = jax.grad(loss_fn)(expected, batch)
        updates, reference_state = reference.update(grads, reference_state, expected)
        expected = optax.apply_updates(expected, updates)
    for found, wanted in zip(
        jax.tree.leaves(params), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("block", BLOCKS)
def test_step_is_traced_once(block):
    chex.clear_trace_counter()
    loss_fn, params, batch = regression()
    layers = loco.layers(loss_fn)(params, batch)
    tx = loco.scale_by_locoprop(layers, solver=BLOCKS[block])
    step = jax.jit(chex.assert_max_traces(train_step(loss_fn, layers, tx), n=1))
    state = tx.init(params)
    for _ in range(3):
        params, state, _ = step(params, state, batch)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(
    "make",
    [
        partial(loco.locoprop_m, learning_rate=1e-3),
        partial(loco.locoprop_s, learning_rate=1e-3),
        *(partial(loco.scale_by_locoprop, solver=s) for s in BLOCKS.values()),
    ],
)
def test_dtypes_and_structures_are_stable(make, dtype):
    with jax.enable_x64(dtype == "float64"):
        assert_stable(make, jnp.dtype(dtype))


def assert_stable(make, dtype):
    loss_fn, params, batch = regression(MLP(dtype=dtype, param_dtype=dtype))
    batch = jax.tree.map(lambda a: a.astype(dtype), batch)
    layers = loco.layers(loss_fn)(params, batch)
    tx = make(layers)
    state = tx.init(params)

    def update(params, state, batch):
        _, grads, intermediates = loco.value_and_grad(loss_fn, layers)(params, batch)
        return tx.update(grads, state, params, intermediates=intermediates)

    updates, new_state = jax.jit(update)(params, state, batch)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    assert all(bool(jnp.all(jnp.isfinite(u))) for u in jax.tree.leaves(updates))


def test_step_runs_in_a_scan_with_donated_buffers():
    loss_fn, params, batch = regression()
    layers = loco.layers(loss_fn)(params, batch)
    tx = local_steps(layers, 1.0)
    step = train_step(loss_fn, layers, tx)

    def epoch(params, state):
        def body(carry, _):
            *carry, loss = step(*carry, batch)
            return tuple(carry), loss

        return jax.lax.scan(body, (params, state), length=20)

    _, losses = jax.jit(epoch, donate_argnums=(0, 1))(params, tx.init(params))
    assert losses[-1] < 0.5 * losses[0]


def test_chain_of_the_design():
    loss_fn, params, batch = regression()
    layers = loco.layers(loss_fn)(params, batch)
    tx = optax.chain(
        loco.scale_by_locoprop(
            layers, solver=loco.solvers.majorized_newton(num_steps=2, damping=0.1)
        ),
        optax.trace(decay=0.9),
        optax.add_decayed_weights(1e-4),
        optax.scale_by_learning_rate(optax.linear_schedule(0.2, 0.0, 30)),
    )
    step, state = jax.jit(train_step(loss_fn, layers, tx)), tx.init(params)
    for _ in range(30):
        params, state, loss = step(params, state, batch)
    assert loss < 0.5 * loss_fn(regression()[1], batch)


def test_defaults():
    loss_fn, params, batch = regression()
    documented = partial(
        loco.scale_by_locoprop,
        loss=loco.losses.matching_loss(),
        target=loco.targets.normalized(0.05),
        regularizer=loco.regularizers.none(),
        solver=loco.solvers.majorized_newton(2, 0.1),
    )
    chex.assert_trees_all_equal(
        update_of(loco.scale_by_locoprop, loss_fn, params, batch),
        update_of(documented, loss_fn, params, batch),
    )


def test_hyperparameters_take_schedules():
    loss_fn, params, batch = regression()
    layers = loco.layers(loss_fn)(params, batch)
    _, grads, intermediates = loco.value_and_grad(loss_fn, layers)(params, batch)

    def schedule(value):
        return optax.constant_schedule(value)

    def run(of):
        tx = loco.scale_by_locoprop(
            layers,
            target=loco.targets.normalized(of(0.1)),
            regularizer=loco.regularizers.squared_l2(of(0.2)),
            solver=loco.solvers.majorized_newton(damping=of(0.3)),
        )
        state = tx.init(params)
        return tx.update(grads, state, params, intermediates=intermediates)[0]

    chex.assert_trees_all_close(run(schedule), run(float))


def test_unknown_extra_arguments_are_ignored():
    loss_fn, params, batch = regression()
    layers = loco.layers(loss_fn)(params, batch)
    tx = loco.scale_by_locoprop(layers)
    _, grads, intermediates = loco.value_and_grad(loss_fn, layers)(params, batch)
    tx.update(grads, tx.init(params), params, intermediates=intermediates, value=1.0)


SOLVERS = {
    "first_order": loco.solvers.first_order(optax.adam, 3, learning_rate=1e-2),
    "majorized_newton": loco.solvers.majorized_newton(2),
    "averaged": loco.solvers.majorized_newton(1, ema=0.5),
    "conjugate_gradient": loco.solvers.conjugate_gradient(3),
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("stacked", [True, False])
def test_equal_layers_are_solved_as_one_by_one(solver, stacked):
    params, layer = random_layer(0, 6, 4, 3, "tanh")
    other_params, other = random_layer(1, 6, 4, 3, "tanh")

    def update(records, params):
        tx = loco.scale_by_locoprop(
            layers_for(params), solver=SOLVERS[solver], stack_layers=stacked
        )
        grads, state = jax.tree.map(jnp.zeros_like, params), tx.init(params)
        intermediates = loco.Intermediates(records)
        for _ in range(2):
            updates, state = tx.update(
                grads, state, params, intermediates=intermediates
            )
        return updates

    records = {"a/kernel": layer, "b/kernel": other}
    both = update(records, {"a": params, "b": other_params})
    one, two = (
        update({"a/kernel": layer}, {"a": params}),
        update({"b/kernel": other}, {"b": other_params}),
    )
    chex.assert_trees_all_close(both, {**one, **two}, rtol=1e-4)


@pytest.mark.parametrize(
    "make", [loco.scale_by_locoprop, partial(loco.locoprop_m, learning_rate=1e-3)]
)
def test_stacking_shares_products_and_changes_no_number(make):
    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(5):
                x = nn.tanh(nn.Dense(4)(x))
            return nn.Dense(3)(x)

    loss_fn, params, batch = regression(Deep())
    layers = loco.layers(loss_fn)(params, batch)
    found, products = {}, {}
    for stacked in (True, False):
        tx = make(layers, stack_layers=stacked)
        step, state = train_step(loss_fn, layers, tx), tx.init(params)
        found[stacked] = jax.jit(step)(params, state, batch)
        text = str(jax.make_jaxpr(step)(params, state, batch))
        products[stacked] = text.count("dot_general")
    chex.assert_trees_all_close(found[True], found[False], rtol=1e-5, atol=1e-7)
    assert products[True] < products[False]


def test_precision_is_that_of_the_solver_alone():
    loss_fn, params, batch = regression()
    layers = loco.layers(loss_fn)(params, batch)

    def precisions(solver):
        tx = loco.scale_by_locoprop(layers, solver=solver, precision="BF16_BF16_F32")
        step = train_step(loss_fn, layers, tx)
        jaxpr = jax.make_jaxpr(step)(params, tx.init(params), batch)
        return [str(eqn.params["precision"]) for eqn in products_of(jaxpr.jaxpr)]

    def products_of(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                yield eqn
            for inner in jax.extend.core.jaxprs_in_params(eqn.params):
                yield from products_of(inner)

    found = precisions(BLOCKS["first_order"])
    assert found.count("None") == 5, "backprop's: three a layer but one"
    assert found.count("BF16_BF16_F32") == len(found) - 5 >= 4
    found = precisions(BLOCKS["majorized_newton"])
    assert found.count("None") == 5
    full = [name for name in found if "HIGHEST" in name]
    assert len(full) == 4, "those by an inverse: two steps of two layers"
    assert found.count("BF16_BF16_F32") == len(found) - 5 - len(full) >= 4


def test_unknown_precision():
    loss_fn, params, batch = regression()
    layers = loco.layers(loss_fn)(params, batch)
    tx = loco.scale_by_locoprop(layers, precision="float7")
    with pytest.raises(ValueError, match="float7"):
        train_step(loss_fn, layers, tx)(params, tx.init(params), batch)


def test_stacked_layers_are_solved_each_on_its_own():
    members = [random_layer(seed, 6, 4, 3, "relu") for seed in range(3)]

    def batched(params):
        def outputs(layer, x):
            return x @ layer["kernel"] + layer["bias"]

        return jnp.sum(jax.vmap(outputs)(params["a"], jnp.ones((3, 6, 4))))

    def update(layers, params, layer):
        tx = loco.scale_by_locoprop(layers)
        params, intermediates = {"a": params}, loco.Intermediates({"a/kernel": layer})
        grads, state = jax.tree.map(jnp.zeros_like, params), tx.init(params)
        for _ in range(2):
            updates, state = tx.update(
                grads, state, params, intermediates=intermediates
            )
        return updates["a"]

    params, layer = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    layers = loco.layers(batched)({"a": params})
    stacked = update(layers, params, replace(layer, stack_dims=1))
    for i, (params, layer) in enumerate(members):
        expected = update(layers_for({"a": params}), params, layer)
        for name, u in expected.items():
            np.testing.assert_allclose(stacked[name][i], u, rtol=1e-4, atol=1e-6)


def test_targets_of_the_user_are_used():
    params, layer = random_layer(0, 6, 4, 3, "tanh")
    goal = jnp.tanh(layer.preactivations) - 0.05 * layer.cotangents
    aimed = replace(layer, targets=goal, cotangents=7 * layer.cotangents)
    target = loco.targets.gradient_descent(0.05)
    make = partial(loco.scale_by_locoprop, target=target)
    results = (solved(make, params, la) for la in (layer, aimed))
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-6)


def test_a_layer_with_a_masked_bias_moves_its_kernel():
    loss_fn, params, batch = regression()
    labels = jax.tree.map_with_path(
        lambda path, _: "free" if path[-1].key == "kernel" else "fixed", params
    )
    layers = loco.layers(loss_fn)(params, batch)
    tx = optax.partition(
        {"free": loco.scale_by_locoprop(layers), "fixed": optax.set_to_zero()}, labels
    )
    _, grads, intermediates = loco.value_and_grad(loss_fn, layers)(params, batch)
    updates, _ = tx.update(grads, tx.init(params), params, intermediates=intermediates)
    for name in ("first", "second"):
        assert float(jnp.max(jnp.abs(updates[name]["kernel"]))) > 0
        assert float(jnp.max(jnp.abs(updates[name]["bias"]))) == 0


class TestErrors:
    @pytest.fixture
    def made(self):
        loss_fn, params, batch = regression()
        layers = loco.layers(loss_fn)(params, batch)
        _, grads, intermediates = loco.value_and_grad(loss_fn, layers)(params, batch)

        def update(intermediates, layers=layers):
            tx = loco.scale_by_locoprop(layers)
            state = tx.init(params)
            return tx.update(grads, state, params, intermediates=intermediates)

        return update, params, intermediates

    def test_missing_intermediates(self, made):
        update, *_ = made
        with pytest.raises(
            TypeError, match=r"locoprop_optax.value_and_grad\(loss_fn, layers"
        ):
            update(None)

    def test_other_object(self, made):
        update, _, intermediates = made
        with pytest.raises(TypeError, match="Intermediates, got dict"):
            update(dict(intermediates.layers))

    def test_missing_params(self, made):
        _, params, intermediates = made
        tx = loco.scale_by_locoprop(layers_for(params))
        with pytest.raises(TypeError, match="needs `params`"):
            tx.update(params, tx.init(params), intermediates=intermediates)

    @pytest.mark.parametrize(
        "make",
        [
            loco.scale_by_locoprop,
            loco.locoprop,
            partial(loco.locoprop_m, learning_rate=1e-3),
            partial(loco.locoprop_s, learning_rate=1e-3),
        ],
    )
    def test_something_else_in_place_of_layers(self, make):
        with pytest.raises(TypeError, match=r"must be the layers of .*, got float"):
            make(0.1)

    def test_record_of_no_layer(self, made):
        update, _, intermediates = made
        records = intermediates.layers
        records = {**records, "third/kernel": records["first/kernel"]}
        with pytest.raises(ValueError, match=r"'third/kernel', which is none of the"):
            update(loco.Intermediates(records))

    def test_layer_without_record(self, made):
        update, _, intermediates = made
        records = {"first/kernel": intermediates.layers["first/kernel"]}
        with pytest.raises(ValueError, match=r"no record of layer 'second/kernel'"):
            update(loco.Intermediates(records))

    def test_excluded_layer_needs_no_record(self, made):
        update, params, intermediates = made
        records = {"first/kernel": intermediates.layers["first/kernel"]}
        update(loco.Intermediates(records), layers_for({"first": params["first"]}))

    def test_layer_that_the_parameters_do_not_hold(self, made):
        _, params, intermediates = made
        tx = loco.scale_by_locoprop(layers_for(params))
        state = tx.init(params)
        renamed = {"first": {"weight": params["first"]["kernel"]}}
        for fails in (
            lambda: tx.init(renamed),
            lambda: tx.update(renamed, state, renamed, intermediates=intermediates),
        ):
            with pytest.raises(
                ValueError, match=r"hold no 'first/kernel'. They hold 'first/weight'"
            ):
                fails()

    def test_parameters_of_another_shape(self, made):
        _, params, _ = made
        tx = loco.scale_by_locoprop(layers_for(params))
        _, wider, _ = regression(MLP(hidden=6))
        with pytest.raises(
            ValueError,
            match=r"'first/kernel' has the shape \(4, 6\), expected \(4, 5\)",
        ):
            tx.init(wider)

    @pytest.mark.parametrize(
        ("field", "match"),
        [
            ("inputs", r"'first/kernel': the shape of its inputs is \(8, 3\)"),
            ("cotangents", r"its cotangents is \(8, 4\), expected \(8, 5\)"),
            ("preactivations", r"\(8, 5\), expected \(8, 4\)"),
        ],
    )
    def test_shapes_that_do_not_fit(self, made, field, match):
        update, _, intermediates = made
        layer = intermediates.layers["first/kernel"]
        wrong = replace(layer, **{field: getattr(layer, field)[:, :-1]})
        with pytest.raises(ValueError, match=match):
            update(with_first(intermediates, wrong))

    def test_targets_that_do_not_fit(self, made):
        update, _, intermediates = made
        layer = intermediates.layers["first/kernel"]
        wrong = replace(layer, targets=jnp.zeros((8, 4)))
        with pytest.raises(ValueError, match=r"targets is \(8, 4\), expected \(8, 5\)"):
            update(with_first(intermediates, wrong))

    def test_integer_inputs(self, made):
        update, _, intermediates = made
        layer = intermediates.layers["first/kernel"]
        wrong = replace(layer, inputs=layer.inputs.astype(int))
        with pytest.raises(
            ValueError, match=r"'first/kernel': the dtype of its inputs is int"
        ):
            update(with_first(intermediates, wrong))

    def test_integer_params(self):
        params = {"a": {"kernel": jnp.ones((2, 2), int)}}
        layers = layers_for({"a": {"kernel": jnp.ones((2, 2))}})
        with pytest.raises(ValueError, match=r"'a/kernel' has dtype int32"):
            loco.scale_by_locoprop(layers).init(params)

    def test_gradient_of_another_model(self, made):
        update, _, intermediates = made
        first, second = intermediates.layers.values()
        wrong = replace(first, gradient=second.gradient)
        with pytest.raises(ValueError, match=r"gradient for (kernel|bias) is"):
            update(with_first(intermediates, wrong))

    def test_masked_kernel_with_a_free_bias(self):
        params = {"a": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
        tx = loco.scale_by_locoprop(layers_for(params))
        masked = {"a": {"kernel": optax.MaskedNode(), "bias": jnp.ones(2)}}
        with pytest.raises(ValueError, match=r"'a/kernel': .*masks it, but not its"):
            tx.init(masked)


def with_first(intermediates, layer):
    """The intermediates with something else as the first layer's."""
    return loco.Intermediates({**intermediates.layers, "first/kernel": layer})
