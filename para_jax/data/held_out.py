"""Rows of the training data that are held out as validation data (data.validation_split)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from fractions import Fraction
from itertools import count
from math import ceil
from typing import TypeVar

T = TypeVar("T")


def part_of(rows: Iterator[T], share: float, *, held_out: bool) -> Iterator[T]:
    """The rows that are held out, or the others. A row's number alone decides. So sorted data is
    held out evenly, and rows that are added at the end change nothing before them."""
    chosen = validation_rows(Fraction(str(share)))  # 0.1 is a tenth
    following = next(chosen)
    for number, row in enumerate(rows):
        is_chosen = number == following
        if is_chosen:
            following = next(chosen)
        if is_chosen == held_out:
            yield row


def validation_rows(share: Fraction) -> Iterator[int]:
    """The numbers of the rows that are held out, from 0: one of each block of 1 / share rows. Its place in the block
    changes from block to block, because data may repeat a pattern. In the first block it is the last row, so that a few
    rows are all trained on."""
    for block in count():
        start, end = ceil(block / share), ceil((block + 1) / share)
        drawn = int.from_bytes(hashlib.sha256(str(block).encode()).digest()[:8], "big")
        yield start + drawn % (end - start) if block else end - 1
