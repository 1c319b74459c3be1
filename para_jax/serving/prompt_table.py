"""Which prompts are at work, in what order, and which are kept for the next request of the same one. prefills.py
computes those in blocks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax

from ..adapters.bank import Entry
from ..adapters.scope import scope_of
from ..model.adapted import DecodeState
from .prefix_cache import PrefixCache

if TYPE_CHECKING:
    from .ticket import Sample

#: Prompts that are kept for the next request of the same one. Adapters act on ROWS at a time. At
#: least ROWS prompts may be at work.
ROWS = 4


class PromptFailed(Exception):
    """A prompt could not be prefilled twice, each time alone."""

    def __init__(self, prompt: ChunkedPrompt, error: Exception):
        super().__init__(str(error))
        self.key = prompt.key


class WholePrompt(NamedTuple):
    """A prompt that was prefilled in one piece: its adapter changes the prompt's own states."""

    logits: jax.Array
    """float32 [1, vocab]"""
    row: DecodeState


class ChunkedPrompt:
    """A prompt in blocks."""

    def __init__(self, key: tuple, ids: Sequence[int], entry: Entry | None, row: int):
        self.key, self.ids, self.entry = key, ids, entry
        self.row = row
        """in the program of a chunk"""
        self.block_keys: list[bytes] = []
        """of its complete plain blocks"""
        self.blocks: list[int] = []
        """the pool's blocks of its first tokens"""
        self.done = 0
        """tokens that are computed, or found"""
        self.found = 0
        """tokens in blocks that were found"""
        self.made: tuple | None = None
        """(its row of the logits, logits, adjustments), set when it is finished. The logits lead with ROWS rows, the
        adjustments with one"""

    @property
    def plain(self) -> int:
        """How many of its tokens run through the plain backbone. Its adapter takes the others, at least one."""
        return len(self.ids) - (0 if self.entry is None else min(scope_of(self.entry.config)[1], len(self.ids)))


class PromptTable:
    """The prompts at work, and those that are kept. Their blocks are the cache's."""

    def __init__(self, cache: PrefixCache, lanes: int):
        """
        Args:
            lanes: pieces of prompts that one program computes.
        """
        self.cache = cache
        self.rows = max(ROWS, lanes)  # else short prompts could not fill a chunk
        """prompts at work, at most"""
        self.working: dict[tuple, ChunkedPrompt] = {}
        """by Sample.key"""
        self.waiting: dict[int, Sample] = {}
        """by slot: samples that will decode there once their prompts are prefilled"""
        self.kept: OrderedDict[tuple, WholePrompt | ChunkedPrompt] = OrderedDict()
        """finished prompts by Sample.key, the most recently used last"""
        self._suspects: dict[tuple, int] = {}
        """prompts whose prefill raised: these run alone. The count is how often they raised alone"""

    def clear(self) -> None:
        self.working.clear()
        self.kept.clear()

    def find(self, key: tuple) -> WholePrompt | ChunkedPrompt | None:
        """The kept prompt of a key, if there is one. It is the most recently used one from now on."""
        if key in self.kept:
            self.kept.move_to_end(key)
        return self.kept.get(key)

    def keep_whole(self, key: tuple, prompt: WholePrompt) -> None:
        """Keeps a prompt that was prefilled in one piece."""
        self.kept[key] = prompt

    @property
    def room(self) -> int:
        """How many blocks can be taken, without those that the prompts at work will take, and one for each slot that
        waits: none of them ever waits for a block."""
        wanted = (self.cache.blocks_of(len(one.ids)) - len(one.blocks) for one in self.working.values())
        return self.cache.available - sum(wanted) - len(self.waiting)

    @property
    def has_row(self) -> bool:
        """Whether one more prompt can be at work."""
        return len(self.working) < self.rows

    def start(self, key: tuple, ids: Sequence[int], entry: Entry | None) -> None:
        """Gives a prompt a row, unless it has one. There must be room for it."""
        if key in self.working or key in self.kept:
            return
        row = min(set(range(self.rows)) - {prompt.row for prompt in self.working.values()})
        prompt = self.working[key] = ChunkedPrompt(key, ids, entry, row)
        prompt.block_keys = self.cache.keys(ids[: prompt.plain], key[-1])  # key[-1] is the salt
        self.cache.queries += len(ids)

    @property
    def wanted(self) -> set[tuple]:
        """The keys of the prompts that samples wait for."""
        return {sample.key for sample in self.waiting.values()}

    def keep_wanted(self) -> None:
        """Drops prompts at work that no sample waits for; one that has ended does not wait."""
        self.waiting = {slot: sample for slot, sample in self.waiting.items() if not sample.completion}
        for prompt in list(self.working.values()):
            if prompt.key not in self.wanted:
                self._drop(prompt)

    def turn(self) -> list[ChunkedPrompt]:
        """The prompts of the next program: all at work, but a suspect runs alone, so that an error says whose it is."""
        working = list(self.working.values())
        return [prompt for prompt in working if prompt.key in self._suspects][:1] or working

    def finish(self, prompts: Iterable[ChunkedPrompt]) -> None:
        """Keeps prompts that are complete."""
        for prompt in prompts:
            self.kept[prompt.key] = self.working.pop(prompt.key)
            self._suspects.pop(prompt.key, None)  # the error was of another prompt, or has passed

    def suspect(self, prompts: list[ChunkedPrompt], error: Exception) -> None:
        """Notes prompts whose program raised. Raises PromptFailed for one that was alone for the second time."""
        self._suspects = {key: count for key, count in self._suspects.items() if key in self.working}
        for prompt in prompts:
            self._suspects[prompt.key] = self._suspects.get(prompt.key, 0) + (len(prompts) == 1)
            if self._suspects[prompt.key] == 2:
                del self._suspects[prompt.key]  # a later request of the same prompt is tried again
                raise PromptFailed(prompt, error)

    def drop_kept(self, *, left: int = ROWS, but: tuple | None = None) -> bool:
        """Drops the least recently used kept prompt, unless only `left` are kept. Those that are wanted and the one of
        the key `but` stay. Returns whether one was dropped."""
        key = next((key for key in self.kept if key not in self.wanted | {but}), None)
        if key is None or len(self.kept) <= left:
            return False
        prompt = self.kept[key]
        if isinstance(prompt, ChunkedPrompt):
            self._drop(prompt)
        else:
            del self.kept[key]
        return True

    def _drop(self, prompt: ChunkedPrompt) -> None:
        del (self.kept if prompt.made is not None else self.working)[prompt.key]
        self.cache.release(prompt.blocks)
