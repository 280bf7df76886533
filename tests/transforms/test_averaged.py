"""Steps of shards on their own, and the mean of them."""

import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import locoprop_optax as loco
from tests.helpers import local_steps, regression, slow, train_step

SHARDS, OPTIMIZERS = (
    4,
    {
        "locoprop": loco.locoprop,
        "locoprop_m": partial(loco.locoprop_m, learning_rate=1e-3, num_local_steps=3),
    },
)


@pytest.fixture(params=[AxisType.Auto, slow(AxisType.Explicit)])
def mesh(request):
    return jax.make_mesh((SHARDS,), ("data",), axis_types=(request.param,))


def sharded(step, mesh):
    whole, rows = PartitionSpec(), PartitionSpec("data")
    over = partial(jax.shard_map, mesh=mesh, out_specs=whole, check_vma=False)
    return jax.jit(over(step, in_specs=(whole, whole, rows)))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_step_is_the_mean_of_the_shards_own(name, mesh):
    loss_fn, params, batch = regression(batch=16)
    layers = loco.layers(loss_fn)(params, batch)
    tx = OPTIMIZERS[name](layers)
    alone = jax.jit(train_step(loss_fn, layers, tx))
    state = tx.init(params)
    parts = zip(*(jnp.split(array, SHARDS) for array in batch), strict=True)
    reached = [alone(params, state, part) for part in parts]
    mean = jax.tree.map(
        lambda *leaves: np.mean(leaves, axis=0).astype(leaves[0].dtype), *reached
    )
    step = sharded(train_step(loss_fn, layers, loco.averaged(tx, "data")), mesh)
    batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    moved, new_state, _ = step(params, state, batch)
    chex.assert_trees_all_close(moved, mean[0], rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(new_state, mean[1], rtol=1e-4, atol=1e-5)
    again, _, _ = step(moved, new_state, batch)
    assert loss_fn(again, batch) < loss_fn(params, batch)


@pytest.mark.parametrize("by", ["shard_map", "pmap"])
def test_replicas_part_only_where_that_is_said(by):
    loss_fn, params, batch = regression(batch=16)
    layers = loco.layers(loss_fn)(params, batch)
    mesh = jax.make_mesh((SHARDS,), ("data",), axis_types=(AxisType.Auto,))

    def moved(tx):
        step, state = train_step(loss_fn, layers, tx), tx.init(params)
        if by == "shard_map":
            whole, rows = PartitionSpec(), PartitionSpec("data")
            take = lambda *given: jax.tree.map(lambda p: p[None], step(*given)[0])  # noqa: E731
            specs = {"in_specs": (whole, whole, rows), "out_specs": rows}
            over = jax.shard_map(take, mesh=mesh, check_vma=False, **specs)
            return jax.jit(over)(params, state, batch)
        parts = jax.tree.map(lambda x: x.reshape(SHARDS, -1, *x.shape[1:]), batch)
        over = jax.pmap(lambda b: step(params, state, b)[0], "data")
        return over(parts)

    for make in (local_steps, loco.locoprop):
        with pytest.raises(ValueError, match=r"inside a shard, over 'data'.*averaged"):
            moved(make(layers))
    together = moved(loco.averaged(local_steps(layers), "data"))
    apart = moved(loco.averaged(local_steps(layers), ()))
    spread = lambda tree: float(np.ptp(tree["first"]["kernel"], axis=0).max())  # noqa: E731
    assert spread(together) == 0
    assert spread(apart) > 1e-5


def test_a_quadratic_model_inside_a_shard_is_refused(mesh):
    loss_fn, params, batch = regression(batch=16)
    layers = loco.layers(loss_fn)(params, batch)
    tx = loco.scale_by_quadratic_model()
    batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    with pytest.raises(ValueError, match="replicas of the parameters would part"):
        sharded(train_step(loss_fn, layers, tx), mesh)(params, tx.init(params), batch)


def test_numbers_are_reduced_once(mesh):
    loss_fn, params, batch = regression(batch=16)
    layers = loco.layers(loss_fn)(params, batch)
    tx = loco.averaged(loco.locoprop_m(layers, 1e-3), "data")
    batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    step = sharded(train_step(loss_fn, layers, tx), mesh)
    program = step.lower(params, tx.init(params), batch).compile().as_text()
    reductions = re.findall(r"= (.*) all-reduce(?:-start)?\(", program)
    assert sum("f32" in reduced for reduced in reductions) == 1
    assert len(reductions) <= 2  # the counters
    assert "all-gather" not in program


def test_counters_of_shards_agree(mesh):
    loss_fn, params, (x, y) = regression(batch=16)
    layers = loco.layers(loss_fn)(params, (x, y))
    tx = loco.averaged(loco.keep_finite(local_steps(layers)), "data")
    broken = (x.at[5, 0].set(jnp.nan), y)
    broken = jax.device_put(broken, NamedSharding(mesh, PartitionSpec("data")))
    step = sharded(train_step(loss_fn, layers, tx), mesh)
    moved, state, _ = step(params, tx.init(params), broken)
    chex.assert_tree_all_finite(moved)
    skipped = optax.tree.get(state, "skipped_steps")
    assert [int(shard.data) for shard in skipped.addressable_shards] == [1] * SHARDS
