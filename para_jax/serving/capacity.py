"""The memory that an engine needs, as it reports when it is created."""

from __future__ import annotations

import os

import jax

from ..adapters.bank import AdapterBank
from ..backbone.cache import HELD
from ..backbone.kernel_choice import describe_decode
from ..model.adapted import DecodeState
from ..runtime.sharding import shard_sizes
from .prefills import token_bytes
from .prompt_table import ROWS


def capacity(
    bank: AdapterBank | None,
    row: DecodeState,
    slots: int,
    max_length: int,
    *,
    prompts: int,
    pool: int,
    cached: int,
) -> str:
    """The memory of the engine's slots and prompts, how many slots would fit into the free memory, and the methods that
    may join.

    Args:
        row: the abstract state of one row.
        prompts: how many are prefilled in blocks at the same time, at most.
        pool: tokens of prompts that are held in blocks.
        cached: how many of them are the prefix cache's.
    """
    devices, row_bytes = devices_of_heads(row), bytes_per_row(row, max_length)
    text = f"engine: {slots} slots of {max_length} tokens and up to {ROWS} kept prompts, "
    text += f"{(slots + ROWS) * row_bytes / 1e9:.2f} GB ({row_bytes / 1e6:.2f} MB per row)"
    text += f"; {prompts} prompts at work and a prefix cache of {cached} tokens, "
    text += f"{pool * token_bytes(row) / devices / 1e9:.2f} GB"
    text += f"; on each of {devices} devices" if devices > 1 else ""
    free = free_memory()
    if free is not None:
        fit = max(free // row_bytes - ROWS, 0)
        text += f"; {fit} such slots fit into the {free / 1e9:.1f} GB that are free, next to the kept prompts"
    text += f"; decode attention: {describe_decode(jax.default_backend())}"
    if bank is not None:
        text += f"; methods that may join: {', '.join(bank.methods)}"
    return text


def bytes_per_row(row: DecodeState, tokens: int) -> int:
    """Bytes of a row's adjustments, and of the keys and values of its tokens, on each device."""
    adjustments = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(row.adjustments))
    return adjustments + tokens * token_bytes(row) // devices_of_heads(row)


def devices_of_heads(row: DecodeState) -> int:
    """Over how many devices the current mesh splits keys and values."""
    shape = jax.tree.leaves(row.cache)[0].shape
    return shape[1] // shard_sizes(HELD, shape)[1]


def free_memory() -> int | None:
    """Free bytes of the first device, or of a CPU's main memory; None if unknown."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not on this system
        return None
