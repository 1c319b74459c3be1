"""Rows of the training data that are held out as validation data (data.validation_split)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

Row = tuple[str, dict]
"""a row's place and its columns"""


def part_of(rows: Iterator[Row], share: float, *, held_out: bool) -> Iterator[Row]:
    """The rows that are held out, or the others. One row of every round(1 / share) is held out, whatever its content,
    so sorted data is held out evenly, and rows that are added at the end change nothing before them.

    Raises ValueError, once the rows are read, if there is none.
    """
    block, count, found = round(1 / share), -1, False
    for count, row in enumerate(rows):
        if (count % block == chosen_in(count // block, block)) == held_out:
            found = True
            yield row
    if not found and count >= 0:  # data without rows has an error of its own
        raise ValueError(
            f"data.validation_split {share:g} holds out one row of every {block}, and there are only {count + 1}; "
            "raise it (at most 0.5), or add rows"
        )


def chosen_in(number: int, size: int) -> int:
    """Which row of a block is held out. It differs from block to block, because data may repeat a pattern."""
    return int.from_bytes(hashlib.sha256(str(number).encode()).digest()[:8], "big") % size
