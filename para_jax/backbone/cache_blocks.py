"""Attention of one new token per row to the cache, which reads only the blocks up to the longest row.

The number of blocks is known at run time, so one program serves all lengths. It is FlashAttention's online softmax
(arXiv:2205.14135, algorithm 1) over blocks of keys. A block without keys of a row leaves that row's values the same,
bit for bit: the maximum stays, and the sums are multiplied by one and increased by zero. A row's values therefore do
not depend on the length of other rows. Separate programs for several lengths would break this, because sums of 256 and
of 512 weights round differently.

Only TPUs use this. A CPU copies each block before multiplying it (2.4 times as slow when the cache is full), and a GPU
would ask the host before each block whether another follows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .attention import within
from .layers import softcap

#: The maximum number of blocks of a cache, and the minimum size of a block in tokens.
BLOCKS, SMALLEST = 8, 512
LANES = 128  # a block is a multiple of this
LOWEST = float(jnp.finfo(jnp.float32).min)


def block_size(max_length: int) -> int:
    """Tokens per block of a cache."""
    wanted = max(-(-max_length // BLOCKS), SMALLEST)
    return min(-(-wanted // LANES) * LANES, max_length)


def has_blocks(max_length: int) -> bool:
    """Whether a cache has more than one block."""
    return block_size(max_length) < max_length


def values_in_blocks(
    q: Float[Array, "b 1 h e"],
    keys: Float[Array, "*layers b k max e"],
    values: Float[Array, "*layers b k max e"],
    length: Int[Array, " b"],
    window: int | None,
    scale: float,
    cap: float | None,
    layer: Int[Array, ""] | None = None,
) -> Float[Array, "b 1 h e"]:
    """The mixed values of a new token at position length[row], like cache.whole_values."""
    batch, _, heads, width = q.shape
    kv_heads, max_length = keys.shape[-3:-1]
    size = block_size(max_length)
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, width)

    def step(block, so_far):
        start = jnp.minimum(block * size, max_length - size)  # the last block may overlap the one before it
        position = start + jnp.arange(size)
        distance = length[:, None] - position
        seen = (distance >= 0) & within(distance, window) & (position >= block * size)
        seen = seen[:, None, None, :]
        k, v = (block_of(held, layer, start, size) for held in (keys, values))
        scores = jnp.einsum("bkge,bkse->bkgs", grouped, k, preferred_element_type=jnp.float32)
        return with_block(so_far, softcap(scores * scale, cap), seen, v, "bkgs,bkse->bkge")

    first = (length.min() + 1 - window) // size if window is not None else 0
    stop = length.max() // size + 1  # the new token is in the last block
    first, stop = jnp.clip(jnp.stack([first, stop]), 0, -(-max_length // size))
    _, weight, mixed = jax.lax.fori_loop(first, stop, step, without_blocks(grouped.shape))
    return (mixed / weight[..., None]).astype(values.dtype).reshape(batch, 1, heads, width)


def without_blocks(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The online softmax before the first block: the highest score and the sum of the weights, [*shape[:-1]], and the
    mixed values, [*shape]."""
    zeros = jnp.zeros(shape[:-1], jnp.float32)
    return zeros + LOWEST, zeros, jnp.zeros(shape, jnp.float32)


def with_block(so_far: tuple, scores: jax.Array, seen: jax.Array, values: jax.Array, mixing: str) -> tuple:
    """The online softmax after one more block of keys.

    Args:
        scores: float32 [..., keys].
        seen: bool; the other keys count nothing.
        mixing: the einsum of weights and values.
    """
    highest, weight, mixed = so_far
    scores = jnp.where(seen, scores, LOWEST)
    higher = jnp.maximum(highest, scores.max(axis=-1))
    shrink = jnp.exp(highest - higher)
    weights = jnp.where(seen, jnp.exp(scores - higher[..., None]), 0)
    added = jnp.einsum(mixing, weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return higher, weight * shrink + weights.sum(axis=-1), mixed * shrink[..., None] + added


def block_of(held: jax.Array, layer: jax.Array | None, start: jax.Array, size: int) -> Float[Array, "b k size e"]:
    """The tokens [start:start + size] of a layer's cache."""
    if layer is None:
        return jax.lax.dynamic_slice_in_dim(held, start, size, axis=2)
    shape = (1, *held.shape[1:3], size, held.shape[4])  # one slice, because the first of two would copy the layer
    return jax.lax.dynamic_slice(held, (layer, 0, 0, start, 0), shape)[0]
