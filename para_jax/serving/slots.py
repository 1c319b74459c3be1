"""The engine's compiled programs: a fixed number of slots, and one decode program for all of them.

A prefilled prompt is inserted into a slot. It overwrites the slot's whole state, so nothing of the slot's last tenant
is left. The sampling settings stay on the host and come with each dispatch, so an ended row costs no sampling.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..backbone.block_pool import before, rows_of_blocks
from ..backbone.cache import constrain_held, empty_held
from ..inference.draw import RowSampling, row_keys, sample
from ..inference.logprobs import Logprobs, logprobs_of
from ..model.adapted import DecodeState, decode_several, decode_step
from ..model.blocks import Pool
from ..runtime.sharding import replicate, zeros


class Slots(NamedTuple):
    """All rows: the decode state, and each row's last token and number of tokens."""

    state: DecodeState
    token: jax.Array
    """int32 [slots]"""
    position: jax.Array
    """int32 [slots]"""


def empty_slots(row: DecodeState, slots: int) -> Slots:
    """Slots of zeros.

    Args:
        row: the abstract state of one row.
    """
    cache = jax.tree.map(lambda leaf: empty_held((slots, *leaf.shape[1:]), leaf.dtype), row.cache)
    count = jax.ShapeDtypeStruct((1,), jnp.int32)
    adjustments, length, token, position = zeros_of((row.adjustments, count, count, count), slots)
    return Slots(DecodeState(cache, adjustments, length), token, position)


def constrain_slots(slots: Slots) -> Slots:
    """The slots, sharded over the current mesh as empty ones are: keys and values by heads, and all else on every
    device. Each program ends with it, so that the next one is compiled for one sharding alone."""
    state, token, position = slots
    adjustments, length, token, position = replicate((state.adjustments, state.length, token, position))
    return Slots(DecodeState(constrain_held(state.cache), adjustments, length), token, position)


@partial(jax.jit, donate_argnums=0)
def insert(slots: Slots, slot, logits, row: DecodeState, sampling: RowSampling, allowed) -> tuple[Slots, jax.Array]:
    """The slots with a prefilled row in `slot`, and its first token [1]. The given slots are donated; the row is not,
    so it may be inserted again.

    Args:
        allowed: int32 [1, words], which tokens may be drawn, one bit each.
    """

    def put(held, new):
        room = [(0, 0), *((0, full - part) for full, part in zip(held.shape[1:], new.shape[1:], strict=True))]
        return jax.lax.dynamic_update_slice_in_dim(held, jnp.pad(new, room), slot, 0)

    token = drawn(logits, sampling, jnp.zeros(1, jnp.int32), allowed)
    return constrain_slots(jax.tree.map(put, slots, Slots(row, token, jnp.ones(1, jnp.int32)))), token


class PrefilledPrompt(NamedTuple):
    """A prompt with its blocks in a pool."""

    table: Any
    """int32 [T], the prompt's blocks"""
    length: int
    """tokens"""
    row: int
    """of the logits"""
    logits: jax.Array
    """float32 [rows, vocab], of its last token"""
    adjustments: tuple
    """per layer, as decode carries them, with one leading row"""


@partial(jax.jit, donate_argnums=0)
def insert_prompt(
    slots: Slots, slot, pool: Pool, prompt: PrefilledPrompt, sampling: RowSampling, allowed
) -> tuple[Slots, jax.Array]:
    """`insert` for a prompt with its blocks in a pool."""
    most = jax.tree.leaves(slots.state.cache)[0].shape[2]
    logits = jax.lax.dynamic_slice_in_dim(prompt.logits, prompt.row, 1)
    length = jnp.reshape(prompt.length, 1)

    def of_layer(pool):
        keys, values = rows_of_blocks(pool, prompt.table[None])
        inside = before(jnp.arange(keys.shape[2]), length)  # zero times NaN, from another prompt, would be NaN
        return tuple(jnp.where(inside, held, 0)[:, :, :most] for held in (keys, values))

    first = drawn(logits, sampling, jnp.zeros(1, jnp.int32), allowed)
    state = DecodeState(tuple(map(of_layer, pool)), prompt.adjustments, length)
    put = lambda held, new: jax.lax.dynamic_update_slice_in_dim(held, new.astype(held.dtype), slot, 0)  # noqa: E731
    return constrain_slots(jax.tree.map(put, slots, Slots(state, first, jnp.ones(1, jnp.int32)))), first


@partial(jax.jit, static_argnums=3)
def first_logprobs(logits, row, token, top: int) -> Logprobs:
    """The log-probabilities [1] of a prompt's first token [1], from logits [rows, vocab] in which the prompt has a
    row."""
    return logprobs_of(jax.lax.dynamic_slice_in_dim(logits, row, 1), token, top)


@partial(jax.jit, static_argnums=(0, 5, 6), donate_argnums=2)
def steps(
    treedef, leaves, slots: Slots, sampling: RowSampling, live, count: int, top: int | None, allowed=None
) -> tuple[Slots, tuple[jax.Array, Logprobs | None]]:
    """Decodes `count` tokens in every slot, in one dispatch. Returns the slots, and the tokens [count, slots] with
    their log-probabilities. The model is passed flat; the given slots are donated.

    Args:
        live: bool [slots]. The other slots take the length of the shortest live row, so the cache is read only from
            where that row's window begins to the end of the longest one.
        top: alternatives per token; None: no log-probabilities.
        allowed: int32 [slots, words], which tokens may be drawn, one bit each; then `count` is 1. None: all.
    """
    length = slots.state.length
    shortest = jnp.min(jnp.where(live, length, length.max())) * live.any()  # 0 if no row is live
    slots = slots._replace(state=slots.state._replace(length=jnp.where(live, length, shortest)))

    def one(slots: Slots, _):
        logits, state = decode_step(jax.tree.unflatten(treedef, leaves), slots.state, slots.token)
        token = drawn(logits, sampling, slots.position, allowed)
        logprobs = None if top is None else logprobs_of(logits, token, top)
        slots = Slots(state, token, slots.position + 1)  # pyright: ignore[reportArgumentType]
        return constrain_slots(slots), (token, logprobs)

    return jax.lax.scan(one, slots, length=count)


@partial(jax.jit, static_argnums=(0, 6), donate_argnums=2)
def verify(
    treedef, leaves, slots: Slots, sampling: RowSampling, live, drafts, top: int | None
) -> tuple[Slots, tuple[jax.Array, Logprobs | None, jax.Array]]:
    """One pass over the drafted tokens of every slot. Each row takes the drafted tokens that it draws itself, and one
    more: the tokens that `steps` would give. Returns the slots, the tokens [drafted + 1, slots] with their
    log-probabilities, and how many of them count, [slots]. The given slots are donated.

    Args:
        live: bool [slots]. No token of the other slots counts.
        top: as in `steps`.
        drafts: int32 [slots, drafted], `speculation.NOTHING` where a row has none.
    """
    state, position = slots.state, jnp.arange(drafts.shape[1] + 1)
    tokens = jnp.concatenate([slots.token[:, None], jnp.maximum(drafts, 0)], axis=1)
    logits, state = decode_several(jax.tree.unflatten(treedef, leaves), state, tokens)
    logits = logits.swapaxes(0, 1)  # [drafted + 1, slots, vocab]
    token = jax.lax.map(lambda at: drawn(at[0], sampling, slots.position + at[1]), (logits, position))
    logprobs = None if top is None else jax.lax.map(lambda at: logprobs_of(at[0], at[1], top), (logits, token))
    right = jnp.cumprod(token[:-1] == drafts.T, axis=0).sum(axis=0)
    count = jnp.where(live, right + 1, 0)
    last = jnp.take_along_axis(token, right[None], axis=0)[0]
    most = jax.tree.leaves(state.cache)[0].shape[2]
    state = state._replace(length=jnp.minimum(state.length + count, most))
    return constrain_slots(Slots(state, last, slots.position + count)), (token, logprobs, count)


def zeros_of(row, rows: int):
    """Zeros for several rows, on every device.

    Args:
        row: the shapes of one.
    """
    return jax.tree.map(lambda leaf: zeros((rows, *leaf.shape[1:]), leaf.dtype, (None,) * leaf.ndim), row)


def drawn(logits, sampling: RowSampling, position, allowed=None) -> jax.Array:
    """Each row's token at `position` of its answer, int32 [rows], of those that are allowed."""
    if allowed is not None:
        bits = (allowed[:, :, None] >> jnp.arange(32)) & 1
        logits = jnp.where(bits.reshape(len(bits), -1)[:, : logits.shape[1]] == 1, logits, -jnp.inf)
    keys = row_keys(jnp.asarray(sampling.seeds), position)  # so a restart draws the same tokens
    return sample(logits, keys, sampling.temperature, sampling.top_k, sampling.top_p)
