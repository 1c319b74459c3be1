"""The KV cache of one layer, and attention to it. It holds keys (after rotary) and values,
[batch, kv_heads, max_length, head_dim]."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..runtime.sharding import constrain, zeros
from .attention import mixed_values, within
from .cache_blocks import has_blocks, values_in_blocks

#: Names of the axes of keys or values, [rows or blocks, kv_heads, tokens, head_dim]: a mesh splits the heads.
HELD = None, "kv_heads", None, None


def empty_held(shape: tuple[int, ...], dtype) -> jax.Array:
    """Keys or values of zeros."""
    return zeros(shape, dtype, HELD)


def constrain_held(cache):
    """A tree of keys and values, split over the current mesh as those of `empty_held` are."""
    return jax.tree.map(lambda held: constrain(held, HELD), cache)


def attend_cached(
    cache: tuple[Float[Array, "*layers b k max e"], Float[Array, "*layers b k max e"]],
    length: Int[Array, " b"],
    window: int | None,
    layer: Int[Array, ""] | None = None,
):
    """Attention of one new token per row, at position length[row], to the cache. Keeps the cache with that token added.

    A row whose cache is full adds nothing. A TPU reads a cache of several blocks only up to its longest row; other
    devices read all of it (see cache_blocks.py).

    Args:
        layer: the layer's index, if the cache has a leading layer axis. The whole cache is then kept.
    """

    def attend(q, k, v, scale, cap):
        keys, values = (with_token(held, new[:, 0], length, layer) for held, new in zip(cache, (k, v), strict=True))
        reads = (values_in_blocks if has_blocks(keys.shape[-2]) else whole_values, whole_values)
        blocks, whole = (partial(read, window=window, scale=scale, cap=cap, layer=layer) for read in reads)
        mixed = jax.lax.platform_dependent(q, keys, values, length, tpu=blocks, default=whole)
        return mixed, (keys, values)

    return attend


def whole_values(
    q: Float[Array, "b t h e"],
    keys: Float[Array, "*layers b k max e"],
    values: Float[Array, "*layers b k max e"],
    length: Int[Array, " b"],
    window: int | None,
    scale: float,
    cap: float | None,
    layer: Int[Array, ""] | None = None,
) -> Float[Array, "b t h e"]:
    """The mixed values of new tokens from position length[row] on. Reads the whole cache, which holds them already."""
    if layer is not None:
        keys, values = keys[layer], values[layer]
    distance = (length[:, None] + jnp.arange(q.shape[1]))[:, :, None] - jnp.arange(keys.shape[2])
    mask = (distance >= 0) & within(distance, window)
    return mixed_values(q, [(keys, values)], mask, scale, cap)


def attend_prefix(
    cache: tuple[Float[Array, "b k max e"], Float[Array, "b k max e"]], length: Int[Array, " b"], window: int | None
):
    """Attention of several new tokens per row, from position length[row] on, to the cache and to each other. Keeps
    nothing."""

    def attend(q, k, v, scale, cap):
        held = jnp.arange(cache[0].shape[2])
        at = length[:, None] + jnp.arange(q.shape[1])  # positions of the new tokens
        position = jnp.concatenate([jnp.broadcast_to(held, (len(at), held.size)), at], axis=1)
        distance = at[:, :, None] - position[:, None, :]
        # Seen are the tokens that the row has in the cache, and the new ones.
        written = jnp.pad(held < length[:, None], ((0, 0), (0, q.shape[1])), constant_values=True)
        mask = written[:, None, :] & (distance >= 0) & within(distance, window)
        keys, values = (
            jnp.concatenate([old, new.swapaxes(1, 2)], axis=2) for old, new in zip(cache, (k, v), strict=True)
        )
        return mixed_values(q, [(keys, values)], mask, scale, cap), None

    return attend


def attend_both(prompt: tuple[Float[Array, "b k p e"], Float[Array, "b k p e"]], mask: Bool[Array, "b t s"]):
    """Attention of new tokens to keys and values of their prompt and to each other. Keeps the new ones.

    Args:
        mask: which keys each new token sees, those of the prompt first.
    """

    def attend(q, k, v, scale, cap):
        new = k.swapaxes(1, 2), v.swapaxes(1, 2)
        return mixed_values(q, [prompt, new], mask, scale, cap), new

    return attend


def with_token(
    cache: Float[Array, "*layers b k max e"],
    new: Float[Array, "b k e"],
    length: Int[Array, " b"],
    layer: Int[Array, ""] | None = None,
) -> Float[Array, "*layers b k max e"]:
    """The cache with each row's new token written at position length[row]. Nothing is written beyond max_length.

    The choice depends on the platform that is compiled for, so that a CPU can compile a program for a TPU.
    """
    if layer is not None:  # written by row, a TPU would change the layout of the whole cache and back in every layer
        return write_by_head(cache, new, length, layer)
    return jax.lax.platform_dependent(cache, new, length, cpu=write_by_head, default=write_by_row)


def write_by_row(cache, new, length):
    """One update per row. On a CPU, XLA turns a single row into a slice update, which copies the cache four times."""
    return cache.at[jnp.arange(len(cache)), :, length].set(new, mode="drop")


def write_by_head(cache, new, length, *layer):
    """One update per row and kv head. On a TPU, that multiplies the writes by the number of kv heads."""
    rows, heads = jnp.arange(len(new))[:, None], jnp.arange(new.shape[1])
    return cache.at[(*layer, rows, heads, length[:, None])].set(new, mode="drop")


def with_tokens(
    cache: Float[Array, "b k max e"], new: Float[Array, "b k t e"], position: Int[Array, "b t"]
) -> Float[Array, "b k max e"]:
    """The cache with new tokens at these positions. Nothing is written beyond max_length."""
    rows = jnp.arange(len(cache))[:, None]
    return cache.at[rows, :, position].set(new.swapaxes(1, 2), mode="drop")


def padded(kept: tuple[jax.Array, jax.Array], max_length: int) -> tuple[jax.Array, jax.Array]:
    """Keys and values, padded to max_length tokens."""
    keys, values = (jnp.pad(x, ((0, 0), (0, 0), (0, max_length - x.shape[2]), (0, 0))) for x in kept)
    return keys, values
