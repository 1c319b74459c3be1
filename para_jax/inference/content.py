"""Hashes of what an answer depends on in addition to its request: the backbone, and how tokens become text. Jobs and
evaluation put them into the keys of kept answers, so that one model's answers are never taken for another's."""

from __future__ import annotations

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np

from ..backbone.transformer import Transformer

#: Part of every kept answer's key. Raise it when a change of para_jax changes the answers to the same questions.
ANSWERS_VERSION = 1


def backbone_content(model: Transformer) -> str:
    """A hash of a backbone's config, dtypes and weights. Each array is hashed on its device, without a copy."""
    sums = [(leaf.shape, str(leaf.dtype), int(bit_hash(leaf))) for leaf in jax.tree.leaves(model)]
    return hashlib.sha256(repr((model.config, model.layout, sums)).encode()).hexdigest()


def writing_content(tokenizer, stop_ids: tuple[int, ...]) -> str:
    """A hash of the tokenizer and of the tokens that end an answer. The chat template is not part of it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # a tokenizer written in plain Python lacks one
    made = json.loads(backend.to_str()) if backend is not None else {"vocab": tokenizer.get_vocab()}
    made |= {"truncation": None, "padding": None}  # left over from the last call
    special = sorted(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return hashlib.sha256(json.dumps([made, special, stop_ids]).encode()).hexdigest()


@jax.jit
def bit_hash(array) -> jax.Array:
    """The sum of hashes of each element's bits and position, modulo 2**32: exact in any order of summing, and different
    if elements change places. The hash is MurmurHash3's finalizer (Appleby 2011)."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    mixed = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    strides = np.cumprod([1, *array.shape[:0:-1]], dtype=np.uint32)[::-1] * np.uint32(0x9E3779B1)
    for axis in range(array.ndim):
        mixed += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * strides[axis]
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        mixed = (mixed ^ (mixed >> shift)) * np.uint32(factor)
    return jnp.sum(mixed, dtype=jnp.uint32)
