"""The KV cache: keys (after rotary) and values of one layer, [batch, kv_heads, max_length, head_dim], and attention
over it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .attention import mixed_values, within


def attend_within(mask: Bool[Array, "1 length length"]):
    """Attention of a whole sequence to itself; keeps its keys and values [batch, kv_heads, length, head_dim]."""

    def attend(q, k, v, scale, cap):
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        return mixed_values(q, k, v, mask, scale, cap), (k, v)

    return attend


def attend_cached(
    cache: tuple[Float[Array, "b k max e"], Float[Array, "b k max e"]], length: Int[Array, " b"], window: int | None
):
    """Attention of one new token a row, at position length[row], to the cache; keeps the cache with that token written.

    A row whose cache is full writes nothing.
    """
    rows = jnp.arange(length.shape[0])
    distance = length[:, None] - jnp.arange(cache[0].shape[2])
    mask = ((distance >= 0) & within(distance, window))[:, None, :]

    def attend(q, k, v, scale, cap):
        keys, values = (
            held.at[rows, :, length].set(new[:, 0], mode="drop") for held, new in zip(cache, (k, v), strict=True)
        )
        return mixed_values(q, keys, values, mask, scale, cap), (keys, values)

    return attend


def padded(kept: tuple[jax.Array, jax.Array], max_length: int) -> tuple[jax.Array, jax.Array]:
    """A sequence's keys and values with room for max_length tokens."""
    keys, values = (jnp.pad(x, ((0, 0), (0, 0), (0, max_length - x.shape[2]), (0, 0))) for x in kept)
    return keys, values
