"""A decoder-only transformer of characters in Linen, its blocks scanned and recomputed.

The parameters of all blocks are stacked; each block is a layer of its own to LocoProp
all the same. Embeddings and normalizations go to the fallback by themselves.
"""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import locoprop_optax as loco
from examples import _training

CONTEXT, DEPTH, HEADS = 64, 3, 4


class Block(nn.Module):
    """Causal attention and a perceptron, each with a way around it."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        """From features to features, in the form that `nn.scan` wants."""
        width = x.shape[-1]
        x = x + nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(x), mask=mask)
        h = nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x)))
        return x + nn.Dense(width)(h), None


class Transformer(nn.Module):
    """A stack of blocks between embeddings and the logits of the next character.

    Attributes:
      characters: the number of different characters.
      width: the number of features at each position.
    """

    characters: int
    width: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """From characters to the logits of the character after each."""
        x = nn.Embed(self.characters, self.width)(tokens)
        x = x + nn.Embed(CONTEXT, self.width)(jnp.arange(tokens.shape[-1]))
        stack = nn.scan(
            nn.remat(Block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=DEPTH,
        )
        x, _ = stack(name="stack")(x, nn.make_causal_mask(tokens))
        return nn.Dense(self.characters, name="logits")(nn.LayerNorm()(x))


def optimizers(
    steps: int, layers: loco.Layers
) -> dict[str, optax.GradientTransformation]:
    """AdamW with its best rate of those we tried, and LocoProp with nothing set."""
    return {
        "AdamW": optax.adamw(_training.warm_up_and_decay(1e-2, steps)),
        "LocoProp": loco.locoprop(layers),
    }


def next_character_loss(apply_fn, params, windows: jax.Array) -> jax.Array:
    """The cross-entropy of each character given those before it, in nats."""
    logits = apply_fn({"params": params}, windows[:, :-1])
    targets = windows[:, 1:]
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


@partial(jax.jit, static_argnames="layers")
def train_step(state, windows, layers: loco.Layers):
    """One step; AdamW has no use for the intermediates, and ignores them."""
    loss_fn = partial(next_character_loss, state.apply_fn)
    capture = loco.value_and_grad(loss_fn, layers)
    loss, grads, intermediates = capture(state.params, windows)
    state = state.apply_gradients(grads=grads, intermediates=intermediates)
    return state, {"loss": loss}


@jax.jit
def evaluate(state, windows):
    """The same loss."""
    return {"loss": next_character_loss(state.apply_fn, state.params, windows)}


def main(arguments: Sequence[str] | None = None) -> dict[str, _training.Outcome]:
    """Trains with each optimizer."""
    options = _training.parse(__doc__, arguments, steps=200, batch_size=64, width=64)
    data, characters = _training.text(options.data_dir, CONTEXT + 1)
    model = Transformer(characters, options.width)
    windows = data.train[0][:1]
    params = model.init(jax.random.key(0), windows[:, :-1])["params"]
    layers = loco.layers(partial(next_character_loss, model.apply))(params, windows)
    create = partial(loco.linen.TrainState.create, apply_fn=model.apply, params=params)
    made = optimizers(options.steps, layers)
    states = {name: create(tx=tx) for name, tx in made.items()}
    step = partial(train_step, layers=layers)
    return _training.compare(states, step, evaluate, data, options)


if __name__ == "__main__":
    main()
