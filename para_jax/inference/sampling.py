"""The next token of each row from its logits: greedy, or drawn at a temperature from the top-k, top-p tokens.

Every row has its own settings and its own random key, so what it draws does not depend on the rows beside it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def sample(logits: jax.Array, keys: jax.Array, temperature, top_k, top_p) -> jax.Array:
    """One token a row, int32 [batch], of logits float32 [batch, vocab].

    Args:
        keys: a random key a row, [batch] (`row_keys`).
        temperature: [batch]; 0 is greedy: the first of the largest logits.
        top_k: [batch]; only the k likeliest tokens can be drawn; 0: all of them.
        top_p: [batch]; only the likeliest tokens that together reach this probability can be drawn; 1: all of them.
            Its probabilities are those at the temperature, among the top k.
    """
    drawn = jax.vmap(draw)(logits, keys, temperature, top_k, top_p)
    return jnp.where(temperature > 0, drawn, greedy(logits)).astype(jnp.int32)


def greedy(logits: jax.Array) -> jax.Array:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def draw(logits: jax.Array, key: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """One row's token at a temperature above 0; among equal logits the lower ids come first."""
    order = jnp.argsort(-logits, stable=True)
    ranked = logits[order]
    ranked = (ranked - ranked[0]) / jnp.where(temperature > 0, temperature, 1)
    rank = jnp.arange(ranked.size)
    ranked = jnp.where((rank < top_k) | (top_k == 0), ranked, -jnp.inf)
    before = jnp.cumsum(jax.nn.softmax(ranked)) - jax.nn.softmax(ranked)
    kept = (before < top_p) | (top_p >= 1) | (rank == 0)
    return order[jax.random.categorical(key, jnp.where(kept, ranked, -jnp.inf))]


def row_keys(seeds: jax.Array, position) -> jax.Array:
    """Each row's key for the token at `position` (int or [batch]; 0: the first new one), of seeds uint32 [batch]."""
    return jax.vmap(jax.random.fold_in)(jax.vmap(jax.random.key)(seeds), jnp.broadcast_to(position, seeds.shape))
