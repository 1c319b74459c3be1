"""Packing: several examples in one row. Which ones share a row, and rows of them as arrays.

The rows are packed once, as a pure function of (seed, lengths), and permuted for every epoch: batch i is a pure
function of (seed, i, lengths), and every epoch holds each example once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .batches import epoch_bits, example_lengths, permutation, rounded_up
from .example_arrays import arrays_of
from .examples import Example

# Examples that are packed together: enough to fill the rows, few enough that millions are packed in minutes.
WINDOW = 4096


class Packed(NamedTuple):
    """Rows of several examples, called segments, one after another. Token 0 pads them on the right.

    A padding segment has prompt_length 1 and length 1, and no token.
    """

    tokens: np.ndarray
    """int32 [rows, T]"""
    segment: np.ndarray
    """int32 [rows, T]: each token's segment, 0 to segments - 1; -1 is padding"""
    start: np.ndarray
    """int32 [rows, segments]: the place of a segment's first token in its row"""
    prompt_length: np.ndarray
    """int32 [rows, segments]"""
    length: np.ndarray
    """int32 [rows, segments]: prompt and completion"""
    predicted: np.ndarray
    """int32 [rows, completion]: the places of the completions' tokens in the row; 0 is padding"""


class RowShape(NamedTuple):
    """The compiled shape of packed rows: tokens per row (T), and the maximum completion tokens and examples in one."""

    length: int
    completion: int
    segments: int
    prompt: int | None = None
    """the maximum prompt tokens in a row; None: as many as the row has"""


def common_shape(shapes: Iterable[RowShape]) -> RowShape:
    """The smallest shape that holds the rows of each."""
    return RowShape(*map(max, zip(*shapes, strict=True)))


class PackingPlan:
    """Which rows batch i holds, for every i from 0 on. Every process that asks gets the same answer."""

    def __init__(self, examples: Sequence[Example], *, length: int, rows: int, seed: int):
        self.packed = pack(example_lengths(examples), length, seed)
        self.rows, self.seed = rows, seed
        self.batches_per_epoch = -(-len(self.packed) // rows)
        sizes = arrays_of(examples).sizes
        prompt, completion = np.max([sizes[row].sum(axis=0) for row in self.packed], axis=0).tolist()
        self.shape = RowShape(length, completion, max(map(len, self.packed)), rounded_up(prompt))
        # two epochs, as in Plan
        self.order = lru_cache(2)(lambda epoch: permutation(epoch_bits(seed, epoch), len(self.packed)))

    def batch_indices(self, i: int) -> tuple[int, list[int]]:
        """Global batch i: the index of its shape, which is always 0, and those of its examples."""
        return 0, [index for row in self.batch_rows(i) for index in row]

    def batch_rows(self, i: int) -> list[list[int]]:
        """Global batch i: the indices of the examples of each of its rows (1 to `rows` of them)."""
        epoch, position = divmod(i, self.batches_per_epoch)
        rows = self.order(epoch)[position * self.rows : (position + 1) * self.rows]
        return [self.packed[row] for row in rows]


def plan_packing(examples: Sequence[Example], *, length: int, rows: int, seed: int) -> PackingPlan:
    """The order of training in packed rows of at least `length` tokens, `rows` of them a global batch."""
    return PackingPlan(examples, length=rounded_up(length), rows=rows, seed=seed)


def pack(lengths: Sequence[int], row_length: int, seed: int) -> list[list[int]]:
    """The examples' indices, in rows of at most `row_length` tokens: shuffled, cut into windows, and in each window the
    longest first into the first row that has room (at most 11/9 of the fewest rows that hold them)."""
    order = permutation(epoch_bits(seed), len(lengths))
    windows = (order[i : i + WINDOW] for i in range(0, len(order), WINDOW))
    return [row for window in windows for row in first_fit(window, np.asarray(lengths), row_length)]


def first_fit(indices: np.ndarray, lengths: np.ndarray, row_length: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room = np.zeros(len(indices), np.int64)
    for i in indices[np.argsort(-lengths[indices], kind="stable")].tolist():  # longest first
        fits = room[: len(rows)] >= lengths[i]
        row = int(fits.argmax()) if fits.any() else len(rows)  # argmax: the first row that has room
        if row == len(rows):
            rows.append([])
            room[row] = row_length
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


def collate_packed(packed: Sequence[Sequence[Example]], shape: RowShape, rows: int) -> Packed:
    """Rows of examples as one batch, filled up to `rows` rows."""
    assert len(packed) <= rows, (len(packed), rows)
    ones = lambda: np.ones((rows, shape.segments), np.int32)  # noqa: E731
    batch = Packed(
        tokens=np.zeros((rows, shape.length), np.int32),
        segment=np.full((rows, shape.length), -1, np.int32),
        start=np.zeros((rows, shape.segments), np.int32),
        prompt_length=ones(),
        length=ones(),
        predicted=np.zeros((rows, shape.completion), np.int32),
    )
    for row, examples in enumerate(packed):
        at, predicted = 0, []
        for i, (prompt, completion) in enumerate(examples):
            length = len(prompt) + len(completion)
            batch.tokens[row, at : at + length] = [*prompt, *completion]
            batch.segment[row, at : at + length] = i
            batch.start[row, i], batch.prompt_length[row, i], batch.length[row, i] = at, len(prompt), length
            predicted += range(at + len(prompt), at + length)
            at += length
        batch.predicted[row, : len(predicted)] = predicted
    return batch
