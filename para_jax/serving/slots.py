"""The engine's rows on the device: a fixed number of slots, one decode program for all of them.

A request's row is prefilled by itself, in one of at most three padded lengths, and inserted into a slot, whose whole
state it overwrites: nothing of the slot's last tenant is left.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..inference.generate import Sampling
from ..inference.sampling import greedy, row_keys, sample
from ..model import DecodeState, decode_step


class Slots(NamedTuple):
    """All rows: the decode state, and for each its last token, how many it has made, and how the next is drawn."""

    state: DecodeState
    token: jax.Array
    """int32 [slots]"""
    position: jax.Array
    """int32 [slots]"""
    sampling: Sampling
    """[slots] each"""


def empty_slots(row: DecodeState, slots: int) -> Slots:
    """Slots of zeros, like the abstract state of one row."""
    state = jax.tree.map(lambda leaf: jnp.zeros((slots, *leaf.shape[1:]), leaf.dtype), row)
    return Slots(state, jnp.zeros(slots, jnp.int32), jnp.zeros(slots, jnp.int32), row_sampling(slots))


def row_sampling(slots: int, seed: int = 0, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0) -> Sampling:
    return Sampling(
        np.full(slots, seed % 2**32, np.uint32),
        np.full(slots, temperature, np.float32),
        np.full(slots, top_k, np.int32),
        np.full(slots, top_p, np.float32),
    )


@partial(jax.jit, donate_argnums=0)
def insert(slots: Slots, slot, logits, row: DecodeState, sampling: Sampling) -> tuple[Slots, jax.Array]:
    """The slots with a prefilled row in the place of what `slot` held, and its first token [1]. The given slots are
    donated; the row is not, and may be inserted again."""

    def put(held, new):
        room = [(0, 0), *((0, whole - part) for whole, part in zip(held.shape[1:], new.shape[1:], strict=True))]
        return jax.lax.dynamic_update_slice_in_dim(held, jnp.pad(new, room), slot, 0)

    token = draw(logits, sampling, jnp.zeros(1, jnp.int32))
    made = Slots(row, token, jnp.ones(1, jnp.int32), Sampling(*map(jnp.asarray, sampling)))
    return jax.tree.map(put, slots, made), token


@partial(jax.jit, static_argnums=(0, 3), donate_argnums=2)
def steps(treedef, leaves, slots: Slots, count: int) -> tuple[Slots, jax.Array]:
    """Every slot `count` tokens further, in one dispatch, and the tokens [count, slots]; the model is passed flat, the
    given slots are donated."""

    def one(slots: Slots, _):
        logits, state = decode_step(jax.tree.unflatten(treedef, leaves), slots.state, slots.token)
        token = draw(logits, slots.sampling, slots.position)
        return Slots(state, token, slots.position + 1, slots.sampling), token

    return jax.lax.scan(one, slots, length=count)


def draw(logits, sampling: Sampling, position) -> jax.Array:
    """Each row's token at `position` of its completion. Without a row that samples no random number is made."""

    def sampled(logits):
        return sample(logits, row_keys(sampling.seeds, position), sampling.temperature, sampling.top_k, sampling.top_p)

    return jax.lax.cond(jnp.any(jnp.asarray(sampling.temperature) > 0), sampled, greedy, logits)
