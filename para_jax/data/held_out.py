"""Rows of the training data that are held out as validation data (data.validation_split)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from fractions import Fraction
from math import ceil

Row = tuple[str, dict]
"""a row's place and its columns"""


def part_of(rows: Iterator[Row], share: float, *, held_out: bool) -> Iterator[Row]:
    """The rows that are held out, or the others. A row's number alone decides. So sorted data is held out evenly, and
    rows that are added at the end change nothing before them."""
    exact = Fraction(str(share))  # 0.1 is a tenth
    return (row for number, row in enumerate(rows) if is_validation_row(number, exact) == held_out)


def is_validation_row(number: int, share: Fraction) -> bool:
    """Whether a row is held out, by its number from 0. One row of each block of 1 / share rows is: a different one in
    each block, because data may repeat a pattern, and in the first block the last one, so that a few rows are all
    trained on."""
    block = int(number * share)
    start, end = ceil(block / share), ceil((block + 1) / share)
    drawn = int.from_bytes(hashlib.sha256(str(block).encode()).digest()[:8], "big")
    return number == (start + drawn % (end - start) if block else end - 1)
