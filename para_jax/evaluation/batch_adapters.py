"""The adapters of a batch of questions: each row has its own, made from the row's context or from other tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..adapters.adapter import Adapter
from ..adapters.rows import Rows, Stack, pick
from ..data.batches import right_padded
from ..model.adapted import adjustments_for
from ..training.step import tenant_of
from .questions import Question
from .shapes import Shapes


class Bank(Protocol):
    """What evaluation needs of an AdapterBank. StackBank has the same for adapters that are on the device already."""

    @property
    def capacity(self) -> int: ...

    def entry(self, name: Any, /) -> Any: ...

    def rows_of(self, entries: list, places: int | None, /) -> Adapter | Rows: ...


class Slot(NamedTuple):
    """A tenant of a StackBank."""

    version: int
    """its index in the stack"""
    config: Any
    """the adapter's"""
    content: str | None = None
    """unknown: a journal can't keep this adapter's answers"""


class StackBank:
    """The adapters of a stack; tenants are named by their indices. A single adapter is a stack of one."""

    def __init__(self, stack: Stack):
        self.stack, self.capacity = stack, stack.size

    def entry(self, name: int, /) -> Slot:
        return Slot(name, self.stack.adapters.config)

    def rows_of(self, entries: list[Slot | None], places: int | None = None, /) -> Adapter | Rows:
        if self.stack.size == 1 and None not in entries:
            return tenant_of(self.stack.adapters, np.int32(0))  # one for the batch, without a copy for each row
        return pick(self.stack, np.array([-1 if entry is None else entry.version for entry in entries]))


def version(entry: Any) -> int:
    """A number that tells a bank's adapters apart; -1 is the base model."""
    return -1 if entry is None else entry.version


def adapters_of(model, bank: Bank | None, asked: Sequence[tuple[Any, Question]], shapes: Shapes):
    """The adapters of a batch, for `prefill` and the like; None without a bank.

    Args:
        asked: each row's entry of the bank (None: the base model) and its question. Either all questions name the
            tokens to read, or none does.
    """
    if bank is None:
        return None
    adapters = bank.rows_of([entry for entry, _ in asked], min(len(asked), bank.capacity))  # one program for all
    read = [question.reads for _, question in asked if question.reads is not None]
    if not read:
        return adapters
    tokens, lengths = right_padded(read, len(read), shapes.context(max(map(len, read))))
    return adjustments_for(model, adapters, tokens, lengths)
