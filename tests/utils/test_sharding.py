"""Training on several devices takes the steps of training on one."""

import re
from functools import cache, partial
from itertools import product

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import locoprop_optax as loco
from tests.helpers import MLP, counted, local_steps, regression, slow, train_step

DEVICES = 8
MESHES = [AxisType.Auto, AxisType.Explicit]
OPTIMIZERS = {
    "first_order": partial(loco.locoprop_m, learning_rate=1e-3, num_local_steps=3),
    "majorized_newton": local_steps,
    "a part's curvature": partial(
        local_steps,
        solver=loco.solvers.majorized_newton(1, ema=0.5, stride=2),
    ),
    "exact": partial(
        local_steps, loss=loco.losses.squared_loss(), solver=loco.solvers.exact(0.1)
    ),
    "locoprop": loco.locoprop,
}


class Convolutions(nn.Module):
    """Two convolutions, one with a stride, and a Dense layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="first")(x.reshape(-1, 6, 6, 1)))
        x = nn.relu(nn.Conv(5, (3, 3), strides=2, name="second")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def stepper(loss_fn, params, batch, make):
    """An optimizer of a loss's layers, and a training step with it."""
    layers = loco.layers(loss_fn)(params, batch)
    tx = make(layers)
    return tx, train_step(loss_fn, layers, tx)


def train(loss_fn, params, batch, make, *, steps=20):
    """The losses of some steps, the parameters and the state after them, the traces."""
    tx, step = stepper(loss_fn, params, batch, make)
    jitted, traces = counted(step)
    state = tx.init(params)
    losses = []
    for _ in range(steps):
        params, state, loss = jitted(params, state, batch)
        losses.append(float(loss))
    return losses, params, state, traces


def mesh_of(kind, shape=(DEVICES,), names=("data",)):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def placed(tree, mesh, *spec):
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*spec)))


MODELS = {"dense": (MLP(), 4), "conv": (Convolutions(), 36)}


@cache
def on_one_device(optimizer, model):
    """The losses and the parameters to compare with."""
    module, features = MODELS[model]
    loss_fn, params, batch = regression(module, batch=16, features=features)
    return train(loss_fn, params, batch, OPTIMIZERS[optimizer])[:2]


@pytest.mark.parametrize("kind", MESHES, ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    ("optimizer", "model"),
    [
        *((name, "dense") for name in ("first_order", "majorized_newton", "locoprop")),
        ("majorized_newton", "conv"),
        slow("first_order", "conv"),
        *(slow(*case) for case in product(("a part's curvature", "exact"), MODELS)),
    ],
)
def test_a_batch_spread_over_devices_takes_the_same_steps(optimizer, model, kind):
    module, features = MODELS[model]
    loss_fn, params, batch = regression(module, batch=16, features=features)
    losses, alone = on_one_device(optimizer, model)
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        params, batch = placed(params, mesh), placed(batch, mesh, "data")
        spread, together, state, traces = train(
            loss_fn, params, batch, OPTIMIZERS[optimizer]
        )
    np.testing.assert_allclose(spread, losses, rtol=1e-4)
    chex.assert_trees_all_close(together, alone, rtol=1e-3, atol=1e-4)
    assert losses[-1] < losses[0]
    for leaf in jax.tree.leaves((together, state)):
        assert leaf.sharding.is_fully_replicated
    assert len(traces) <= 2  # the state's placement is settled by the first step


ENTROPIES = {
    "sigmoid": lambda outputs, y: jnp.sum(
        optax.sigmoid_binary_cross_entropy(outputs, jax.nn.sigmoid(y)), axis=-1
    ),
    "integer labels": lambda outputs, y: (
        optax.softmax_cross_entropy_with_integer_labels(outputs, jnp.argmax(y, axis=-1))
    ),
}


@pytest.mark.parametrize("kind", [slow(AxisType.Auto), AxisType.Explicit])
@pytest.mark.parametrize("name", ENTROPIES)
def test_cross_entropies_of_a_batch_spread_over_devices(name, kind):
    model = MLP()
    _, params, batch = regression(model, batch=16)

    def loss_fn(params, batch):
        outputs = model.apply({"params": params}, batch[0])
        return jnp.mean(ENTROPIES[name](outputs, batch[1]))

    losses, *_ = train(loss_fn, params, batch, loco.locoprop, steps=3)
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        params, batch = placed(params, mesh), placed(batch, mesh, "data")
        spread, *_ = train(loss_fn, params, batch, loco.locoprop, steps=3)
    np.testing.assert_allclose(spread, losses, rtol=1e-4)


def test_a_part_of_a_loss_that_leaves_places_to_the_compiler():
    """As reading a table on explicit axes does."""
    tokens = jnp.arange(16 * 6).reshape(16, 6) % 12
    params = {
        "table": jax.random.normal(jax.random.key(0), (12, 8)),
        "scale": jnp.ones(8),
        "head": 0.3 * jax.random.normal(jax.random.key(1), (8, 12)),
    }

    def loss_on(place):
        def loss_fn(params, tokens):
            x = params["table"].at[tokens].get(out_sharding=place)
            logits = (jnp.tanh(x) * params["scale"]) @ params["head"]
            labels = 5 * tokens % 12
            costs = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return jnp.mean(costs)

        return loss_fn

    losses, *_ = train(loss_on(None), params, tokens, loco.locoprop, steps=3)
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        params, tokens = placed(params, mesh), placed(tokens, mesh, "data")
        loss_fn = loss_on(PartitionSpec("data"))
        spread, *_ = train(loss_fn, params, tokens, loco.locoprop, steps=3)
    np.testing.assert_allclose(spread, losses, rtol=1e-4)


def collectives(loss_fn, params, batch, make):
    """The collective operations of a compiled step."""
    tx, step = stepper(loss_fn, params, batch, make)
    program = jax.jit(step).lower(params, tx.init(params), batch).compile().as_text()
    return re.findall(
        r"= .*? (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
        r"(?:-start)?\(",
        program,
    )


@pytest.mark.parametrize(
    ("make", "loops"),
    [
        (partial(loco.locoprop_m, learning_rate=1e-4, num_local_steps=3), 1),
        (partial(loco.locoprop_m, learning_rate=1e-4, num_local_steps=7), 1),
        (partial(local_steps, stack_layers=False), 2),
        (
            partial(local_steps, solver=loco.solvers.majorized_newton(1)),
            0,
        ),
        (OPTIMIZERS["a part's curvature"], 0),
    ],
)
def test_one_reduction_for_each_local_step_of_a_group(make, loops):
    loss_fn, params, batch = regression(batch=16)
    mesh = mesh_of(AxisType.Auto)
    with jax.set_mesh(mesh):
        params, batch = placed(params, mesh), placed(batch, mesh, "data")
        found = collectives(loss_fn, params, batch, make)
    assert set(found) == {"all-reduce"}
    # The gradient's, with which the Gram matrices go; and that in each loop of steps.
    assert len(found) <= 1 + loops


LAYOUTS = {"fsdp": [("data",), ("data",)], "tensor": [(None, "model"), ("model",)]}


def laid_out(params, mesh, layout):
    """The parameters of `MLP`, each kernel sharded as a layout says."""
    sharded = {}
    for (name, leaves), spec in zip(params.items(), LAYOUTS[layout], strict=True):
        bias = spec[1:] if layout == "tensor" else ()
        sharded[name] = {
            "kernel": placed(leaves["kernel"], mesh, *spec),
            "bias": placed(leaves["bias"], mesh, *bias),
        }
    return sharded


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "optimizer", ["locoprop", *map(slow, ["first_order", "majorized_newton"])]
)
def test_sharded_parameters_stay_as_they_are(optimizer, layout):
    loss_fn, params, batch = regression(MLP(hidden=8), batch=16)
    losses, alone, _, _ = train(loss_fn, params, batch, OPTIMIZERS[optimizer], steps=5)
    mesh = mesh_of(AxisType.Auto, (2, 4), ("data", "model"))
    with jax.set_mesh(mesh):
        params, batch = laid_out(params, mesh, layout), placed(batch, mesh, "data")
        spread, together, state, traces = train(
            loss_fn, params, batch, OPTIMIZERS[optimizer], steps=5
        )
    np.testing.assert_allclose(spread, losses, rtol=1e-4)
    chex.assert_trees_all_close(together, alone, rtol=1e-3, atol=1e-4)
    kernels = {name: leaves["kernel"] for name, leaves in params.items()}
    for name, kernel in kernels.items():
        assert together[name]["kernel"].sharding.is_equivalent_to(kernel.sharding, 2)
    for path, leaf in jax.tree.leaves_with_path(state):
        for name, kernel in kernels.items():
            if f"'{name}'" in jax.tree_util.keystr(path) and leaf.shape == kernel.shape:
                assert leaf.sharding.is_equivalent_to(kernel.sharding, 2)
    assert len(traces) <= 2


def test_first_order_steps_gather_no_part_of_a_layer():
    loss_fn, params, batch = regression(MLP(hidden=8), batch=16)
    mesh = mesh_of(AxisType.Auto, (2, 4), ("data", "model"))
    with jax.set_mesh(mesh):
        params, batch = laid_out(params, mesh, "tensor"), placed(batch, mesh, "data")
        found = collectives(loss_fn, params, batch, OPTIMIZERS["first_order"])
    assert set(found) == {"all-reduce"}


@pytest.mark.parametrize("kind", MESHES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("optimizer", ["locoprop_m", "majorized_newton"])
def test_devices_solve_different_layers(optimizer, kind):
    class Equal(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(4):
                x = nn.tanh(nn.Dense(8)(x))
            return nn.Dense(3)(x)

    make = {
        "locoprop_m": partial(loco.locoprop_m, learning_rate=1e-4),
        "majorized_newton": local_steps,
    }[optimizer]
    loss_fn, params, batch = regression(Equal(), features=8)
    unstacked = partial(make, stack_layers=False)
    losses, alone, _, _ = train(loss_fn, params, batch, unstacked)
    mesh = mesh_of(kind, (2, 4), ("data", "layers"))
    with jax.set_mesh(mesh):
        batch, params = placed(batch, mesh, "data"), placed(params, mesh)
        over_layers = partial(make, stack_layers="layers")
        spread, together, _, traces = train(loss_fn, params, batch, over_layers)
    np.testing.assert_allclose(spread, losses, rtol=1e-4)
    chex.assert_trees_all_close(together, alone, rtol=1e-3, atol=1e-4)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(together))
    assert len(traces) <= 2


def test_layers_are_spread_over_an_axis_that_the_mesh_has():
    loss_fn, params, batch = regression()
    layers = loco.layers(loss_fn)(params, batch)
    _, grads, intermediates = loco.value_and_grad(loss_fn, layers)(params, batch)
    tx = loco.scale_by_locoprop(layers, stack_layers="layers")
    with pytest.raises(ValueError, match=r"'layers' names no axis .*jax.set_mesh"):
        tx.update(grads, tx.init(params), params, intermediates=intermediates)


def over_shards(function, mesh, **options):
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec(),
        **options,
    )


@pytest.mark.parametrize("varying", [False, True])
def test_shards_that_are_not_told_apart_by_types(varying):
    loss_fn, params, batch = regression()
    layers = loco.layers(loss_fn)(params, batch)

    def capture(params, batch):
        if varying:
            params = jax.lax.pcast(params, "data", to="varying")
        return loco.value_and_grad(loss_fn, layers)(params, batch)

    capture = over_shards(capture, mesh_of(AxisType.Auto))
    with pytest.raises(ValueError, match="only with check_vma=False"):
        capture(params, batch)


def test_a_loss_that_is_a_mean_over_shards():
    loss_fn, params, batch = regression()
    mesh, seen = mesh_of(AxisType.Auto), {}

    def capture(params, batch):
        def mean_loss(params, batch):
            return jax.lax.pmean(loss_fn(params, batch), "data")

        layers = loco.layers(mean_loss)(params, batch)
        loss, _, found = loco.value_and_grad(mean_loss, layers)(params, batch)
        seen.update({path: la.transfer.name for path, la in found.layers.items()})
        return loss

    loss = jax.jit(over_shards(capture, mesh, check_vma=False))(params, batch)
    np.testing.assert_allclose(loss, loss_fn(params, batch), rtol=1e-6)
    assert seen == {"first/kernel": "tanh", "second/kernel": "identity"}


def test_a_shard_map_inside_the_loss_is_refused():
    loss_fn, params, batch = regression()
    inner = over_shards(
        lambda params, batch: jax.lax.pmean(loss_fn(params, batch), "data"),
        mesh_of(AxisType.Auto),
        check_vma=False,
    )
    with pytest.raises(ValueError, match=r"'first/kernel': it enters a shard_map"):
        loco.layers(inner)(params, batch)
