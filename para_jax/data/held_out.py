"""Rows of the training data that are held out as validation data (data.validation_split)."""

from __future__ import annotations

from collections.abc import Iterator

Row = tuple[str, dict]
"""a row's place and its columns"""

#: 2**32 divided by the golden ratio. Modulo 2**32 its multiples are spread evenly, however many there are (Knuth, The
#: Art of Computer Programming, volume 3, section 6.4).
GOLDEN = 2654435769


def part_of(rows: Iterator[Row], share: float, *, held_out: bool) -> Iterator[Row]:
    """The rows that are held out, or the others. A row's number alone decides. So sorted data is held out evenly, and
    rows that are added at the end change nothing before them."""
    return (row for number, row in enumerate(rows, 1) if is_held_out(number, share) == held_out)


def is_held_out(number: int, share: float) -> bool:
    """Whether a row is held out, by its number from 1. With a share of less than 0.6 the first one is not."""
    return number * GOLDEN % 2**32 < share * 2**32
