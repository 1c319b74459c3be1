"""The KV cache: keys (after rotary) and values of one layer, [batch, kv_heads, max_length, head_dim], and attention
over it."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .attention import mixed_values, within
from .cache_blocks import has_blocks, values_in_blocks


def attend_cached(
    cache: tuple[Float[Array, "*layers b k max e"], Float[Array, "*layers b k max e"]],
    length: Int[Array, " b"],
    window: int | None,
    layer: Int[Array, ""] | None = None,
):
    """Attention of one new token a row, at position length[row], to the cache; keeps the cache with that token written.

    A row whose cache is full writes nothing. A TPU reads a cache of several blocks up to its longest row; other devices
    read all of it (see cache_blocks).

    Args:
        layer: which layer this is, where the cache leads with the layers; all of it is kept then.
    """

    def attend(q, k, v, scale, cap):
        keys, values = (written(held, new[:, 0], length, layer) for held, new in zip(cache, (k, v), strict=True))
        reads = (values_in_blocks if has_blocks(keys.shape[-2]) else whole_values, whole_values)
        blocks, whole = (partial(read, window=window, scale=scale, cap=cap, layer=layer) for read in reads)
        mixed = jax.lax.platform_dependent(q, keys, values, length, tpu=blocks, default=whole)
        return mixed, (keys, values)

    return attend


def whole_values(
    q: Float[Array, "b 1 h e"],
    keys: Float[Array, "*layers b k max e"],
    values: Float[Array, "*layers b k max e"],
    length: Int[Array, " b"],
    window: int | None,
    scale: float,
    cap: float | None,
    layer: Int[Array, ""] | None = None,
) -> Float[Array, "b 1 h e"]:
    """The mixed values of a new token at position length[row], from all of the cache."""
    if layer is not None:
        keys, values = keys[layer], values[layer]
    distance = length[:, None] - jnp.arange(keys.shape[2])
    mask = ((distance >= 0) & within(distance, window))[:, None, :]
    return mixed_values(q, keys, values, mask, scale, cap)


def attend_prefix(
    cache: tuple[Float[Array, "b k max e"], Float[Array, "b k max e"]], length: Int[Array, " b"], window: int | None
):
    """Attention of several new tokens a row, from position length[row] on, to the cache and to those before them; keeps
    nothing."""

    def attend(q, k, v, scale, cap):
        held = jnp.arange(cache[0].shape[2])
        at = length[:, None] + jnp.arange(q.shape[1])
        position = jnp.concatenate([jnp.broadcast_to(held, (len(at), held.size)), at], axis=1)
        distance = at[:, :, None] - position[:, None, :]
        written = jnp.pad(held < length[:, None], ((0, 0), (0, q.shape[1])), constant_values=True)
        mask = written[:, None, :] & (distance >= 0) & within(distance, window)
        keys, values = (
            jnp.concatenate([old, new.swapaxes(1, 2)], axis=2) for old, new in zip(cache, (k, v), strict=True)
        )
        return mixed_values(q, keys, values, mask, scale, cap), None

    return attend


def written(
    held: Float[Array, "*layers b k max e"],
    new: Float[Array, "b k e"],
    length: Int[Array, " b"],
    layer: Int[Array, ""] | None = None,
) -> Float[Array, "*layers b k max e"]:
    """`held` with a row's new token at position length[row]; nothing is written beyond max_length.

    The platform that is compiled for decides, so that a program for a TPU may be compiled on a CPU.
    """
    if layer is not None:  # by row, a TPU would bring the whole cache into another layout and back, at every layer
        return written_by_head(held, new, length, layer)
    return jax.lax.platform_dependent(held, new, length, cpu=written_by_head, default=written_by_row)


def written_by_row(held, new, length):
    """One update a row. A lone row's becomes a slice update, for which XLA copies the cache four times on a CPU."""
    return held.at[jnp.arange(len(held)), :, length].set(new, mode="drop")


def written_by_head(held, new, length, *layer):
    """One update a row and kv head, which on a TPU are as many times the writes."""
    rows, heads = jnp.arange(len(new))[:, None], jnp.arange(new.shape[1])
    return held.at[(*layer, rows, heads, length[:, None])].set(new, mode="drop")


def padded(kept: tuple[jax.Array, jax.Array], max_length: int) -> tuple[jax.Array, jax.Array]:
    """A sequence's keys and values with room for max_length tokens."""
    keys, values = (jnp.pad(x, ((0, 0), (0, 0), (0, max_length - x.shape[2]), (0, 0))) for x in kept)
    return keys, values
