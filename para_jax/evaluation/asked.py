"""What evaluation asks of a model, as token ids and so without an adapter: the same question goes to many of them."""

from __future__ import annotations

import hashlib
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..adapters.bank import Entry
from ..backbone.transformer import Transformer


class Likelihood(NamedTuple):
    """How likely a continuation is after a context, from whose tokens alone an adapter makes its factors."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Generation(NamedTuple):
    """What is written after a context, up to an end token or a stop text."""

    context: tuple[int, ...]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    """0: greedy"""
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


Asked = Likelihood | Generation


class Scored(NamedTuple):
    """The answer to a Likelihood."""

    logprob: float
    """nats, summed over the continuation's tokens"""
    greedy: bool
    """whether greedy decoding would write the continuation"""


class Written(NamedTuple):
    """The answer to a Generation."""

    text: str
    tokens: int
    """that were made"""


Answer = Scored | Written


def key(asked: Asked, entry: Entry | None, backbone: str) -> str:
    """What an answer depends on, hashed: the question, the adapter's content (never its name) and the backbone's."""
    content = entry.content if entry else None
    return hashlib.sha256(json.dumps([type(asked).__name__, asked, content, backbone]).encode()).hexdigest()[:32]


def backbone_content(model: Transformer) -> str:
    """A hash of a backbone's config, dtypes and weights, of which each array's bits are summed: no copy is made."""
    sums = [(leaf.shape, str(leaf.dtype), int(bit_sum(leaf))) for leaf in jax.tree.leaves(model)]
    return hashlib.sha256(repr((model.config, model.layout, sums)).encode()).hexdigest()


@jax.jit
def bit_sum(array) -> jax.Array:
    """The sum of an array's bits read as whole numbers, modulo 2**32: exact in any order."""
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    return jnp.sum(jax.lax.bitcast_convert_type(array, bits), dtype=jnp.uint32)
