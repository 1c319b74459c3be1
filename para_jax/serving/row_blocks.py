"""The blocks of the rows that decode: each row's table, which grows with its answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .prefix_cache import PrefixCache
from .prompt_table import PromptTable


class RowBlocks:
    """The pool's blocks of each slot, in the order of its tokens. Blocks of whole prompts are shared."""

    def __init__(self, prompts: PromptTable, slots: int, longest: int):
        """
        Args:
            longest: blocks of the longest row.
        """
        self._prompts, self._longest = prompts, longest
        self._of: list[list[int]] = [[] for _ in range(slots)]

    @property
    def _cache(self) -> PrefixCache:
        return self._prompts.cache

    @property
    def used(self) -> int:
        """How many blocks the rows have. Any thread may ask."""
        return len({block for blocks in self._of for block in list(blocks)})

    def begin(self, slot: int, prompt: Sequence[int], tokens: int) -> tuple[int, int]:
        """Gives a slot the complete blocks of a prompt, and blocks of its own for its other tokens. Returns the
        prompt's incomplete block and the row's own one in its place; 0 where there is none.

        Args:
            prompt: the prompt's blocks; empty where it has none in the pool.
            tokens: of the prompt.
        """
        self.release(slot)
        whole = prompt[: tokens // self._cache.size]
        self._cache.share(whole)
        self._of[slot] = list(whole)
        self._take(slot, tokens)
        last = len(whole)
        return (prompt[last], self._of[slot][last]) if last < len(prompt) else (0, 0)

    def grow(self, slot: int, tokens: int) -> bool:
        """Makes room for this number of tokens of a row. Returns False if the pool has none."""
        if self._cache.blocks_of(tokens) - len(self._of[slot]) > self._prompts.room:
            return False
        self._take(slot, tokens)
        return True

    def fork(self, slots: Sequence[int], parents: Sequence[int]) -> list[tuple[int, int]]:
        """Each of these slots continues the row of the slot parents[i], which is one of them: it shares that row's
        blocks but the last one. That stays with one of its children; the others get the last blocks of rows without
        children, as copies. Returns each slot's block to copy and its copy; 0 where there is none."""
        held = {slot: self._of[slot] for slot in slots}
        free, taken, copies = [held[slot][-1] for slot in slots if slot not in parents], set(), []
        for slot, parent in zip(slots, parents, strict=True):
            *shared, last = held[parent]
            own = free.pop() if parent in taken else last
            taken.add(parent)
            self._cache.share(shared)
            self._of[slot] = [*shared, own]
            copies.append((last, own) if own != last else (0, 0))
        for blocks in held.values():
            self._cache.release(blocks[:-1])
        return copies

    def of_slot(self, slot: int) -> list[int]:
        """A slot's blocks."""
        return self._of[slot]

    def release(self, slot: int) -> None:
        """Takes a slot's blocks back."""
        self._cache.release(self._of[slot])
        self._of[slot] = []

    def table(self) -> np.ndarray:
        """int32 [slots, blocks of the longest row]; 0 from each row's end on."""
        table = np.zeros((len(self._of), self._longest), np.int32)
        for row, blocks in zip(table, self._of, strict=True):
            row[: len(blocks)] = blocks
        return table

    def of(self, slot: int) -> np.ndarray:
        """The row of the table."""
        return self.table()[slot]

    def _take(self, slot: int, tokens: int) -> None:
        missing = self._cache.blocks_of(tokens) - len(self._of[slot])
        self._of[slot] += [self._cache.take() for _ in range(missing)]
