"""The engine's compiled programs: a fixed number of slots, and one decode program for all of them.

A slot's row has its keys and values in blocks of the pool; each dispatch says which. A prefilled prompt that is
inserted overwrites the slot's whole state, so nothing of the slot's last tenant is left. The sampling settings stay on
the host and come with each dispatch, so an ended row costs no sampling. All programs donate the pool.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..backbone.cache import constrain_held
from ..inference.draw import RowSampling, only_allowed, row_keys, sample
from ..inference.logprobs import Logprobs, logprobs_of
from ..model.adapted import DecodeState
from ..model.blocks import Pool, decode_blocks
from ..runtime.sharding import replicate, zeros


class Slots(NamedTuple):
    """All rows, without their keys and values. Every array leads with the slots."""

    adjustments: tuple
    """per layer, as decode carries them"""
    length: jax.Array
    """int32: tokens in the pool"""
    token: jax.Array
    """int32: the last one, which is not in the pool yet"""
    position: jax.Array
    """int32: of the next one in its answer"""


def empty_slots(row: DecodeState, slots: int) -> Slots:
    """Slots of zeros.

    Args:
        row: the abstract state of one row.
    """
    count = jax.ShapeDtypeStruct((1,), jnp.int32)
    return Slots(*zeros_of((row.adjustments, count, count, count), slots))


def constrained(slots: Slots, pool: Pool) -> tuple[Slots, Pool]:
    """The slots on every device of the current mesh, and the pool split by heads, as empty ones are. Each program ends
    with it, so that the next one is compiled for one sharding alone."""
    return replicate(slots), constrain_held(pool)


@partial(jax.jit, donate_argnums=(0, 1))
def insert(
    slots: Slots, pool: Pool, slot, table, logits, row: DecodeState, sampling: RowSampling, allowed
) -> tuple[Slots, Pool, jax.Array]:
    """The slots with a prefilled row in `slot`, the pool with its keys and values, and its first token [1]. The row is
    not donated, so it may be inserted again.

    Args:
        table: int32 [T], the row's blocks; 0 from its end on.
        allowed: int32 [1, words], which tokens may be drawn, one bit each.
    """

    def put(pool, new):
        heads, size, width = pool.shape[1:]
        count = -(-new.shape[2] // size)
        parts = jnp.pad(new[0], ((0, 0), (0, count * size - new.shape[2]), (0, 0)))
        return pool.at[table[:count]].set(parts.reshape(heads, count, size, width).swapaxes(0, 1))

    pool = jax.tree.map(put, pool, row.cache)
    slots, first = begun(slots, slot, logits, row.adjustments, row.length, sampling, allowed)
    return *constrained(slots, pool), first


class PrefilledPrompt(NamedTuple):
    """A prompt with its blocks in the pool."""

    length: int
    """tokens"""
    row: int
    """of the logits"""
    logits: jax.Array
    """float32 [rows, vocab], of its last token"""
    adjustments: tuple
    """per layer, as decode carries them, with one leading row"""


@partial(jax.jit, donate_argnums=(0, 1))
def insert_prompt(
    slots: Slots, pool: Pool, slot, block, copy, prompt: PrefilledPrompt, sampling: RowSampling, allowed
) -> tuple[Slots, Pool, jax.Array]:
    """`insert` for a prompt with its blocks in the pool. The row shares them, but has a copy of an incomplete last one.

    Args:
        block, copy: that one, and where it is copied to; 0 where there is none.
    """
    pool = jax.tree.map(lambda held: held.at[copy].set(held[block]), pool)
    logits = jax.lax.dynamic_slice_in_dim(prompt.logits, prompt.row, 1)
    length = jnp.reshape(prompt.length, 1)
    slots, first = begun(slots, slot, logits, prompt.adjustments, length, sampling, allowed)
    return *constrained(slots, pool), first


@partial(jax.jit, donate_argnums=(0, 1))
def fork(slots: Slots, pool: Pool, tokens, block, copy) -> tuple[Slots, Pool]:
    """The slots with these last tokens, int32 [slots], -1 where a slot's own stays, and the pool with copies of blocks.

    Args:
        block, copy: int32 [slots], which blocks are copied to where; 0 where none is.
    """
    pool = jax.tree.map(lambda held: held.at[copy].set(held[block]), pool)
    return constrained(slots._replace(token=jnp.where(tokens < 0, slots.token, tokens)), pool)


def begun(slots: Slots, slot, logits, adjustments: tuple, length, sampling: RowSampling, allowed):
    """The slots with a row that has drawn its first token [1], and this token."""
    first = drawn(logits, sampling, jnp.zeros(1, jnp.int32), allowed)
    put = lambda held, new: jax.lax.dynamic_update_slice_in_dim(held, new.astype(held.dtype), slot, 0)  # noqa: E731
    return jax.tree.map(put, slots, Slots(adjustments, length, first, jnp.ones(1, jnp.int32))), first


@partial(jax.jit, static_argnums=3)
def first_logprobs(logits, row, token, top: int) -> Logprobs:
    """The log-probabilities [1] of a prompt's first token [1], from logits [rows, vocab] in which the prompt has a
    row."""
    return logprobs_of(jax.lax.dynamic_slice_in_dim(logits, row, 1), token, top)


@partial(jax.jit, static_argnums=(0, 7, 8), donate_argnums=(2, 3))
def steps(
    treedef, leaves, slots: Slots, pool: Pool, table, sampling: RowSampling, live, count: int, top: int | None,
    allowed=None,
) -> tuple[Slots, Pool, tuple[jax.Array, Logprobs | None]]:  # fmt: skip
    """Decodes `count` tokens in every slot, in one dispatch. Returns the slots, the pool, and the tokens [count, slots]
    with their log-probabilities. The model is passed flat.

    Args:
        table: int32 [slots, T], the blocks of each row; 0 from its end on.
        live: bool [slots]. The other slots take the length of the shortest live row, so the pool is read only from
            where that row's window begins to the end of the longest one.
        top: alternatives per token; None: no log-probabilities.
        allowed: int32 [slots, words], which tokens may be drawn, one bit each; then `count` is 1. None: all.
    """
    shortest = jnp.min(jnp.where(live, slots.length, slots.length.max())) * live.any()  # 0 if no row is live
    slots = slots._replace(length=jnp.where(live, slots.length, shortest))

    def one(state, _):
        slots, pool = state
        adjustments, length, token, position = slots
        model = jax.tree.unflatten(treedef, leaves)
        logits, pool = decode_blocks(model, pool, table, length, adjustments, token[:, None])
        token = drawn(logits[:, 0], sampling, position, allowed)
        logprobs = None if top is None else logprobs_of(logits[:, 0], token, top)
        return constrained(Slots(adjustments, length + 1, token, position + 1), pool), (token, logprobs)

    (slots, pool), new = jax.lax.scan(one, (slots, pool), length=count)
    return slots, pool, new


@partial(jax.jit, static_argnums=(0, 8), donate_argnums=(2, 3))
def verify(
    treedef, leaves, slots: Slots, pool: Pool, table, sampling: RowSampling, live, drafts, top: int | None
) -> tuple[Slots, Pool, tuple[jax.Array, Logprobs | None, jax.Array]]:
    """One pass over the drafted tokens of every slot. Each row takes the drafted tokens that it draws itself, and one
    more: the tokens that `steps` would give. Returns the slots, the pool, and the tokens [drafted + 1, slots] with
    their log-probabilities and how many of them count, [slots].

    Args:
        table, top: as in `steps`.
        live: bool [slots]. No token of the other slots counts.
        drafts: int32 [slots, drafted], `speculation.NOTHING` where a row has none.
    """
    adjustments, length, token, answered = slots
    position, length = jnp.arange(drafts.shape[1] + 1), jnp.where(live, length, 0)
    tokens = jnp.concatenate([token[:, None], jnp.maximum(drafts, 0)], axis=1)
    logits, pool = decode_blocks(jax.tree.unflatten(treedef, leaves), pool, table, length, adjustments, tokens)
    logits = logits.swapaxes(0, 1)  # [drafted + 1, slots, vocab]
    token = jax.lax.map(lambda at: drawn(at[0], sampling, answered + at[1]), (logits, position))
    logprobs = None if top is None else jax.lax.map(lambda at: logprobs_of(at[0], at[1], top), (logits, token))
    right = jnp.cumprod(token[:-1] == drafts.T, axis=0).sum(axis=0)
    count = jnp.where(live, right + 1, 0)
    last = jnp.take_along_axis(token, right[None], axis=0)[0]
    slots, pool = constrained(Slots(adjustments, length + count, last, answered + count), pool)
    return slots, pool, (token, logprobs, count)


def zeros_of(row, rows: int):
    """Zeros for several rows, on every device.

    Args:
        row: the shapes of one.
    """
    return jax.tree.map(lambda leaf: zeros((rows, *leaf.shape[1:]), leaf.dtype, (None,) * leaf.ndim), row)


def drawn(logits, sampling: RowSampling, position, allowed=None) -> jax.Array:
    """Each row's token at `position` of its answer, int32 [rows], of those that are allowed."""
    logits = only_allowed(logits, allowed)
    keys = row_keys(jnp.asarray(sampling.seeds), position)  # so a restart draws the same tokens
    return sample(logits, keys, sampling.temperature, sampling.top_k, sampling.top_p)
