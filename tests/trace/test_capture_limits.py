"""What cannot be captured is an error that names the layer, the reason, the way out."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import locoprop_optax as loco
from tests.helpers import regression

X = jax.random.normal(jax.random.key(0), (4, 6))


def capture_of(model, x=X, **options):
    params = model.init(jax.random.key(1), x)["params"]

    def loss_fn(params):
        return jnp.sum(jnp.sin(model.apply({"params": params}, x)) ** 2)

    return loco.linen.value_and_grad(loss_fn, **options), params


class ScannedWithOneKernel(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            lambda layer, x, _: (nn.tanh(layer(x)), None),
            variable_broadcast="params",
            split_rngs={"params": False},
            length=3,
        )
        return scan(nn.Dense(6, name="layer"), x, None)[0]


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.RNN(nn.SimpleCell(5), name="rnn")(x[None])


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


class Frozen(nn.Module):
    """A layer whose kernel the loss sees only through a stopped gradient."""

    @nn.compact
    def __call__(self, x):
        stop = nn.map_variables(
            nn.Dense,
            "params",
            trans_in_fn=jax.lax.stop_gradient,
            init=self.is_initializing(),
        )
        return stop(3, name="layer")(x)


class CalledThroughOneJit(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.jit(nn.Dense)(6, name="layer")
        return layer(layer(x))


@pytest.mark.parametrize(
    ("model", "layer", "reason"),
    [
        (ScannedWithOneKernel(), "layer", "broadcast across the turns of a scan"),
        (Recurrent(), "SimpleCell_0/i", "broadcast across the turns of a scan"),
        (InWhileLoop(), "layer", "inside a while, which keeps no record"),
        (BehindCustomVjp(), "layer", "a custom derivative rule around it hides it"),
        (WeightNormed(), "layer", "not its parameter itself but computed from it"),
        (Frozen(), "layer", "its gradient is stopped"),
        (CalledThroughOneJit(), "layer", "a jitted function's cached trace"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_trouble_is_named(model, layer, reason):
    capture, params = capture_of(model)
    with pytest.raises(ValueError, match=f"'{layer}' cannot.*{reason}.*`exclude=`"):
        capture(params)
    capture, _ = capture_of(model, exclude=lambda path: True)
    assert capture(params)[2].layers == {}


@pytest.mark.parametrize("by_layer", [False, True])
def test_kernel_that_is_used_elsewhere_too(by_layer):
    """Weights tied by hand have a part of their gradient that no record gives."""
    layer = nn.Dense(6, use_bias=False)
    params = {"one": layer.init(jax.random.key(0), X)["params"]}

    def loss_fn(params):
        hidden = nn.tanh(layer.apply({"params": params["one"]}, X))
        transposed = params["one"]["kernel"].T
        if by_layer:
            return jnp.sum(layer.apply({"params": {"kernel": transposed}}, hidden) ** 2)
        product = jax.jit(jnp.matmul)(hidden, transposed)
        return jnp.sum(2.0 * product**2)

    with pytest.raises(ValueError, match=r"'one' cannot.*as tied weights are.*exclude"):
        loco.linen.value_and_grad(loss_fn)(params)
    loco.linen.value_and_grad(loss_fn, exclude="one")(params)


def test_kind_that_is_not_known():
    class Mystery(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", nn.initializers.ones, (6, 2))
            return x @ jnp.abs(kernel)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Mystery(name="mystery")(nn.tanh(nn.Dense(6, name="layer")(x)))

    capture, params = capture_of(Model())
    _, grads, intermediates = capture(params)
    assert set(intermediates.layers) == {"layer"}
    tx = loco.locoprop_momentum()
    with pytest.raises(ValueError, match=r"'mystery' owns a kernel.*`exclude=`"):
        tx.update(grads, tx.init(params), params, intermediates=intermediates)
    tx = loco.locoprop_momentum(exclude="mystery")
    tx.update(grads, tx.init(params), params, intermediates=intermediates)
    model = Model()

    def loss_fn(params):
        return jnp.sum(model.apply({"params": params}, X))

    row = loco.linen.tabulate(loss_fn)(params).splitlines()[-1]
    assert row.startswith("mystery")
    assert "not captured" in row


@loco.linen.register_linear
class Scaled(nn.Module):
    """A linear layer of the user's own."""

    power: int = 1

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (x.shape[-1], 3))
        bias = self.param("bias", nn.initializers.zeros, (3,))
        return jnp.cumsum(x, axis=-1) @ kernel**self.power + bias


def test_registered_module():
    capture, params = capture_of(nn.Sequential([Scaled(), nn.tanh]))
    _, grads, intermediates = capture(params)
    loco.check_intermediates(params, grads, intermediates)
    assert intermediates.layers["layers_0"].transfer.name == "tanh"
    tx = loco.scale_by_locoprop()
    tx.update(grads, tx.init(params), params, intermediates=intermediates)


def test_registered_module_that_is_not_linear():
    capture, params = capture_of(Scaled(power=2))
    with pytest.raises(ValueError, match="Scaled was registered as linear"):
        capture(params)


@loco.nnx.register_linear
class NnxScaled(nnx.Module):
    """A linear layer of the user's own, in NNX."""

    def __init__(self, power, rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (6, 3)))
        self.power = power

    def __call__(self, x):
        return jnp.cumsum(x, axis=-1) @ self.kernel[...] ** self.power


def test_registered_nnx_module():
    def loss_fn(model, x):
        return jnp.sum(jnp.sin(model(x)) ** 2)

    model = nnx.Sequential(NnxScaled(1, nnx.Rngs(0)))
    _, grads, intermediates = loco.nnx.value_and_grad(loss_fn)(model, X)
    params, grads = nnx.as_pure(nnx.state(model)), nnx.as_pure(grads)
    loco.check_intermediates(params, grads, intermediates)
    with pytest.raises(ValueError, match="NnxScaled was registered as linear"):
        loco.nnx.value_and_grad(loss_fn)(NnxScaled(2, nnx.Rngs(0)), X)


def test_classes_are_left_as_they_were():
    calls = nnx.Linear.__call__, NnxScaled.__call__
    model = NnxScaled(2, nnx.Rngs(0))
    with pytest.raises(ValueError, match="registered"):
        loco.nnx.value_and_grad(lambda m, x: jnp.sum(m(x)))(model, X)
    assert calls == (nnx.Linear.__call__, NnxScaled.__call__)
    assert set(vars(model)) == set(vars(NnxScaled(2, nnx.Rngs(0))))


def test_penalties_are_told_from_the_gradient_through_the_layer():
    loss_fn, params, batch = regression()

    def penalized(params, batch):
        penalty = sum(jnp.sum(p**2) for p in jax.tree.leaves(params["first"]))
        return loss_fn(params, batch) + 0.5 * penalty

    _, grads, plain = loco.linen.value_and_grad(loss_fn)(params, batch)
    _, _, intermediates = loco.linen.value_and_grad(penalized)(params, batch)
    first, second = (intermediates.layers[name] for name in ("first", "second"))
    chex.assert_trees_all_close(dict(first.gradient), grads["first"], atol=1e-6)
    chex.assert_trees_all_close(first.penalty, params["first"], atol=1e-6)
    assert second.penalty is None
    assert plain.layers["first"].penalty is None


def test_train_state():
    loss_fn, params, batch = regression()
    state = loco.linen.TrainState.create(
        apply_fn=None,
        params=params,
        tx=optax.chain(loco.locoprop_momentum(), optax.identity()),
    )

    @jax.jit
    def step(state, batch):
        loss, grads, intermediates = loco.linen.value_and_grad(loss_fn)(
            state.params, batch
        )
        return state.apply_gradients(grads=grads, intermediates=intermediates), loss

    first = None
    for _ in range(20):
        state, loss = step(state, batch)
        first = loss if first is None else first
    assert int(state.step) == 20
    assert loss < first
    plain = loco.linen.TrainState.create(
        apply_fn=None, params=params, tx=optax.sgd(0.1)
    )
    grads = jax.grad(loss_fn)(params, batch)
    assert int(plain.apply_gradients(grads=grads).step) == 1
    with pytest.raises(TypeError, match="needs `intermediates=`"):
        state.apply_gradients(grads=grads)


def test_nnx_random_counts_advance_once():
    model = nnx.Sequential(
        nnx.Linear(6, 6, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1))
    )
    counts = []
    for _ in range(3):
        loco.nnx.value_and_grad(lambda m, x: jnp.sum(m(x) ** 2))(model, X)
        counts.append(int(model.layers[1].rngs.count[...]))
    assert counts == [1, 2, 3]


def test_nnx_has_aux_and_exclude():
    model = nnx.Sequential(
        nnx.Linear(6, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 2, rngs=nnx.Rngs(1))
    )

    def loss_fn(model, x):
        out = model(x)
        return jnp.sum(out**2), out

    (loss, out), _, intermediates = loco.nnx.value_and_grad(
        loss_fn, has_aux=True, exclude="layers/0"
    )(model, X)
    np.testing.assert_allclose(loss, jnp.sum(out**2), rtol=1e-6)
    assert set(intermediates.layers) == {"layers/1"}
    shown = loco.nnx.tabulate(loss_fn, has_aux=True, exclude="layers/0")(model, X)
    assert "excluded" in shown


class Standardized(nn.Conv):
    """A convolution whose kernel is standardized: not linear in its parameter."""

    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        return value / jnp.std(value) if name == "kernel" else value


class Tripled(nnx.Linear):
    def __call__(self, x):
        return 3 * super().__call__(x)


@loco.linen.register_linear
class ThroughSuper(nn.Dense):
    """A subclass that calls its base and is registered as linear."""

    @nn.compact
    def __call__(self, x):
        return super().__call__(x)


def test_subclasses_are_of_an_unknown_kind():
    image = jax.random.normal(jax.random.key(0), (2, 5, 5, 3))
    capture, params = capture_of(Standardized(4, (3, 3)), image)
    assert capture(params)[2].layers == {}
    model = nnx.Sequential(
        Tripled(6, 6, rngs=nnx.Rngs(0)), nnx.Linear(6, 2, rngs=nnx.Rngs(1))
    )
    _, _, intermediates = loco.nnx.value_and_grad(lambda m, x: jnp.sum(m(x) ** 2))(
        model, X
    )
    assert set(intermediates.layers) == {"layers/1"}


def test_a_call_of_super_is_no_call_of_its_own():
    capture, params = capture_of(nn.Sequential([ThroughSuper(3), nn.tanh]))
    _, grads, intermediates = capture(params)
    assert intermediates.layers["layers_0"].inputs.shape == X.shape
    loco.check_intermediates(params, grads, intermediates)


def test_calls_that_cannot_be_joined():
    class Twice(nn.Module):
        specs: tuple[str, str]

        @nn.compact
        def __call__(self, x):
            layer = nn.Einsum((6, 6), None, use_bias=False, name="layer")
            for spec in self.specs:
                x = nn.tanh(layer(x, spec))
            return x

    capture, params = capture_of(Twice(("bi,io->bo", "bi,oi->bo")))
    with pytest.raises(ValueError, match=r"'layer' cannot.*different things"):
        capture(params)
    capture, params = capture_of(Twice(("ib,io->ob", "ib,io->ob")), X.T)
    with pytest.raises(ValueError, match="first axis does not count them"):
        capture(params)


def test_one_example_through_a_shared_layer():
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(6, name="layer")
            return layer(nn.tanh(layer(x)))

    capture, params = capture_of(Shared(), X[0])
    _, grads, intermediates = capture(params)
    assert intermediates.layers["layer"].inputs.shape == (2, 6)
    loco.check_intermediates(params, grads, intermediates)


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

    capture, params = capture_of(Model())
    _, grads, intermediates = capture(params)
    tx = loco.locoprop_momentum()
    updates, _ = tx.update(grads, tx.init(params), params, intermediates=intermediates)
    (update,) = jax.tree.leaves(updates)
    assert bool(jnp.all(jnp.isfinite(update)))
    assert float(jnp.max(jnp.abs(update[-1]))) == 0


def test_nnx_arguments_that_hold_state():
    class Teacher(nnx.Module):
        def __init__(self):
            self.norm = nnx.BatchNorm(6, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.norm(x)

    def loss_fn(model, teacher, x, rngs):
        noise = jax.random.normal(rngs.noise(), x.shape)
        return jnp.mean((model(x + noise) - teacher(x)) ** 2)

    results = []
    for value_and_grad in (nnx.value_and_grad, loco.nnx.value_and_grad):
        model, teacher = nnx.Linear(6, 6, rngs=nnx.Rngs(1)), Teacher()
        rngs = nnx.Rngs(noise=2)
        loss, grads, *_ = value_and_grad(loss_fn)(model, teacher, X, rngs)
        states = nnx.state(teacher), nnx.state(rngs, nnx.RngCount)
        results.append((loss, nnx.as_pure(grads), *map(nnx.as_pure, states)))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_boxed_parameters():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    model = nn.Sequential([nn.Dense(3, kernel_init=init), nn.tanh])
    capture, params = capture_of(model)
    _, grads, intermediates = capture(params)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    loco.check_intermediates(params, grads, intermediates)
    tx = loco.locoprop_momentum()
    updates, _ = tx.update(grads, tx.init(params), params, intermediates=intermediates)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
