"""The engine's compiled programs: a fixed number of slots, and one decode program for all of them.

A prompt is prefilled alone, in one of at most three padded lengths, and inserted into a slot. It overwrites the slot's
whole state, so nothing of the slot's last tenant is left. The sampling settings stay on the host and come with each
dispatch, so an ended row costs no sampling.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..inference.draw import RowSampling, row_keys, sample
from ..model import DecodeState, decode_step


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
    state = jax.tree.map(lambda leaf: jnp.zeros((slots, *leaf.shape[1:]), leaf.dtype), row)
    return Slots(state, jnp.zeros(slots, jnp.int32), jnp.zeros(slots, jnp.int32))


@partial(jax.jit, donate_argnums=0)
def insert(slots: Slots, slot, logits, row: DecodeState, sampling: RowSampling) -> tuple[Slots, jax.Array]:
    """The slots with a prefilled row in `slot`, and its first token [1]. The given slots are donated; the row is not,
    so it may be inserted again."""

    def put(held, new):
        room = [(0, 0), *((0, full - part) for full, part in zip(held.shape[1:], new.shape[1:], strict=True))]
        return jax.lax.dynamic_update_slice_in_dim(held, jnp.pad(new, room), slot, 0)

    token = drawn(logits, sampling, jnp.zeros(1, jnp.int32))
    return jax.tree.map(put, slots, Slots(row, token, jnp.ones(1, jnp.int32))), token


@partial(jax.jit, static_argnums=(0, 5), donate_argnums=2)
def steps(treedef, leaves, slots: Slots, sampling: RowSampling, live, count: int) -> tuple[Slots, jax.Array]:
    """Decodes `count` tokens in every slot, in one dispatch. Returns the slots and the tokens [count, slots]. The model
    is passed flat; the given slots are donated.

    Args:
        live: bool [slots]. The other slots start again at length 0, so the cache is read only up to the longest live
            row.
    """
    slots = slots._replace(state=slots.state._replace(length=jnp.where(live, slots.state.length, 0)))

    def one(slots: Slots, _):
        logits, state = decode_step(jax.tree.unflatten(treedef, leaves), slots.state, slots.token)
        token = drawn(logits, sampling, slots.position)
        return Slots(state, token, slots.position + 1), token  # pyright: ignore[reportArgumentType]

    return jax.lax.scan(one, slots, length=count)


def drawn(logits, sampling: RowSampling, position) -> jax.Array:
    """Each row's token at `position` of its answer, int32 [rows]."""
    keys = row_keys(jnp.asarray(sampling.seeds), position)
    return sample(logits, keys, sampling.temperature, sampling.top_k, sampling.top_p)
