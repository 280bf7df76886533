"""What is no layer is said, with the reason and the way out."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import locoprop_optax as loco
from tests.helpers import regression, slow
from tests.trace.checks import assert_captured

X = jax.random.normal(jax.random.key(0), (4, 6))


def loss_of(model, x=X):
    params = model.init(jax.random.key(1), x)["params"]

    def loss_fn(params):
        return jnp.sum(jnp.sin(model.apply({"params": params}, x)) ** 2)

    return loss_fn, params


class InWhileLoop(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(6, name="layer")
        layer(x)
        variables = {"params": self.variables["params"]["layer"]}
        return jax.lax.fori_loop(
            0,
            jnp.int32(jnp.sum(x) * 0 + 2),
            lambda _, x: nn.Dense(6, parent=None).apply(variables, x),
            x,
        )


class BehindCustomVjp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.custom_vjp(
            lambda layer, x: layer(x),
            forward_fn=lambda layer, x: nn.vjp(lambda m, x: m(x), layer, x),
            backward_fn=lambda pull, g: pull(g),
        )(nn.Dense(3, name="layer"), x)


class WeightNormed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.WeightNorm(nn.Dense(3, name="layer"))(x)


class BehindCustomJvp(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (6, 3))
        product = jax.custom_jvp(lambda x, w: x @ w)
        product.defjvps(lambda t, out, x, w: t @ w, lambda t, out, x, w: 2 * (x @ t))
        return product(x, kernel)


class SpectrallyNormed(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (6, 3))
        u = jnp.ones(6)
        v = kernel.T @ u / jnp.linalg.norm(kernel.T @ u)
        return x @ (kernel / (u @ kernel @ v))


class Standardized(nn.Conv):
    """A convolution whose kernel is standardized: not linear in its parameter."""

    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        return value / jnp.std(value) if name == "kernel" else value


class OneOfConcatenated(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.RNN(nn.OptimizedLSTMCell(5))(x[None])


HIDDEN = {
    "while": (InWhileLoop(), "it enters a while loop, which keeps no record"),
    "custom_vjp": (BehindCustomVjp(), "a function with a derivative rule of its own"),
    "custom_jvp": (BehindCustomJvp(), "a function with a derivative rule of its own"),
    "weight norm": (WeightNormed(), "a kernel is computed from it, by mul"),
    "spectral norm": (SpectrallyNormed(), "a kernel is computed from it, by div"),
    "standardized": (Standardized(4, (3,)), "a kernel is computed from it, by div"),
    "concatenated": (OneOfConcatenated(), "is computed from it, by concatenate"),
}


class Beside(nn.Module):
    """A model, and a layer behind it that hides nothing."""

    hidden: nn.Module

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="plain")(self.hidden(x))


SLOW = ("custom_jvp", "spectral norm", "standardized")  # as others are hidden


@pytest.mark.parametrize("name", [slow(n) if n in SLOW else n for n in HIDDEN])
def test_one_error_names_all_that_hide_a_product(name):
    model, reason = HIDDEN[name]
    x = X[..., None] if name == "standardized" else X
    loss_fn, params = loss_of(Beside(model), x)
    with pytest.raises(ValueError, match=reason) as error:
        loco.layers(loss_fn)(params)
    kernels = [p for p in loco._records.paths.paths_of(params) if "kernel" in p]
    named = [path for path in kernels if repr(path) in str(error.value)]
    assert set(named) >= {p for p in kernels if p.endswith("kernel")} - {"plain/kernel"}
    layers = loco.layers(loss_fn, exclude="hidden/*")(params)
    if name == "while":
        return  # it has no gradient
    assert [layer.path for layer in layers] == ["plain/kernel"]
    assert dict(layers.others)[named[0]] == "excluded"
    _, grads, intermediates = loco.value_and_grad(loss_fn, layers)(params)
    tx = loco.scale_by_locoprop(layers)
    updates, _ = tx.update(grads, tx.init(params), params, intermediates=intermediates)
    assert all(bool(jnp.all(u != 0)) for u in jax.tree.leaves(updates["plain"]))


def test_the_globs_of_the_error_exclude():
    loss_fn, params = loss_of(Beside(WeightNormed()))
    with pytest.raises(ValueError, match="cannot be captured") as error:
        loco.layers(loss_fn)(params)
    globs = eval(str(error.value).split("exclude=")[1].split("]")[0] + "]")
    layers = loco.layers(loss_fn, exclude=globs)(params)
    assert [str(layer.linear_map) for layer in layers] == ["summand", "product"]


def test_a_batch_of_one_is_no_kernel():
    """What is computed from a parameter and an activation is an activation."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(8, name="first")(x)
            x = x + self.param("positions", nn.initializers.normal(), (6, 8))
            x = nn.LayerNorm(name="norm")(x)
            return nn.Dense(2, name="last")(x)

    loss_fn, params = loss_of(Model(), jnp.ones((1, 6, 3)))
    layers = loco.layers(loss_fn)(params)
    assert {layer.path: str(layer.linear_map) for layer in layers} == {
        "first/kernel": "product",
        "positions": "summand",
        "norm/scale": "factor",
        "norm/bias": "summand",
        "last/kernel": "product",
    }


def test_a_pattern_that_fits_nothing():
    loss_fn, params, batch = regression()
    with pytest.raises(ValueError, match="exclude='head' fits no parameter"):
        loco.layers(loss_fn, exclude="head")(params, batch)


def test_layers_of_a_numpy_batch_are_those_of_any_other():
    loss_fn, params, batch = regression()
    layers = loco.layers(loss_fn)(params, jax.tree.map(np.asarray, batch))
    assert layers == loco.layers(loss_fn)(params, batch)
    tx = loco.locoprop(layers)

    @jax.jit
    def step(params, state, batch):
        capture = loco.value_and_grad(loss_fn, layers)
        _, grads, intermediates = capture(params, batch)
        return tx.update(grads, state, params, intermediates=intermediates)

    step(params, tx.init(params), batch)


def test_something_else_than_layers():
    with pytest.raises(TypeError, match=r"must be the layers.*got function"):
        loco.value_and_grad(lambda p: p, loco.layers(lambda p: p))


def test_nothing_found_says_what_was_looked_at():
    params = {"scale": jnp.ones(6), "idle": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="No layer was found") as error:
        loco.layers(lambda p: jnp.sum((X * jnp.exp(p["scale"])) ** 2))(params)
    assert "'scale': goes to exp" in str(error.value)
    assert "'idle': the loss does not depend on it" in str(error.value)


def test_a_stopped_gradient_is_no_dependence():
    params = {"w": jnp.ones((6, 2)), "frozen": jnp.ones((6, 2))}

    def loss_fn(params):
        frozen = X @ jax.lax.stop_gradient(params["frozen"])
        return jnp.sum((X @ params["w"] - frozen) ** 2)

    layers = loco.layers(loss_fn)(params)
    assert [layer.path for layer in layers] == ["w"]
    assert layers.others == (("frozen", "the loss does not depend on it"),)


def test_a_kernel_in_two_orientations_is_a_layer_in_one():
    """The gradient of the other is told apart."""
    params = {"w": jax.random.normal(jax.random.key(0), (6, 3))}

    def loss_fn(params):
        return jnp.sum((jnp.tanh(X @ params["w"]) @ params["w"].T - X) ** 2)

    layers, intermediates = assert_captured(loss_fn, params)
    assert layers.layers[0].calls == ((4, 6, 3),)
    assert intermediates.layers["w"].elsewhere is not None


def test_several_calls_of_other_rows_are_joined():
    params = {"w": jax.random.normal(jax.random.key(0), (6, 6))}

    def loss_fn(params):
        once = jnp.tanh(X.reshape(2, 2, 6) @ params["w"])
        return jnp.sum(jnp.tanh(once.reshape(4, 6)[:3] @ params["w"]) ** 2)

    _, intermediates = assert_captured(loss_fn, params)
    assert intermediates.layers["w"].inputs.shape == (7, 6)


def test_one_example_through_a_shared_layer():
    params = {"w": jax.random.normal(jax.random.key(0), (6, 6))}

    def loss_fn(params):
        return jnp.sum((jnp.tanh(X[0] @ params["w"]) @ params["w"]) ** 2)

    _, intermediates = assert_captured(loss_fn, params)
    assert intermediates.layers["w"].inputs.shape == (2, 6)


@pytest.mark.parametrize(
    "build",
    [
        lambda x: nn.Dense(3, use_bias=False)(0 * x),
        lambda x: nn.DenseGeneral(4, axis=-1, batch_dims=0, use_bias=False)(
            x.reshape(2, 2, 6).at[1].set(0)
        ),
    ],
)
def test_layers_without_any_input_stay_where_they_are(build):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return build(x)

    loss_fn, params = loss_of(Model())
    layers = loco.layers(loss_fn)(params)
    _, grads, intermediates = loco.value_and_grad(loss_fn, layers)(params)
    tx = loco.scale_by_locoprop(layers)
    updates, _ = tx.update(grads, tx.init(params), params, intermediates=intermediates)
    (update,) = jax.tree.leaves(updates)
    assert bool(jnp.all(jnp.isfinite(update)))
    assert float(jnp.max(jnp.abs(update[-1]))) == 0


def test_transfers_are_overridden_by_path_or_glob():
    loss_fn, params, batch = regression()
    layers = loco.layers(loss_fn, transfers={"first/*": "relu"})(params, batch)
    assert layers.layers[0].transfer.name == "relu"
    assert layers.layers[0].reason == "given in transfers="
    with pytest.raises(ValueError, match=r"transfers=\{'third'.*fits no layer.*'first"):
        loco.layers(loss_fn, transfers={"third": "relu"})(params, batch)
    with pytest.raises(ValueError, match="Unknown transfer function 'tanhh'"):
        loco.layers(loss_fn, transfers={"first/*": "tanhh"})


def test_what_is_printed():
    loss_fn, params, batch = regression()
    layers = loco.layers(loss_fn)(params | {"idle": jnp.ones(3)}, batch)
    assert str(layers).splitlines() == [
        "layer                 product  rows  inputs  outputs  transfer  why",
        "first/kernel + bias   product  8     4       5        tanh      "
        "applied to the pre-activation",
        "second/kernel + bias  product  8     5       3        identity  "
        "the loss is its matching loss",
        "",
        "no layer  why",
        "idle      the loss does not depend on it",
        "",
        "curvature: the loss is convex in outputs of shape 8×3 (squared error)",
    ]


def test_layers_are_the_same_for_batches_of_other_sizes():
    loss_fn, params, (x, y) = regression()
    layers = loco.layers(loss_fn)(params, (x, y))
    assert layers == loco.layers(loss_fn)(params, (x[:3], y[:3]))
    assert hash(layers) == hash(loco.layers(loss_fn)(params, (x[:3], y[:3])))
    capture = loco.value_and_grad(loss_fn, layers)
    assert capture(params, (x[:3], y[:3]))[2].layers["first/kernel"].inputs.shape == (
        (3, 4)
    )


def test_layers_are_the_same_under_jit():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.leaky_relu(nn.Dense(6)(x), 0.3)
            return nn.RNN(nn.GRUCell(5))(nn.Conv(4, (2,))(x[None]))

    loss_fn, params = loss_of(Model())
    found = []
    jax.make_jaxpr(lambda p: found.append(loco.layers(loss_fn)(p)))(params)
    assert found == [loco.layers(loss_fn)(params)]


def test_another_loss_than_the_layers_were_found_in():
    loss_fn, params, batch = regression()
    layers = loco.layers(loss_fn)(params, batch)

    def other(params, batch):
        return jnp.mean(jnp.tanh(batch[0] @ params["first"]["kernel"]))

    with pytest.raises(ValueError, match="does not do what `layers` says") as error:
        loco.value_and_grad(other, layers)(params, batch)
    assert "first/kernel: a product" in str(error.value)
    assert "with a kernel of shape (4, 5) and bias first/bias there" in str(error.value)
    assert "and no bias here" in str(error.value)
    assert "second/kernel" in str(error.value)
    assert "no layer here" in str(error.value)


def test_a_loss_that_is_no_scalar():
    params = {"w": jnp.ones((6, 2))}
    with pytest.raises(TypeError, match=r"a loss of shape \(4, 2\), expected a scalar"):
        loco.layers(lambda p: X @ p["w"])(params)
    with pytest.raises(TypeError, match="pass has_aux=True"):
        loco.layers(lambda p: (jnp.sum(X @ p["w"]), 1))(params)


def test_boxed_parameters():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    model = nn.Sequential([nn.Dense(3, kernel_init=init), nn.tanh])
    loss_fn, params = loss_of(model)
    layers, _ = assert_captured(loss_fn, params)
    assert layers.layers[0].path == "layers_0/kernel"


def test_penalties_leave_other_layers_alone():
    loss_fn, params, batch = regression()

    def penalized(params, batch):
        penalty = optax.tree.norm(params["first"], squared=True)
        return loss_fn(params, batch) + 0.5 * penalty

    layers = loco.layers(loss_fn)(params, batch)
    _, grads, plain = loco.value_and_grad(loss_fn, layers)(params, batch)
    _, _, intermediates = loco.value_and_grad(penalized, layers)(params, batch)
    first, second = intermediates.layers.values()
    for name, gradient in first.gradient.items():
        np.testing.assert_allclose(gradient, grads["first"][name], atol=1e-6)
        np.testing.assert_allclose(
            first.penalty[name], params["first"][name], atol=1e-6
        )
    assert second.penalty is None
    assert plain.layers["first/kernel"].penalty is None
