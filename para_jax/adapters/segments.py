"""Factors of packed rows: one set a segment, spread to its tokens where they are applied."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .adapter import Adjustment, Factors


def adjust_segments(adjustment: Adjustment, segment: Int[Array, "rows length"]) -> Callable:
    """adjust(site, x, y) over packed rows.

    Args:
        adjustment: Factors whose arrays are [rows, segments, out].
        segment: each token's segment; a token of none (-1) is left as it is.
    """
    if not isinstance(adjustment, Factors):
        raise ValueError(f"packed rows: {type(adjustment).__name__} differs from segment to segment; expected Factors")

    def adjust(site: str, x: Float[Array, "rows length in"], y: Float[Array, "rows length out"]):
        return scaled(y, adjustment.distance[site], segment) if site in adjustment.distance else y

    return adjust


@jax.checkpoint
def scaled(
    y: Float[Array, "rows length out"], distance: Float[Array, "rows segments out"], segment: Int[Array, "rows length"]
) -> Float[Array, "rows length out"]:
    """y + y * (l - 1) with each token's own l. For the backward pass y and the factors a segment are kept, and what is
    spread to the tokens is made anew: kept, it would be as large as y itself.

    The factors are spread by a product with zeros and ones, which picks them exactly: its backward pass is a product
    too, where that of an indexing adds up token by token, and on a GPU in an order that changes.
    """
    chosen = (segment[..., None] == jnp.arange(distance.shape[1])).astype(distance.dtype)
    spread = jnp.einsum("bts,bso->bto", chosen, distance, precision=jax.lax.Precision.HIGHEST)
    return y + y * spread
