"""What an engine keeps on the device, as it says it when it is made."""

from __future__ import annotations

import os

import jax

from ..adapters.bank import AdapterBank
from ..backbone.kernel_choice import describe_decode
from ..model import DecodeState

#: Prefilled prompts that are kept for the next request with the same adapter and prompt.
KEPT = 4


def capacity(bank: AdapterBank | None, row: DecodeState, slots: int, max_length: int) -> str:
    """What the engine keeps on the device, how many slots like these fit into the memory that is free, and who may
    join.

    Args:
        row: the abstract state of one row.
    """
    a_row = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(row))
    text = f"engine: {slots} slots of {max_length} tokens and up to {KEPT} kept prompts, "
    text += f"{(slots + KEPT) * a_row / 1e9:.2f} GB ({a_row / 1e6:.2f} MB a row)"
    free = free_memory()
    if free is not None:
        fit = max(free // a_row - KEPT, 0)
        text += f"; {fit} such rows fit into the {free / 1e9:.1f} GB that are free, next to the kept prompts"
    text += f"; decode attention: {describe_decode(jax.default_backend())}"
    if bank is not None:
        text += f"; methods that may join: {', '.join(bank.methods)}"
    return text


def free_memory() -> int | None:
    """Bytes that are free on the first device, or of a CPU's main memory; None where neither is known."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not on this system
        return None
