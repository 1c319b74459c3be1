"""Prompts that are prefilled in blocks, some blocks per round, so that decoding rows never wait for longer than that.
And the last prompts of any kind, which are kept for the next request.

Those in blocks are the prompts of the base model and of scope `response`. They run through the plain backbone, and
share the blocks in which they agree (prefix_cache.py). An adapter acts on the last tokens alone, the tail of its prompt
(prompt_blocks.py). One thread at a time may use this.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from ..adapters.bank import AdapterBank, Entry
from ..adapters.methods import has_plain_prompts
from ..adapters.scope import scope_of
from ..backbone.cache import constrain_held, empty_held
from ..backbone.transformer import Transformer
from ..model.adapted import DecodeState
from ..model.blocks import Lanes, Tails, prefill_blocks
from ..runtime.sharding import constrain, replicate
from .prefix_cache import PrefixCache, prompt_key
from .slots import PrefilledPrompt, zeros_of

#: Prompts of the longest length that the pool has blocks for, and how many prompts are kept for the next request of the
#: same one. If a chunk has blocks for more prompts, that many may be at work. Adapters act on ROWS at a time.
ROWS = 4


class PromptFailed(Exception):
    """A prompt could not be prefilled twice, each time alone."""

    def __init__(self, prompt: ChunkedPrompt, error: Exception):
        super().__init__(str(error))
        self.key, self.ids = prompt.key, prompt.ids


class WholePrompt(NamedTuple):
    """A prompt that was prefilled in one piece: its adapter changes the prompt's own states."""

    logits: jax.Array
    """float32 [1, vocab]"""
    row: DecodeState


class ChunkedPrompt:
    """A prompt in blocks."""

    def __init__(self, key: tuple, ids: Sequence[int], entry: Entry | None, row: int, block_keys: list[bytes]):
        self.key, self.ids, self.entry, self.block_keys = key, ids, entry, block_keys
        self.row = row
        """in the program of a chunk; once it is finished, in its logits"""
        self.blocks: list[int] = []
        """the pool's blocks of its first tokens: those that are computed, or found"""
        self.found = 0
        """tokens in blocks that were found"""
        self.made: tuple | None = None
        """(logits, adjustments), set when it is finished. The logits lead with ROWS rows, the adjustments with one"""

    @property
    def plain(self) -> int:
        """How many of its tokens run through the plain backbone. Its adapter takes the others, at least one."""
        return len(self.ids) - (0 if self.entry is None else min(scope_of(self.entry.config)[1], len(self.ids)))


class Prefills:
    """The prompts, and the pool of their blocks on the device."""

    def __init__(
        self,
        model: Transformer,
        bank: AdapterBank | None,
        row: DecodeState,
        *,
        size: int,
        longest: int,
        lanes: int,
        cached: int,
    ):
        """
        Args:
            row: the abstract state of one row.
            size: tokens per block.
            longest: blocks of the longest prompt.
            lanes: blocks that one program computes.
            cached: blocks beyond those of the prompts at work; 0: prompts share nothing.
        """
        self.bank, self.row, self.size, self.lanes, self.cached = bank, row, size, lanes, cached
        self._leaves, self._treedef = jax.tree.flatten(model)
        self._longest = longest
        self.rows = max(ROWS, lanes)
        """prompts at work, at most"""
        self._room = ROWS * longest
        """their blocks and those of kept prompts, at most"""
        self.cache = PrefixCache(self._room + cached, size, model.fingerprint or "", enabled=cached > 0)
        self.pins: dict[tuple[int, ...], list[bytes]] = {}
        """the keys of pinned prompts, by their ids"""
        self._working: dict[tuple, ChunkedPrompt] = {}
        """by Sample.key"""
        self._kept: OrderedDict[tuple, WholePrompt | ChunkedPrompt] = OrderedDict()
        """finished prompts by Sample.key, the most recently used last"""
        self._suspects: dict[tuple, int] = {}
        """prompts whose prefill raised: these run alone. The count is how often they raised alone"""
        self.reset()

    def reset(self) -> None:
        """Forgets all prompts and blocks. What an interrupt may have left halfway is made again."""
        self.pool = None
        self._working.clear()
        self._kept.clear()
        self.cache.clear()
        self.cache.pin(key for keys in self.pins.values() for key in keys)
        self._nothing = zeros_of(self.row.adjustments, 1)
        self.pool = jax.tree.map(self._empty, self.row.cache)

    def takes(self, entry: Entry | None) -> bool:
        """Whether the prompts of an adapter are prefilled in blocks."""
        return entry is None or has_plain_prompts(entry.config)

    def keeps(self, key: tuple) -> bool:
        """Whether the prompt of a key is finished, and kept."""
        return key in self._kept

    def kept(self, key: tuple) -> WholePrompt | ChunkedPrompt | None:
        """The kept prompt of a key, if there is one. It is the most recently used one from now on."""
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key]

    def keep_whole(self, key: tuple, prompt: WholePrompt) -> None:
        """Keeps a prompt that was prefilled in one piece."""
        self._kept[key] = prompt
        self.drop_old()

    def has_room(self, key: tuple, ids: Sequence[int]) -> bool:
        """Whether a prompt may start now, or has started."""
        return key in self._kept or key in self._working or self._fits(ids, self._working.values())

    def start(self, key: tuple, ids: Sequence[int], entry: Entry | None) -> None:
        """Gives a prompt a row, unless it has one. The least recently used kept prompts make room."""
        if key in self._working or key in self._kept:
            return
        while not self._fits(ids, [*self._working.values(), *self._kept_in_blocks()]):
            self._drop(next(self._kept_in_blocks()))
        row = min(set(range(self.rows)) - {prompt.row for prompt in self._working.values()})
        prompt = ChunkedPrompt(key, ids, entry, row, [])
        prompt.block_keys = self.cache.keys(ids[: prompt.plain], key[-1])
        self._working[key] = prompt
        self.cache.queries += len(ids)

    def keep(self, wanted: Collection[tuple]) -> None:
        """Drops prompts at work, unless they have one of these keys or are pinned. Starts pinned ones that lack a
        block."""
        pinned = {prompt_key(None, ids): ids for ids in self.pins}
        for prompt in list(self._working.values()):
            if prompt.key not in wanted and prompt.key not in pinned:
                self._drop(prompt)
        for key, ids in pinned.items():
            if not all(map(self.cache.knows, self.pins[ids])) and self._fits(ids, self._working.values()):
                held = self._kept.get(key)
                if isinstance(held, ChunkedPrompt):  # finished before it was pinned, and its blocks were given up since
                    self._drop(held)
                self.start(key, ids, None)

    @property
    def chunk(self) -> int:
        """Tokens that one program computes, with padding."""
        return self.lanes * self.size

    def advance(self) -> int:
        """Computes the next blocks of the prompts, in one program. Returns the tokens that this took, with padding.

        Raises PromptFailed, or what the program raised. Only `reset` may follow.
        """
        working = list(self._working.values())
        working = [prompt for prompt in working if prompt.key in self._suspects][:1] or working
        if not working:
            return 0
        try:
            finished = self._compute(working)
        except Exception as error:
            self._suspect(working, error)
            raise
        for prompt in finished:
            self._kept[prompt.key] = self._working.pop(prompt.key)
            self._suspects.pop(prompt.key, None)
        return self.chunk

    def for_slot(self, prompt: ChunkedPrompt) -> PrefilledPrompt:
        """A finished prompt, to be inserted into a slot."""
        assert prompt.made is not None
        return PrefilledPrompt(self._table(prompt), len(prompt.ids), prompt.row, *prompt.made)

    def _table(self, prompt: ChunkedPrompt) -> np.ndarray:
        """The pool's blocks of a prompt, int32 [blocks of the longest prompt]."""
        table = np.zeros(self._longest, np.int32)
        table[: len(prompt.blocks)] = prompt.blocks
        return table

    def pin(self, pins: dict[tuple[int, ...], list[bytes]]) -> None:
        """Keeps the blocks of these prompts, and of no others: their ids, and the keys of their complete blocks."""
        if pins is self.pins:
            return
        self.pins = pins
        self.cache.pin(key for keys in self.pins.values() for key in keys)

    def warm_up(self) -> ChunkedPrompt:
        """Compiles the programs. Returns a finished prompt."""
        made = []
        for entry in (None, *filter(self.takes, self.bank.blanks() if self.bank is not None else ())):
            made.append(ChunkedPrompt((), [0], entry, 0, []))
            self._compute(made[-1:])
            self.cache.release(made[-1].blocks)
        return made[0]

    # ------------------------------------------------------------------------------------------------- the computation

    def _compute(self, working: list[ChunkedPrompt]) -> list[ChunkedPrompt]:
        """Computes the next blocks of the prompts. Returns the prompts that are then finished."""
        lanes, tails, adapted = self._planned(working)
        given: tuple = ()
        if adapted:
            assert self.bank is not None
            entries = [prompt.entry for prompt in adapted]
            given = self.bank.rows_of(entries + [None] * (ROWS - len(entries)), ROWS), tails
        self.pool, logits, adjustments = prefill_chunk(self._treedef, self._leaves, self.pool, lanes, *given)
        finished = [prompt for prompt in working if len(prompt.blocks) == self._blocks(prompt.ids)]
        for start in range(0, len(finished), ROWS):
            chosen = np.zeros(ROWS, np.int32)
            for place, prompt in enumerate(finished[start : start + ROWS]):
                chosen[place], prompt.row = prompt.row, place
            of_rows = take_rows(chosen, logits)
            for prompt in finished[start : start + ROWS]:
                own = one_row(adjustments, adapted.index(prompt)) if prompt.entry is not None else self._nothing
                prompt.made = of_rows, own
        return finished

    def _planned(self, working: list[ChunkedPrompt]) -> tuple[Lanes, Tails, list[ChunkedPrompt]]:
        """The next blocks of the prompts, which take turns, where their adapters act, and the prompts in which they do.
        Blocks that are known are not computed again, except a prompt's last one: its last token gives the logits."""
        lanes, tails, adapted, used, turns = self._no_lanes(), self._no_tails(), [], 0, True
        while turns and used < self.lanes:
            turns = False
            for prompt in working:
                self._find_blocks(prompt)
                number, plain = len(prompt.blocks), prompt.plain
                tokens = prompt.ids[number * self.size : (number + 1) * self.size]
                adapts = number * self.size + len(tokens) > plain
                if used == self.lanes or not tokens or (adapts and len({*adapted, prompt}) > ROWS):
                    continue
                turns = True
                prompt.blocks.append(self.cache.take())
                if number < len(prompt.block_keys):  # others may find it now: this program computes it
                    self.cache.publish(prompt.blocks[-1], prompt.block_keys[number])
                lanes.tokens[used, : len(tokens)] = tokens
                lanes.row[used], lanes.number[used], lanes.count[used] = prompt.row, number, len(tokens)
                lanes.last[prompt.row] = used * self.size + len(tokens) - 1
                if adapts:
                    adapted += [prompt] * (prompt not in adapted)
                    row = adapted.index(prompt)
                    tails.of_lane[used], tails.start[used] = row, plain
                    tails.lane[row], tails.count[row] = used, len(tokens)
                used += 1
        for prompt in working:
            lanes.table[prompt.row] = self._table(prompt)
        return lanes, tails, adapted

    def _find_blocks(self, prompt: ChunkedPrompt) -> None:
        while len(prompt.blocks) < self._blocks(prompt.ids) - 1 and len(prompt.blocks) < len(prompt.block_keys):
            found = self.cache.find(prompt.block_keys[len(prompt.blocks)])
            if found is None:
                return
            prompt.blocks.append(found)
            prompt.found += self.size
            self.cache.hits += self.size

    def _no_lanes(self) -> Lanes:
        row, number, count = (np.zeros(self.lanes, np.int32) for _ in range(3))
        tokens, table = np.zeros((self.lanes, self.size), np.int32), np.zeros((self.rows, self._longest), np.int32)
        return Lanes(tokens, row, number, count, table, np.zeros(self.rows, np.int32))

    def _no_tails(self) -> Tails:
        start, lane = (np.zeros(count, np.int32) for count in (self.lanes, ROWS))
        return Tails(np.full(self.lanes, -1, np.int32), start, lane, np.ones(ROWS, np.int32))

    # ------------------------------------------------------------------------------------------------------ the prompts

    def _blocks(self, ids: Sequence[int]) -> int:
        return -(-len(ids) // self.size)

    def _fits(self, ids: Sequence[int], others: Iterable[ChunkedPrompt]) -> bool:
        """Whether there are a row and blocks for one more prompt next to these."""
        blocks = [self._blocks(one.ids) for one in others]
        return len(blocks) < self.rows and sum(blocks) + self._blocks(ids) <= self._room

    def _kept_in_blocks(self) -> Iterator[ChunkedPrompt]:
        return (prompt for prompt in self._kept.values() if isinstance(prompt, ChunkedPrompt))

    def drop_old(self) -> None:
        """Drops kept prompts but the last ROWS. Those that samples wait for must be in their slots by then."""
        for key in list(self._kept)[:-ROWS]:
            prompt = self._kept[key]
            if isinstance(prompt, ChunkedPrompt):
                self._drop(prompt)
            else:
                del self._kept[key]

    def _drop(self, prompt: ChunkedPrompt) -> None:
        del (self._kept if prompt.made is not None else self._working)[prompt.key]
        self.cache.release(prompt.blocks)

    def _suspect(self, working: list[ChunkedPrompt], error: Exception) -> None:
        """Notes prompts whose program raised. Raises PromptFailed for one that was alone for the second time."""
        self._suspects = {key: count for key, count in self._suspects.items() if key in self._working}
        alone = len(working) == 1
        for prompt in working:
            self._suspects[prompt.key] = self._suspects.get(prompt.key, 0) + alone
            if self._suspects[prompt.key] == 2:
                del self._suspects[prompt.key]
                raise PromptFailed(prompt, error)

    def _empty(self, leaf) -> jax.Array:
        return empty_held((self.cache.blocks, leaf.shape[1], self.size, leaf.shape[3]), leaf.dtype)


def token_bytes(row: DecodeState) -> int:
    """Bytes of a token's keys and values in all layers.

    Args:
        row: the abstract state of one row.
    """
    return sum(leaf.shape[1] * leaf.shape[3] * leaf.dtype.itemsize for leaf in jax.tree.leaves(row.cache))


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill_chunk(treedef, leaves, pool, lanes: Lanes, adapters=None, tails: Tails | None = None):
    """prefill_blocks, with the adjustments as decode carries them. The model is passed flat; the given pool is
    donated."""
    model = jax.tree.unflatten(treedef, leaves)
    pool, logits, adjustments = prefill_blocks(model, pool, lanes, adapters, tails)
    logits = constrain(logits, (None, "vocab"))  # whole ones would gather the head's weights
    return constrain_held(pool), logits, replicate(jax.tree.map(lambda a: a.astype(model.dtype), adjustments))


@jax.jit
def take_rows(chosen, logits) -> jax.Array:
    return constrain(logits[chosen], (None, "vocab"))


@jax.jit
def one_row(adjustments: tuple, row) -> tuple:
    return replicate(jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, row, 1), adjustments))
