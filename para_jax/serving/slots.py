"""The engine's rows on the device: a fixed number of slots, one decode program for all of them.

A request's row is prefilled by itself, in one of at most three padded lengths, and inserted into a slot, whose whole
state it overwrites: nothing of the slot's last tenant is left. How the rows are sampled stays on the host and comes
with each dispatch, so that an ended row costs no sampling.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..inference.draw import sample
from ..inference.sampling import RowSampling, row_keys
from ..model import DecodeState, decode_step


class Slots(NamedTuple):
    """All rows: the decode state, and for each its last token and how many it has made."""

    state: DecodeState
    token: jax.Array
    """int32 [slots]"""
    position: jax.Array
    """int32 [slots]"""


def empty_slots(row: DecodeState, slots: int) -> Slots:
    """Slots of zeros, like the abstract state of one row."""
    state = jax.tree.map(lambda leaf: jnp.zeros((slots, *leaf.shape[1:]), leaf.dtype), row)
    return Slots(state, jnp.zeros(slots, jnp.int32), jnp.zeros(slots, jnp.int32))


@partial(jax.jit, donate_argnums=0)
def insert(slots: Slots, slot, logits, row: DecodeState, sampling: RowSampling) -> tuple[Slots, jax.Array]:
    """The slots with a prefilled row in place of what `slot` held, and its first token [1]. The given slots are
    donated; the row is not, and may be inserted again."""

    def put(held, new):
        room = [(0, 0), *((0, whole - part) for whole, part in zip(held.shape[1:], new.shape[1:], strict=True))]
        return jax.lax.dynamic_update_slice_in_dim(held, jnp.pad(new, room), slot, 0)

    token = drawn(logits, sampling, jnp.zeros(1, jnp.int32))
    return jax.tree.map(put, slots, Slots(row, token, jnp.ones(1, jnp.int32))), token


@partial(jax.jit, static_argnums=(0, 5), donate_argnums=2)
def steps(treedef, leaves, slots: Slots, sampling: RowSampling, live, count: int) -> tuple[Slots, jax.Array]:
    """Every slot `count` tokens further, in one dispatch, and the tokens [count, slots]; the model is passed flat, the
    given slots are donated.

    Args:
        live: bool [slots]. The others begin again at length 0, so that the cache is read up to the longest live row.
    """
    slots = slots._replace(state=slots.state._replace(length=jnp.where(live, slots.state.length, 0)))

    def one(slots: Slots, _):
        logits, state = decode_step(jax.tree.unflatten(treedef, leaves), slots.state, slots.token)
        token = drawn(logits, sampling, slots.position)
        return Slots(state, token, slots.position + 1), token  # pyright: ignore[reportArgumentType]

    return jax.lax.scan(one, slots, length=count)


def drawn(logits, sampling: RowSampling, position) -> jax.Array:
    """Each row's token at `position` of its completion, int32 [rows]."""
    keys = row_keys(jnp.asarray(sampling.seeds), position)
    return sample(logits, keys, sampling.temperature, sampling.top_k, sampling.top_p)
