"""Packed rows: where their segments are, and factors that each segment applies to its own tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .adapter import Adjustment, Factors

EXACT = jax.lax.Precision.HIGHEST


class Segments(NamedTuple):
    """Where the examples are in packed rows."""

    segment: jax.Array
    """int32 [rows, T]: each token's segment; -1 is padding"""
    start: jax.Array
    """int32 [rows, segments]: the index of each segment's first token"""

    @property
    def position(self) -> Int[Array, "rows T"]:
        """Each token's position within its segment."""
        start = jnp.take_along_axis(self.start, jnp.maximum(self.segment, 0), axis=1)
        return jnp.arange(self.segment.shape[1]) - jnp.where(self.segment < 0, 0, start)


def adjust_segments(adjustment: Adjustment, segment: Int[Array, "rows length"]) -> Callable:
    """adjust(site, x, y) over packed rows.

    Args:
        adjustment: Factors whose arrays are [rows, segments, out].
        segment: each token's segment; a token without one (-1) is not changed.

    Raises ValueError for adjustments that are not Factors.
    """
    if not isinstance(adjustment, Factors):
        raise ValueError(f"packed rows need Factors; {type(adjustment).__name__} can't be applied segment by segment")

    def adjust(site: str, x: Float[Array, "rows length in"], y: Float[Array, "rows length out"]):
        return scaled(y, adjustment.distance[site], segment) if site in adjustment.distance else y

    return adjust


@jax.custom_vjp
def scaled(
    y: Float[Array, "rows length out"], distance: Float[Array, "rows segments out"], segment: Int[Array, "rows length"]
) -> Float[Array, "rows length out"]:
    """y + y * (l - 1) with each token's own l; adapter.scaled does the same for a single l.

    The backward pass keeps y and each segment's factors. It recomputes the factors of each token, which would take as
    much memory as y itself."""
    return y + y * spread(distance.astype(y.dtype), segment)


def scaled_forwards(y, distance, segment):
    return scaled(y, distance, segment), (y, distance, segment)


def scaled_backwards(kept, gradient):
    y, distance, segment = kept
    chosen = chosen_segments(segment, distance.shape[1], jnp.float32)
    product = gradient.astype(jnp.float32) * y.astype(jnp.float32)  # as in adapter.scaled
    summed = jnp.einsum("bts,bto->bso", chosen, product, precision=EXACT)
    gradient, summed = jax.lax.optimization_barrier((gradient, summed))  # as in adapter.scaled
    return scaled(gradient, distance, segment), summed.astype(distance.dtype), None


scaled.defvjp(scaled_forwards, scaled_backwards)


def spread(distance: Float[Array, "rows segments out"], segment: Int[Array, "rows length"]):
    """Each token's row of `distance`, zeros where it has no segment.

    A product with zeros and ones picks the row exactly, and its backward pass is a product too. That of indexing adds
    up token by token, on a GPU in an order that changes."""
    chosen = chosen_segments(segment, distance.shape[1], distance.dtype)
    return jnp.einsum("bts,bso->bto", chosen, distance, precision=EXACT)


def chosen_segments(segment: Int[Array, "rows length"], count: int, dtype) -> Float[Array, "rows length segments"]:
    """1 where a token belongs to a segment, else 0."""
    return (segment[..., None] == jnp.arange(count)).astype(dtype)
