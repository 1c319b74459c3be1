"""The next token of each row from its logits: greedy, or drawn at a temperature from the top-k, top-p tokens.

Every row has its own settings and its own random key, so what it draws does not depend on the rows beside it.
"""

from __future__ import annotations

import hashlib

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
    scaled = logits - logits.max(axis=-1, keepdims=True)
    scaled = scaled / jnp.where(temperature > 0, temperature, 1)[:, None]
    filtered = jnp.any((top_k > 0) | (top_p < 1))  # without it no row is sorted, which on a CPU is most of the time
    keep = jax.lax.cond(
        filtered, jax.vmap(likeliest), lambda scaled, *_: jnp.ones_like(scaled, bool), scaled, top_k, top_p
    )
    drawn = jax.vmap(jax.random.categorical)(keys, jnp.where(keep, scaled, -jnp.inf))
    return jnp.where(temperature > 0, drawn, greedy(logits)).astype(jnp.int32)


def greedy(logits: jax.Array) -> jax.Array:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def likeliest(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Which tokens of one row top_k and top_p leave, bool [vocab]; among equal logits the lower ids come first."""
    ranked = -jnp.sort(-logits)
    rank = jnp.arange(ranked.size)
    in_top_k = (rank < top_k) | (top_k == 0)
    probabilities = jax.nn.softmax(jnp.where(in_top_k, ranked, -jnp.inf))
    before = jnp.cumsum(probabilities) - probabilities
    count = jnp.sum(in_top_k & ((before < top_p) | (top_p >= 1)))
    least = ranked[jnp.maximum(count, 1) - 1]
    equal = logits == least
    room = jnp.maximum(count, 1) - jnp.sum(logits > least)
    return (logits > least) | (equal & (jnp.cumsum(equal) <= room))


def row_keys(seeds, position) -> jax.Array:
    """Each row's key for the token at `position` (int or [batch]; 0: the first new one), of seeds uint32 [batch]."""
    return jax.vmap(jax.random.fold_in)(jax.vmap(jax.random.key)(seeds), jnp.broadcast_to(position, seeds.shape))


def derived_seed(seed: int, *path: int | str) -> int:
    """A seed in [0, 2**32) for one of many draws under a common seed: equal for the same path, unrelated otherwise."""
    return int.from_bytes(hashlib.sha256(repr((seed, *path)).encode()).digest()[:4], "big")
