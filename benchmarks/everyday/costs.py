"""The losses of the everyday problems, from outputs and the rest of a batch."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.networks import softmax_cross_entropy

CLIP = 0.2


def binary(logits: Any, labels: jax.Array) -> jax.Array:
    """The cross-entropy of yes and no, the mean over all labels."""
    return optax.sigmoid_binary_cross_entropy(logits, labels).mean()


def squared(outputs: Any, targets: jax.Array) -> jax.Array:
    """The squared error, summed over outputs and averaged over examples."""
    return jnp.mean(jnp.sum((outputs - targets) ** 2, axis=-1))


def pixelwise(logits: Any, images: jax.Array) -> jax.Array:
    """The cross-entropy of pixels, summed over an image, averaged over images."""
    losses = optax.sigmoid_binary_cross_entropy(logits, images)
    return jnp.mean(jnp.sum(losses, axis=(1, 2, 3)))


def evidence(outputs: Any, images: jax.Array) -> jax.Array:
    """A variational autoencoder's: the pixels', and the code's divergence."""
    logits, mean, log_variance = outputs
    spread = jnp.exp(log_variance) + mean**2 - 1 - log_variance
    return pixelwise(logits, images) + 0.5 * jnp.mean(jnp.sum(spread, axis=-1))


def proximal(logits: Any, actions: jax.Array, advantages: jax.Array) -> jax.Array:
    """PPO's clipped surrogate for an old policy that was uniform, taken from one."""
    chosen = _of_actions(jax.nn.log_softmax(logits), actions)
    ratio = jnp.exp(chosen + jnp.log(logits.shape[-1]))
    clipped = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
    return 1 - jnp.mean(jnp.minimum(ratio * advantages, clipped * advantages))


def temporal(values: Any, actions: jax.Array, targets: jax.Array) -> jax.Array:
    """The Huber loss of the values of the actions that were taken."""
    return jnp.mean(optax.huber_loss(_of_actions(values, actions), targets))


def _of_actions(values: jax.Array, actions: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values, actions[:, None], axis=-1)[:, 0]


def judged(values: Any) -> jax.Array:
    """How far the values of a policy's actions are below the largest, one."""
    return 1 - jnp.mean(values)


def contrastive(codes: Any) -> jax.Array:
    """InfoNCE: which of the second views belongs to each of the first."""
    first, second = codes[:, 0], codes[:, 1]
    logits = first @ second.T / 0.1
    return softmax_cross_entropy(logits, jnp.arange(len(logits)))


def quantiles(outputs: Any, targets: jax.Array) -> jax.Array:
    """The pinball loss of the lowest tenth, the median and the highest tenth."""
    levels, above = jnp.array([0.1, 0.5, 0.9]), targets - outputs
    return jnp.mean(jnp.sum(jnp.maximum(levels * above, (levels - 1) * above), -1))


def residuals(outputs: Any) -> jax.Array:
    """The squares of an equation's residuals and of what is wrong at the boundary."""
    inside, boundary = outputs
    return jnp.mean(inside**2) + 10 * jnp.mean(boundary**2)


def l2(params: Any) -> jax.Array:
    """What Flax's own ImageNet example adds: of all that is no vector."""
    leaves = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
    return 0.5 * 1e-4 * jnp.asarray(sum(jnp.sum(leaf**2) for leaf in leaves))
