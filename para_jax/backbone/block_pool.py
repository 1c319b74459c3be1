"""Keys and values in blocks, which rows share where they begin alike, and attention to them.

A layer's pool is a pair (keys after rotary, values), each [blocks, kv_heads, B, head_dim]: blocks of B tokens. A table
[tables, T] says which blocks hold a row's tokens, in their order. What lies behind a row's last token is arbitrary, and
never read. Block 0 is no row's: what no row may keep is written there.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .attention import within
from .cache_blocks import with_block, without_blocks
from .kernels import platform
from .layers import softcap

#: Tokens that attention reads at a time. A CPU keeps them in its caches.
CPU_SPAN, SPAN = 128, 512
#: Keys or values.
Held = Float[Array, "blocks k B e"]
LayerPool = tuple[Held, Held]


def attend_blocks(
    pool: LayerPool,
    table: Int[Array, "rows T"],
    start: Int[Array, " rows"],
    count: Int[Array, " rows"],
    window: int | None,
    *,
    aligned: bool,
) -> Callable:
    """Attention of t new tokens per row to the row's blocks up to each of them. Keeps the pool with the new tokens.
    They are written before anything is read, so a row may continue the text of another row.

    Args:
        start: the position of each row's first new token.
        count: real new tokens of each row. The others are written too, and not read.
        aligned: whether each start is a multiple of t, and t divides a block. Tokens are then written at once.
    """

    def attend(q, k, v, scale, cap):
        write = write_together if aligned else write_tokens
        keys, values = (write(held, table, start, count, new) for held, new in zip(pool, (k, v), strict=True))
        written = keys, values
        return values_in_spans(q, written, table, start, start + count, window, scale, cap), written

    return attend


def values_in_spans(
    q: Float[Array, "rows t h e"],
    pool: LayerPool,
    table: Int[Array, "rows T"],
    start: Int[Array, " rows"],
    end: Int[Array, " rows"],
    window: int | None,
    scale: float,
    cap: float | None,
) -> Float[Array, "rows t h e"]:
    """The mixed values of the rows' new tokens. Reads a span of blocks at a time, up to the end of the longest row.

    As in cache_blocks.py, a span without keys of a row leaves its values the same, bit for bit. So they depend neither
    on the other rows nor on what the pool held before.
    """
    rows, count, heads, width = q.shape
    kv_heads, size = pool[0].shape[1:3]
    blocks = max((CPU_SPAN if platform() == "cpu" else SPAN) // size, 1)
    span = blocks * size
    # At least two spans: XLA would move the reading of a single one out of the loop, where a CPU is slower.
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % blocks + blocks)))
    grouped = q.reshape(rows, count, kv_heads, heads // kv_heads, width)
    here = start[:, None] + jnp.arange(count)

    def step(number, so_far):
        keys, values = rows_of_blocks(pool, jax.lax.dynamic_slice_in_dim(table, number * blocks, blocks, axis=1))
        held = number * span + jnp.arange(span)
        values = jnp.where(before(held, end), values, 0)  # zero times NaN would be NaN
        distance = here[:, :, None] - held  # negative for tokens to come
        seen = ((distance >= 0) & within(distance, window) & (held < end[:, None, None]))[:, None, None]
        scores = jnp.einsum("btkge,bkse->bkgts", grouped, keys, preferred_element_type=jnp.float32)
        return with_block(so_far, softcap(scores * scale, cap), seen, values, "bkgts,bkse->bkgte")

    begin = without_blocks((rows, kv_heads, heads // kv_heads, count, width))
    # With a window, spans before that of the first token of any row are not read.
    first = (
        0 if window is None else jnp.maximum(jnp.min(jnp.where(end > start, start, end.max())) + 1 - window, 0) // span
    )
    _, weight, mixed = jax.lax.fori_loop(first, -(-end.max() // span), step, begin)
    mixed = mixed / jnp.where(weight > 0, weight, 1)[..., None]  # a row that is not used may see no key
    return mixed.astype(q.dtype).transpose(0, 3, 1, 2, 4).reshape(q.shape)


def write_together(
    held: Held,
    table: Int[Array, "rows T"],
    start: Int[Array, " rows"],
    count: Int[Array, " rows"],
    new: Float[Array, "rows t k e"],
) -> Held:
    """The pool with t tokens per row, which begin at a multiple of t. Block 0 gets those of a row without any."""
    size, together = held.shape[2], new.shape[1]
    block = jnp.where(count > 0, blocks_at(table, start[:, None], size)[:, 0], 0)
    parts = held.reshape(*held.shape[:2], size // together, together, held.shape[3])
    return parts.at[block, :, start % size // together].set(new.swapaxes(1, 2)).reshape(held.shape)


def write_tokens(
    held: Held,
    table: Int[Array, "rows T"],
    start: Int[Array, " rows"],
    count: Int[Array, " rows"],
    new: Float[Array, "rows t k e"],
) -> Held:
    """The pool with t tokens per row at any positions."""
    position = start[:, None] + jnp.arange(new.shape[1])
    block, offset = blocks_at(table, position, held.shape[2]), position % held.shape[2]
    # The choice depends on the platform that is compiled for: see cache.with_token.
    return jax.lax.platform_dependent(held, block, offset, new, cpu=by_head, default=by_token)


def by_token(held, block, offset, new):
    return held.at[block, :, offset].set(new)


def by_head(held, block, offset, new):
    return held.at[block[..., None], jnp.arange(held.shape[1]), offset[..., None]].set(new)


def blocks_at(table: Int[Array, "rows T"], position: Int[Array, "rows t"], size: int) -> Int[Array, "rows t"]:
    """The blocks in which positions lie; block 0 beyond the table."""
    number = position // size
    found = jnp.take_along_axis(table, jnp.minimum(number, table.shape[1] - 1), axis=1)
    return jnp.where(number < table.shape[1], found, 0)


def rows_of_blocks(pool: LayerPool, table: Int[Array, "rows T"]) -> tuple[jax.Array, jax.Array]:
    """The keys and values of rows, [rows, kv_heads, T * B, head_dim]."""

    def joined(held: Held) -> Float[Array, "rows k max e"]:
        blocks = held[table].swapaxes(1, 2)
        return blocks.reshape(*blocks.shape[:2], -1, blocks.shape[4])

    keys, values = map(joined, pool)
    return keys, values


def before(held: Int[Array, " max"], end: Int[Array, " rows"]) -> jax.Array:
    """Which positions are before each row's end, bool [rows, 1, max, 1]."""
    return (held < end[:, None])[:, None, :, None]
