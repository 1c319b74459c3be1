"""What evaluation asks of a model, as token ids and so without an adapter: the same question goes to many of them."""

from __future__ import annotations

import hashlib
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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
    stop_ids: tuple[int, ...] = ()
    """that end it too, beside the tokenizer's and the model's: a chat's end of a turn"""


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

#: Part of every key. Raise it when a change of para_jax changes the answers to the same questions.
ANSWERS_VERSION = 1


def key(asked: Asked, entry: Entry | None, backbone: str, writing: str) -> str:
    """What an answer depends on, hashed: the question, the adapter's content (never its name), the backbone's and the
    version of our answers; for a Generation also `writing_content`."""
    parts = [ANSWERS_VERSION, type(asked).__name__, asked, entry.content if entry else None, backbone]
    parts += [writing] if isinstance(asked, Generation) else []
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def writing_content(tokenizer, stop_ids: tuple[int, ...]) -> str:
    """A hash of what makes a text of tokens, and of the tokens that end it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # which a tokenizer in plain Python has not
    made = json.loads(backend.to_str()) if backend is not None else {"vocab": tokenizer.get_vocab()}
    made |= {"truncation": None, "padding": None}  # which are of its last call
    return hashlib.sha256(json.dumps([made, stop_ids]).encode()).hexdigest()


def backbone_content(model: Transformer) -> str:
    """A hash of a backbone's config, dtypes and weights, of which each array's bits are hashed: no copy is made."""
    sums = [(leaf.shape, str(leaf.dtype), int(bit_hash(leaf))) for leaf in jax.tree.leaves(model)]
    return hashlib.sha256(repr((model.config, model.layout, sums)).encode()).hexdigest()


@jax.jit
def bit_hash(array) -> jax.Array:
    """The sum of hashes of each element's bits and position, modulo 2**32: exact in any order of summing, and another
    one where elements change places. The hash is MurmurHash3's finalizer (Appleby 2011)."""
    whole = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    mixed = jax.lax.bitcast_convert_type(array, whole).astype(jnp.uint32)
    strides = np.cumprod([1, *array.shape[:0:-1]], dtype=np.uint32)[::-1] * np.uint32(0x9E3779B1)
    for axis in range(array.ndim):
        mixed += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * strides[axis]
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        mixed = (mixed ^ (mixed >> shift)) * np.uint32(factor)
    return jnp.sum(mixed, dtype=jnp.uint32)
