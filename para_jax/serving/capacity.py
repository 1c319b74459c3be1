"""The memory that an engine needs, as it reports when it is created."""

from __future__ import annotations

import os

import jax

from ..adapters.bank import AdapterBank
from ..backbone.cache import HELD
from ..model.adapted import DecodeState
from ..runtime.sharding import shard_sizes
from .prefills import token_bytes


def blocks_for(
    slots: int, size: int, kv_bytes: int | None, prefix_bytes: int | None, row: DecodeState, longest: int
) -> int:
    """How many blocks an engine has. Raises ValueError if a longest row does not fit.

    Args:
        size: tokens per block.
        kv_bytes, prefix_bytes: the engine's kv_cache_bytes and prefix_cache_bytes.
        row: the abstract state of one row.
        longest: blocks of the longest row.
    """
    each, prefixes = size * token_bytes(row) // devices_of_heads(row), slots * longest // 2
    if prefix_bytes is not None:
        prefixes = prefix_bytes // each
    wanted = (slots + 1) * longest + prefixes  # a row more, for a prompt that is prefilled while all slots decode
    most = default_bytes() if kv_bytes is None else kv_bytes
    if most is None:
        return wanted
    blocks = most // each - 1  # block 0 is no row's
    blocks = min(blocks, wanted) if kv_bytes is None else blocks
    if blocks <= longest:  # a row has a copy of its prompt's last block
        raise ValueError(
            f"kv_cache_bytes (--kv-cache-gb): {most} bytes are {most // each} blocks of {size} tokens; give at least "
            f"{(longest + 2) * each}, for one row of max_length, or lower max_length"
        )
    return blocks


def default_bytes() -> int | None:
    """The memory for keys and values, at most; None: unknown."""
    if jax.default_backend() != "cpu":
        free = free_memory()
        return None if free is None else int(0.9 * free)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    except (ValueError, OSError, AttributeError):  # not on this system
        return None


def capacity(bank: AdapterBank | None, row: DecodeState, slots: int, max_length: int, blocks: int, size: int) -> str:
    """The memory of the engine's keys and values and of what it decodes with, and the methods that may join.

    Args:
        row: the abstract state of one row.
        blocks: of keys and values.
        size: tokens per block.
    """
    devices, each = devices_of_heads(row), token_bytes(row) // devices_of_heads(row)
    adjustments = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(row.adjustments))
    text = f"engine: {slots} slots of up to {max_length} tokens; KV cache of {blocks} blocks of {size} tokens, "
    text += f"{blocks * size * each / 1e9:.2f} GB ({max_length * each / 1e6:.2f} MB for a longest row)"
    text += f"; adapters' adjustments {slots * adjustments / 1e9:.2f} GB"
    text += f"; on each of {devices} devices" if devices > 1 else ""
    free = free_memory()
    text += f"; {free / 1e9:.1f} GB are free" if free is not None else ""
    if bank is not None:
        text += f"; methods that may join: {', '.join(bank.methods)}"
    return text


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
