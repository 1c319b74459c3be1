"""A hash of a backbone, so that what was computed with one model is never taken for another's."""

from __future__ import annotations

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from .transformer import Transformer


def backbone_content(model: Transformer) -> str:
    """A hash of a backbone's config, dtypes and weights. Each array is hashed on its device, without a copy."""
    sums = [(leaf.shape, str(leaf.dtype), int(bit_hash(leaf))) for leaf in jax.tree.leaves(model)]
    return hashlib.sha256(repr((model.config, model.layout, sums)).encode()).hexdigest()


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
