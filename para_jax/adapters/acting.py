"""How the adjustments of a batch act at the sites of a layer, in any Transformer that has the sites."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from .adapter import Adjustment, Shared
from .scope import Reach
from .segments import Segments, adjust_segments


def batched_adjust(adjustment: Adjustment | None, segments: Segments | None = None) -> Callable:
    """adjust(site, x, y) over a batch, from an adjustment whose arrays have a leading batch axis, or a Shared one."""
    if adjustment is None:
        return plain
    if isinstance(adjustment, Shared):
        return adjustment.adjust
    if segments is not None:
        return adjust_segments(adjustment, segments.segment)
    return lambda site, x, y: jax.vmap(lambda a, x, y: a.adjust(site, x, y))(adjustment, x, y)


def plain(site: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """The adjustment of the plain backbone."""
    return y


def acting(adjust: Callable, where: jax.Array | bool) -> Callable:
    """adjust(site, x, y) at the tokens where the adapter acts (True: all of them), and y as it is at the others."""
    if isinstance(where, bool):
        return adjust
    return lambda site, x, y: jnp.where(where[..., None], adjust(site, x, y), y)


def carried(adjustment, reach: Reach | None, dtype):
    """The adjustment in the compute dtype, as decode carries it: zeros for rows of scope `prompt`. In the
    teacher-forced pass `adjust` rounds to the same dtype just before it applies them, so that their gradients stay
    float32."""
    if reach is not None and any(scope == "prompt" for scope, _ in reach.scopes) and reach.decodes:
        adjustment = jax.tree.map(
            lambda a: jnp.where((reach.after > 0).reshape(-1, *[1] * (a.ndim - 1)), a, 0), adjustment
        )
    return jax.tree.map(lambda a: a.astype(dtype), adjustment)
