"""Keys and values of prompts in blocks, so that prompts which begin alike share them, and attention to them.

A layer's pool is a pair (keys after rotary, values), each [blocks, kv_heads, B, head_dim]: blocks of B tokens. A table
[tables, T] says which blocks hold a prompt's tokens, in their order. What lies behind a prompt's last token is
arbitrary, and never read.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .attention import within
from .cache_blocks import with_block, without_blocks
from .layers import softcap

#: Tokens that attention reads at a time.
SPAN = 128
#: Keys or values.
Held = Float[Array, "blocks k B e"]
LayerPool = tuple[Held, Held]


def attend_blocks(
    pool: LayerPool,
    block: Int[Array, " lanes"],
    table: Int[Array, "lanes T"],
    start: Int[Array, " lanes"],
    count: Int[Array, " lanes"],
    window: int | None,
) -> Callable:
    """Attention of blocks of new tokens, one per lane, to their prompts up to each of them. Keeps the pool with the new
    blocks. They are written before anything is read, so a lane may continue the prompt of another lane.

    Args:
        block: where each lane's tokens are written; outside the pool for a lane that is not used.
        start: the position of each lane's first token.
        count: real tokens of each lane. The others are written too, and not read.
    """

    def attend(q, k, v, scale, cap):
        written = write_blocks(pool, block, (k.swapaxes(1, 2), v.swapaxes(1, 2)))
        return values_in_spans(q, written, table, start, start + count, window, scale, cap), written

    return attend


def values_in_spans(
    q: Float[Array, "lanes B h e"],
    pool: LayerPool,
    table: Int[Array, "lanes T"],
    start: Int[Array, " lanes"],
    end: Int[Array, " lanes"],
    window: int | None,
    scale: float,
    cap: float | None,
) -> Float[Array, "lanes B h e"]:
    """The mixed values of the lanes' tokens. Reads a span of blocks at a time, up to the end of the longest lane.

    As in cache_blocks.py, a span without keys of a lane leaves its values the same, bit for bit. So they depend neither
    on the other lanes nor on what the pool held before.
    """
    lanes, size, heads, width = q.shape
    kv_heads, blocks = pool[0].shape[1], max(SPAN // pool[0].shape[2], 1)
    span = blocks * pool[0].shape[2]
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % blocks)))
    grouped = q.reshape(lanes, size, kv_heads, heads // kv_heads, width)
    here = start[:, None] + jnp.arange(size)

    def step(number, so_far):
        keys, values = rows_of_blocks(pool, jax.lax.dynamic_slice_in_dim(table, number * blocks, blocks, axis=1))
        held = number * span + jnp.arange(span)
        values = jnp.where(before(held, end), values, 0)  # zero times NaN would be NaN
        distance = here[:, :, None] - held  # negative for tokens to come
        seen = ((distance >= 0) & within(distance, window) & (held < end[:, None, None]))[:, None, None]
        scores = jnp.einsum("btkge,bkse->bkgts", grouped, keys, preferred_element_type=jnp.float32)
        return with_block(so_far, softcap(scores * scale, cap), seen, values, "bkgts,bkse->bkgte")

    begin = without_blocks((lanes, kv_heads, heads // kv_heads, size, width))
    # With a window, spans before that of the first token of any lane are not read.
    first = (
        0 if window is None else jnp.maximum(jnp.min(jnp.where(end > start, start, end.max())) + 1 - window, 0) // span
    )
    _, weight, mixed = jax.lax.fori_loop(first, -(-end.max() // span), step, begin)
    mixed = mixed / jnp.where(weight > 0, weight, 1)[..., None]  # a lane that is not used may see no key
    return mixed.astype(q.dtype).transpose(0, 3, 1, 2, 4).reshape(q.shape)


def write_blocks(pool: LayerPool, block: Int[Array, " lanes"], new: tuple[jax.Array, jax.Array]) -> LayerPool:
    """The pool with new blocks [lanes, kv_heads, B, head_dim]. One outside the pool is not written."""
    keys, values = (held.at[block].set(part, mode="drop") for held, part in zip(pool, new, strict=True))
    return keys, values


def rows_of_blocks(pool: LayerPool, table: Int[Array, "rows T"]) -> tuple[jax.Array, jax.Array]:
    """The keys and values of prompts, [rows, kv_heads, T * B, head_dim]."""

    def joined(held: Held) -> Float[Array, "rows k max e"]:
        blocks = held[table].swapaxes(1, 2)
        return blocks.reshape(*blocks.shape[:2], -1, blocks.shape[4])

    keys, values = map(joined, pool)
    return keys, values


def before(held: Int[Array, " max"], end: Int[Array, " rows"]) -> jax.Array:
    """Which positions are before each row's end, bool [rows, 1, max, 1]."""
    return (held < end[:, None])[:, None, :, None]
