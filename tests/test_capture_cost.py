"""Capture costs no floating-point operations beyond those of the gradient."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import locoprop_optax as loco


class WideMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(4):
            x = nn.relu(nn.Dense(1024)(x))
        return x


class SmallResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (3, 3))(x)
        for _ in range(3):
            h = nn.BatchNorm(use_running_average=False)(nn.Conv(16, (3, 3))(x))
            x = x + nn.Conv(16, (3, 3))(nn.relu(h))
        return nn.Dense(10)(x.mean((1, 2)))


@pytest.mark.parametrize(
    ("model", "shape"), [(WideMLP(), (64, 1024)), (SmallResNet(), (8, 16, 16, 3))]
)
def test_operations_of_capture(model, shape):
    x = jnp.ones(shape)
    variables = model.init(jax.random.key(0), x)
    params = variables.pop("params")

    def loss_fn(params, x):
        out, _ = model.apply(
            {"params": params, **variables}, x, mutable=["batch_stats"]
        )
        return jnp.mean(out**2)

    def operations(function):
        compiled = jax.jit(function).lower(params, x).compile()
        return compiled.cost_analysis()["flops"]

    plain = operations(jax.value_and_grad(loss_fn))
    layers = loco.layers(loss_fn)(params, x)
    captured = operations(loco.value_and_grad(loss_fn, layers))
    assert captured <= 1.01 * plain
