"""A decoder-only transformer of characters in NNX, its blocks one after another.

Embeddings and normalizations go to LocoProp's fallback by themselves.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import locoprop_optax as loco
from examples import _training

CONTEXT, DEPTH, HEADS = 64, 3, 4


class Block(nnx.Module):
    """Causal attention and a perceptron, each with a way around it."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, width, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """From features to features."""
        x = x + self.attention(self.attention_norm(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class Transformer(nnx.Module):
    """A stack of blocks between embeddings and the logits of the next character."""

    def __init__(self, characters: int, width: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(characters, width, rngs=rngs)
        self.positions = nnx.Embed(CONTEXT, width, rngs=rngs)
        self.blocks = nnx.List(Block(width, rngs) for _ in range(DEPTH))
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.logits = nnx.Linear(width, characters, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """From characters to the logits of the character after each."""
        x = self.embed(tokens) + self.positions(jnp.arange(tokens.shape[-1]))
        mask = nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.logits(self.norm(x))


def optimizers(
    steps: int, layers: loco.Layers
) -> dict[str, optax.GradientTransformation]:
    """AdamW with the rate of `transformer_linen`, and LocoProp with nothing set."""
    return {
        "AdamW": optax.adamw(_training.warm_up_and_decay(1e-2, steps)),
        "LocoProp": loco.locoprop(layers),
    }


def loss_fn(model: Transformer, windows: jax.Array) -> jax.Array:
    """The cross-entropy of each character given those before it, in nats."""
    logits, targets = model(windows[:, :-1]), windows[:, 1:]
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


@partial(nnx.jit, static_argnames="layers")
def train_step(state, windows, layers: loco.Layers):
    """One step; AdamW has no use for the intermediates, and ignores them."""
    model, optimizer = state
    capture = loco.nnx.value_and_grad(loss_fn, layers)
    loss, grads, intermediates = capture(model, windows)
    optimizer.update(model, grads, intermediates=intermediates)
    return state, {"loss": loss}


@nnx.jit
def evaluate(state, windows):
    """The same loss."""
    model, _ = state
    return {"loss": loss_fn(model, windows)}


def start(characters: int, width: int, tx: optax.GradientTransformation):
    """A model, always with the same weights, and its optimizer."""
    model = Transformer(characters, width, nnx.Rngs(0))
    tx = optax.with_extra_args_support(tx)
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def main(arguments: Sequence[str] | None = None) -> dict[str, _training.Outcome]:
    """Trains with each optimizer."""
    options = _training.parse(__doc__, arguments, steps=200, batch_size=64, width=64)
    data, characters = _training.text(options.data_dir, CONTEXT + 1)
    model = Transformer(characters, options.width, nnx.Rngs(0))
    layers = loco.nnx.layers(loss_fn)(model, data.train[0][:1])
    states = {
        name: start(characters, options.width, tx)
        for name, tx in optimizers(options.steps, layers).items()
    }
    step = partial(train_step, layers=layers)
    return _training.compare(states, step, evaluate, data, options)


if __name__ == "__main__":
    main()
