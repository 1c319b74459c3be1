"""A hash of a backbone, so that what was computed with one model is never taken for another's."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from .transformer import Transformer

#: Spreads neighbouring positions over all bits: 2**32 divided by the golden ratio.
FACTOR = 0x9E3779B1


def backbone_content(model: Transformer) -> str:
    """A hash of a backbone's config, dtypes and weights. Each array is hashed on its device."""
    return hashlib.sha256(repr((model.config, model.layout, weight_sums(model))).encode()).hexdigest()


def digests_of_run(model: Transformer) -> dict[str, str]:
    """What a checkpoint keeps of a backbone, by a name for errors: a hash of its config and one of its weights.

    The config's special tokens are left out, so a run may resume with other end tokens. The weights' name holds their
    dtype, and a resumed run compares only names that the checkpoint has too, so it may resume on devices with another
    default dtype."""
    config = replace(model.config, eos_token_ids=(), bos_token_id=None, pad_token_id=None)
    parts = {"backbone config": config, f"backbone in {model.dtype}": weight_sums(model)}
    return {name: hashlib.sha256(repr(part).encode()).hexdigest() for name, part in parts.items()}


def weight_sums(model: Transformer) -> list[tuple[tuple[int, ...], str, int]]:
    return [(leaf.shape, str(leaf.dtype), int(bit_hash(leaf))) for leaf in jax.tree.leaves(model)]


@jax.jit
def bit_hash(array) -> jax.Array:
    """The sum of hashes of each element's bits and position, modulo 2**32: exact in any order of summing, and different
    if elements change places. The hash is MurmurHash3's finalizer (Appleby 2011).

    A stack of layers is hashed one layer at a time, because a CPU makes a copy with 4 bytes per element."""
    if array.ndim < 3:
        return hash_from(array, jnp.uint32(0))
    stride = np.uint32(math.prod(array.shape[1:]) * FACTOR % 2**32)

    def add(total, part):
        index, layer = part
        return total + hash_from(layer, index * stride), None

    return jax.lax.scan(add, jnp.uint32(0), (jnp.arange(len(array), dtype=jnp.uint32), array))[0]


def hash_from(array, start) -> jax.Array:
    """`bit_hash` of a part of an array.

    Args:
        start: FACTOR times the position of the part's first element.
    """
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    mixed = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32) + start
    strides = np.cumprod([1, *array.shape[:0:-1]], dtype=np.uint32)[::-1] * np.uint32(FACTOR)
    for axis in range(array.ndim):
        mixed += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * strides[axis]
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        mixed = (mixed ^ (mixed >> shift)) * np.uint32(factor)
    return jnp.sum(mixed, dtype=jnp.uint32)
