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
from tests.helpers import MLP, random_layer, regression, train_step

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
    tx = optax.chain(
        loco.scale_by_locoprop(
            loss=getattr(loco.losses, loss)(),
            target=loco.targets.gradient_descent(1.0),
            solver=loco.solvers.first_order(OPTIMIZERS[name], num_steps=1),
        ),
        optax.scale(-1.0),
    )
    step = jax.jit(train_step(loss_fn, tx))
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
    tx = loco.scale_by_locoprop(solver=BLOCKS[block])
    step = jax.jit(chex.assert_max_traces(train_step(loss_fn, tx), n=1))
    state = tx.init(params)
    for _ in range(3):
        params, state, _ = step(params, state, batch)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: loco.locoprop_momentum(),
        lambda: loco.locoprop_m(1e-3),
        lambda: loco.locoprop_s(1e-3),
        *(lambda s=s: loco.scale_by_locoprop(solver=s) for s in BLOCKS.values()),
    ],
)
def test_dtypes_and_structures_are_stable(make, dtype):
    with jax.enable_x64(dtype == "float64"):
        assert_stable(make(), jnp.dtype(dtype))


def assert_stable(tx, dtype):
    loss_fn, params, batch = regression(MLP(dtype=dtype, param_dtype=dtype))
    batch = jax.tree.map(lambda a: a.astype(dtype), batch)
    state = tx.init(params)

    def update(params, state, batch):
        _, grads, intermediates = loco.linen.value_and_grad(loss_fn)(params, batch)
        return tx.update(grads, state, params, intermediates=intermediates)

    updates, new_state = jax.jit(update)(params, state, batch)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    assert all(bool(jnp.all(jnp.isfinite(u))) for u in jax.tree.leaves(updates))


def test_step_runs_in_a_scan_with_donated_buffers():
    loss_fn, params, batch = regression()
    tx = loco.locoprop_momentum()
    step = train_step(loss_fn, tx)

    def epoch(params, state):
        def body(carry, _):
            *carry, loss = step(*carry, batch)
            return tuple(carry), loss

        return jax.lax.scan(body, (params, state), length=20)

    _, losses = jax.jit(epoch, donate_argnums=(0, 1))(params, tx.init(params))
    assert losses[-1] < 0.5 * losses[0]


def test_chain_of_the_design():
    loss_fn, params, batch = regression()
    tx = optax.chain(
        loco.scale_by_locoprop(
            solver=loco.solvers.majorized_newton(num_steps=2, damping=0.1)
        ),
        optax.trace(decay=0.9),
        optax.add_decayed_weights(1e-4),
        optax.scale_by_learning_rate(optax.linear_schedule(0.2, 0.0, 30)),
    )
    step, state = jax.jit(train_step(loss_fn, tx)), tx.init(params)
    for _ in range(30):
        params, state, loss = step(params, state, batch)
    assert loss < 0.5 * loss_fn(regression()[1], batch)


def test_hyperparameters_take_schedules():
    loss_fn, params, batch = regression()

    def schedule(value):
        return optax.constant_schedule(value)

    def run(of):
        tx = loco.scale_by_locoprop(
            target=loco.targets.normalized(of(0.1)),
            regularizer=loco.regularizers.squared_l2(of(0.2)),
            solver=loco.solvers.majorized_newton(damping=of(0.3)),
        )
        _, grads, intermediates = loco.linen.value_and_grad(loss_fn)(params, batch)
        state = tx.init(params)
        return tx.update(grads, state, params, intermediates=intermediates)[0]

    chex.assert_trees_all_close(run(schedule), run(float))


def test_unknown_extra_arguments_are_ignored():
    loss_fn, params, batch = regression()
    tx = loco.scale_by_locoprop()
    _, grads, intermediates = loco.linen.value_and_grad(loss_fn)(params, batch)
    tx.update(grads, tx.init(params), params, intermediates=intermediates, value=1.0)


SOLVERS = {
    "first_order": loco.solvers.first_order(optax.adam, 3, learning_rate=1e-2),
    "majorized_newton": loco.solvers.majorized_newton(2),
    "averaged": loco.solvers.majorized_newton(1, ema=0.5),
    "conjugate_gradient": loco.solvers.conjugate_gradient(3),
    "line_searched": loco.solvers.line_searched(loco.solvers.majorized_newton()),
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("stacked", [True, False])
def test_equal_layers_are_solved_as_one_by_one(solver, stacked):
    params, layer = random_layer(0, 6, 4, 3, "tanh")
    other_params, other = random_layer(1, 6, 4, 3, "tanh")
    tx = loco.scale_by_locoprop(solver=SOLVERS[solver], stack_layers=stacked)

    def update(layers, params):
        grads, state = jax.tree.map(jnp.zeros_like, params), tx.init(params)
        intermediates = loco.Intermediates(layers)
        for _ in range(2):
            updates, state = tx.update(
                grads, state, params, intermediates=intermediates
            )
        return updates

    both = update({"a": layer, "b": other}, {"a": params, "b": other_params})
    one, two = (
        update({"a": layer}, {"a": params}),
        update({"b": other}, {"b": other_params}),
    )
    chex.assert_trees_all_close(both, {**one, **two}, rtol=1e-4)


@pytest.mark.parametrize(
    "make", [loco.locoprop_momentum, partial(loco.locoprop_m, 1e-3)]
)
def test_stacking_shares_products_and_changes_no_number(make):
    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(5):
                x = nn.tanh(nn.Dense(4)(x))
            return nn.Dense(3)(x)

    loss_fn, params, batch = regression(Deep())
    found, products = {}, {}
    for stacked in (True, False):
        tx = make(stack_layers=stacked)
        step = jax.jit(train_step(loss_fn, tx))
        found[stacked] = step(params, tx.init(params), batch)
        text = str(
            jax.make_jaxpr(train_step(loss_fn, tx))(params, tx.init(params), batch)
        )
        products[stacked] = text.count("dot_general")
    chex.assert_trees_all_close(found[True], found[False], rtol=1e-5, atol=1e-7)
    assert products[True] < products[False]


def test_precision_is_that_of_the_solver_alone():
    loss_fn, params, batch = regression()

    def precisions(solver):
        tx = loco.scale_by_locoprop(solver=solver, precision="BF16_BF16_F32")
        step = train_step(loss_fn, tx)
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
    assert len(full) > 4, "those of the inverse and by it"
    assert found.count("BF16_BF16_F32") == len(found) - 5 - len(full) >= 4


def test_unknown_precision():
    loss_fn, params, batch = regression()
    tx = loco.scale_by_locoprop(precision="float7")
    with pytest.raises(ValueError, match="float7"):
        train_step(loss_fn, tx)(params, tx.init(params), batch)


def test_stacked_layers_are_solved_each_on_its_own():
    members = [random_layer(seed, 6, 4, 3, "relu") for seed in range(3)]
    tx = loco.scale_by_locoprop()

    def update(params, layer):
        params = {"a": params}
        grads, state = jax.tree.map(jnp.zeros_like, params), tx.init(params)
        for _ in range(2):
            updates, state = tx.update(
                grads, state, params, intermediates=loco.Intermediates({"a": layer})
            )
        return updates["a"]

    params, layer = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    stacked = update(params, replace(layer, stack_dims=1))
    for i, member in enumerate(members):
        expected = update(*member)
        for name, u in expected.items():
            np.testing.assert_allclose(stacked[name][i], u, rtol=1e-4, atol=1e-6)


def test_targets_of_the_user_are_used():
    params, layer = random_layer(0, 6, 4, 3, "tanh")
    goal = jnp.tanh(layer.preactivations) - 0.05 * layer.cotangents
    tx = loco.scale_by_locoprop(target=loco.targets.gradient_descent(0.05))
    results = []
    for la in (layer, replace(layer, targets=goal, cotangents=7 * layer.cotangents)):
        tree = {"a": params}
        intermediates = loco.Intermediates({"a": la})
        results.append(
            tx.update(tree, tx.init(tree), tree, intermediates=intermediates)[0]
        )
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-6)


def test_a_layer_with_a_masked_bias_moves_its_kernel():
    loss_fn, params, batch = regression()
    labels = jax.tree.map_with_path(
        lambda path, _: "free" if path[-1].key == "kernel" else "fixed", params
    )
    tx = optax.partition(
        {"free": loco.scale_by_locoprop(), "fixed": optax.set_to_zero()}, labels
    )
    _, grads, intermediates = loco.linen.value_and_grad(loss_fn)(params, batch)
    updates, _ = tx.update(grads, tx.init(params), params, intermediates=intermediates)
    for name in ("first", "second"):
        assert float(jnp.max(jnp.abs(updates[name]["kernel"]))) > 0
        assert float(jnp.max(jnp.abs(updates[name]["bias"]))) == 0


class TestErrors:
    @pytest.fixture
    def made(self):
        loss_fn, params, batch = regression()
        _, grads, intermediates = loco.linen.value_and_grad(loss_fn)(params, batch)
        tx = loco.scale_by_locoprop()

        def update(intermediates, tx=tx, params=params):
            state = tx.init(params)
            return tx.update(grads, state, params, intermediates=intermediates)

        return update, params, intermediates

    def test_missing_intermediates(self, made):
        update, *_ = made
        with pytest.raises(TypeError, match=r"locoprop_optax.linen.value_and_grad"):
            update(None)

    def test_other_object(self, made):
        update, _, intermediates = made
        with pytest.raises(TypeError, match="Intermediates, got dict"):
            update(dict(intermediates.layers))

    def test_missing_params(self, made):
        _, params, intermediates = made
        tx = loco.scale_by_locoprop()
        with pytest.raises(TypeError, match="needs `params`"):
            tx.update(params, tx.init(params), intermediates=intermediates)

    def test_path_not_in_params(self, made):
        update, _, intermediates = made
        layers = {**intermediates.layers, "third": intermediates.layers["first"]}
        with pytest.raises(ValueError, match=r"'third', which is not in the param"):
            update(loco.Intermediates(layers))

    def test_layer_without_record(self, made):
        update, _, intermediates = made
        layers = {"first": intermediates.layers["first"]}
        with pytest.raises(ValueError, match=r"'second' owns a kernel.*`exclude=`"):
            update(loco.Intermediates(layers))

    def test_excluded_layer_needs_no_record(self, made):
        update, _, intermediates = made
        layers = {"first": intermediates.layers["first"]}
        update(loco.Intermediates(layers), tx=loco.scale_by_locoprop(exclude="sec*"))

    def test_record_of_a_layer_that_is_not_local(self, made):
        _, params, intermediates = made
        renamed = {"first": {"weight": params["first"]["kernel"]}}
        layers = {"first": intermediates.layers["first"]}
        tx = loco.scale_by_locoprop()
        with pytest.raises(ValueError, match=r"'first', which is not local.*include="):
            tx.update(
                renamed,
                tx.init(renamed),
                renamed,
                intermediates=loco.Intermediates(layers),
            )

    @pytest.mark.parametrize(
        ("field", "match"),
        [
            ("inputs", r"'first': the shape of its inputs is \(8, 3\)"),
            ("cotangents", r"its cotangents is \(8, 4\), expected \(8, 5\)"),
            ("preactivations", r"\(8, 5\), expected \(8, 4\)"),
        ],
    )
    def test_shapes_that_do_not_fit(self, made, field, match):
        update, _, intermediates = made
        layer = intermediates.layers["first"]
        wrong = replace(layer, **{field: getattr(layer, field)[:, :-1]})
        layers = {**intermediates.layers, "first": wrong}
        with pytest.raises(ValueError, match=match):
            update(loco.Intermediates(layers))

    def test_targets_that_do_not_fit(self, made):
        update, _, intermediates = made
        wrong = replace(intermediates.layers["first"], targets=jnp.zeros((8, 4)))
        with pytest.raises(ValueError, match=r"targets is \(8, 4\), expected \(8, 5\)"):
            update(loco.Intermediates({**intermediates.layers, "first": wrong}))

    def test_integer_inputs(self, made):
        update, _, intermediates = made
        layer = intermediates.layers["first"]
        wrong = replace(layer, inputs=layer.inputs.astype(int))
        with pytest.raises(
            ValueError, match=r"'first': the dtype of its inputs is int"
        ):
            update(loco.Intermediates({**intermediates.layers, "first": wrong}))

    def test_integer_params(self):
        with pytest.raises(ValueError, match=r"'a': kernel has dtype int32"):
            loco.scale_by_locoprop().init({"a": {"kernel": jnp.ones((2, 2), int)}})

    def test_gradient_of_another_model(self, made):
        update, _, intermediates = made
        other = intermediates.layers["second"].gradient
        wrong = replace(intermediates.layers["first"], gradient=other)
        with pytest.raises(ValueError, match=r"gradient for (kernel|bias) is"):
            update(loco.Intermediates({**intermediates.layers, "first": wrong}))

    def test_masked_kernel_with_a_free_bias(self):
        params = {"a": {"kernel": optax.MaskedNode(), "bias": jnp.ones(2)}}
        with pytest.raises(ValueError, match=r"'a': its kernel is masked"):
            loco.scale_by_locoprop().init(params)
