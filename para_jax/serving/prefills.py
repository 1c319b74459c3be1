"""Prompts that are prefilled in blocks, some blocks per round, so that decoding rows never wait for longer than that.

These are the prompts of the base model and of scope `response`: they run through the plain backbone, and share the
blocks in which they agree (prefix_cache.py). One thread at a time may use this.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..adapters.bank import AdapterBank, Entry
from ..adapters.methods import has_plain_prompts
from ..adapters.scope import scope_of
from ..backbone.cache import constrain_held, empty_held
from ..backbone.transformer import Transformer
from ..model import DecodeState
from ..prompt_blocks import Lanes, LastToken, Windows, adapt_window, adjustments_of, prefill_blocks
from ..sharding import constrain, replicate
from .prefix_cache import PrefixCache, prompt_key
from .slots import PrefilledPrompt, zeros_of

#: Prompts of the longest length that the pool has blocks for, and how many are kept for the next request of the same
#: prompt. If a chunk has blocks for more prompts, that many may be at work. Adapters are applied to ROWS at a time.
ROWS = 4


class PromptFailed(Exception):
    """A prompt could not be prefilled twice, each time alone."""

    def __init__(self, prompt: ChunkedPrompt, error: Exception):
        super().__init__(str(error))
        self.key, self.ids = prompt.key, prompt.ids


class ChunkedPrompt:
    """A prompt in one of the rows."""

    def __init__(self, key: tuple, ids: Sequence[int], entry: Entry | None, row: int, block_keys: list[bytes]):
        self.key, self.ids, self.entry, self.block_keys = key, ids, entry, block_keys
        self.row = row
        """in the program of a chunk; once it is finished, in `made`"""
        self.blocks: list[int] = []
        """the pool's blocks of its first tokens: those that are computed, or found"""
        self.found = 0
        """tokens in blocks that were found"""
        self.made: tuple | None = None
        """(logits, adjustments, keys and values of its last tokens but one), set when it is finished. The logits lead
        with ROWS rows, the others with one"""

    @property
    def adapted(self) -> int:
        """How many tokens before its last one its adapter changes."""
        return 0 if self.entry is None else min(scope_of(self.entry.config)[1], len(self.ids)) - 1


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
        """their blocks, at most"""
        self.cache = PrefixCache(self._room + cached, size, model.fingerprint or "", enabled=cached > 0)
        self.pins: dict[tuple[int, ...], list[bytes]] = {}
        """the keys of pinned prompts, by their ids"""
        self._prompts: OrderedDict[tuple, ChunkedPrompt] = OrderedDict()
        """by Sample.key, the most recently used last"""
        self._suspects: dict[tuple, int] = {}
        """prompts whose prefill raised: these run alone. The count is how often they raised alone"""
        self.window = 1
        """tokens of prompts that run again before decoding, at most"""
        self._grow_window(bank.configs if bank is not None else [])
        self.reset()

    def reset(self) -> None:
        """Forgets all prompts and blocks. What an interrupt may have left halfway is made again."""
        self.pool = None
        self._prompts.clear()
        self.cache.clear()
        self.cache.pin(key for keys in self.pins.values() for key in keys)
        self._nothing = self._of_no_adapter()
        self.pool = jax.tree.map(self._empty, self.row.cache)

    def takes(self, entry: Entry | None) -> bool:
        """Whether the prompts of an adapter are prefilled here."""
        return entry is None or has_plain_prompts(entry.config)

    def has_finished(self, key: tuple) -> bool:
        """Whether the prompt of a key is prefilled."""
        return key in self._prompts and self._prompts[key].made is not None

    def finished(self, key: tuple) -> ChunkedPrompt | None:
        """The prompt of a key, if it is prefilled. It is the most recently used one from now on."""
        if not self.has_finished(key):
            return None
        self._prompts.move_to_end(key)
        return self._prompts[key]

    def has_room(self, key: tuple, ids: Sequence[int]) -> bool:
        """Whether a prompt may start now, or has started."""
        working = [prompt for prompt in self._prompts.values() if prompt.made is None]
        return key in self._prompts or self._fits(working, ids)

    def start(self, key: tuple, ids: Sequence[int], entry: Entry | None) -> None:
        """Gives a prompt a row, unless it has one. The least recently used finished prompts make room."""
        if key in self._prompts:
            return
        if entry is not None:
            self._grow_window([entry.config])
        while not self._fits(self._prompts.values(), ids):
            self._drop(next(prompt for prompt in self._prompts.values() if prompt.made is not None))
        row = min(set(range(self.rows)) - {prompt.row for prompt in self._prompts.values() if prompt.made is None})
        self._prompts[key] = ChunkedPrompt(key, ids, entry, row, self.cache.keys(ids, key[-1]))
        self.cache.queries += len(ids)

    def keep(self, wanted: Collection[tuple]) -> None:
        """Drops prompts that are not finished, unless they have one of these keys or are pinned, and finished ones but
        the last ROWS. Starts pinned ones that lack a block."""
        pinned = {prompt_key(None, ids): ids for ids in self.pins}
        for prompt in list(self._prompts.values()):
            if prompt.made is None and prompt.key not in wanted and prompt.key not in pinned:
                self._drop(prompt)
        for prompt in [prompt for prompt in self._prompts.values() if prompt.made is not None][:-ROWS]:
            self._drop(prompt)
        for key, ids in pinned.items():
            if not all(map(self.cache.knows, self.pins[ids])) and self.has_room(key, ids):
                held = self.finished(key)
                if held is not None:  # it was finished before it was pinned, and its blocks were given up since
                    self._drop(held)
                self.start(key, ids, None)

    @property
    def chunk(self) -> int:
        """Tokens that one program computes, with padding."""
        return self.lanes * self.size

    def advance(self) -> int:
        """Computes the next blocks of the prompts, in one program, and adapts those that are then complete. Returns the
        tokens that this took, with padding.

        Raises PromptFailed, or what the program raised. Only `reset` may follow.
        """
        working = [prompt for prompt in self._prompts.values() if prompt.made is None]
        working = [prompt for prompt in working if prompt.key in self._suspects][:1] or working
        if not working:
            return 0
        try:
            self._compute(working)
        except Exception as error:
            if not isinstance(error, SystemError):  # C code turns an interrupt into a SystemError
                self._suspect(working, error)
            raise
        for prompt in working:
            if prompt.made is not None:
                self._suspects.pop(prompt.key, None)
        return self.chunk

    def for_slot(self, prompt: ChunkedPrompt) -> PrefilledPrompt:
        """A finished prompt, to be inserted into a slot."""
        assert prompt.made is not None
        token = -1 if prompt.entry is None else prompt.ids[-1]
        return PrefilledPrompt(
            self._table(prompt), len(prompt.ids), prompt.row, *prompt.made, adapted=prompt.adapted, token=token
        )

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
        prompt = ChunkedPrompt((), [0], None, 0, [])
        self.pool, last = prefill_chunk(self._treedef, self._leaves, self.pool, self._no_lanes())
        logits, entered = take_rows(np.zeros(ROWS, np.int32), last.logits, last.entered)
        prompt.made = logits, *self._nothing
        for entry in filter(self.takes, self.bank.blanks() if self.bank is not None else ()):
            self._adapt([ChunkedPrompt((), [0, 0], entry, 0, [])], entered)
        return prompt

    # ------------------------------------------------------------------------------------------------- the computation

    def _compute(self, working: list[ChunkedPrompt]) -> None:
        lanes = self._planned(working)
        self.pool, last = prefill_chunk(self._treedef, self._leaves, self.pool, lanes)
        complete = [prompt for prompt in working if len(prompt.blocks) == self._needed(prompt.ids)]
        for start in range(0, len(complete), ROWS):
            self._finish(complete[start : start + ROWS], last)

    def _finish(self, prompts: list[ChunkedPrompt], last: LastToken) -> None:
        """Applies the adapters of at most ROWS prompts. All their blocks are computed."""
        chosen = np.zeros(ROWS, np.int32)
        for place, prompt in enumerate(prompts):
            chosen[place], prompt.row = prompt.row, place
        logits, entered = take_rows(chosen, last.logits, last.entered)
        adapted = self._adapt([prompt for prompt in prompts if prompt.entry is not None], entered)
        for prompt in prompts:
            prompt.made = logits, *adapted.get(prompt.row, self._nothing)

    def _planned(self, working: list[ChunkedPrompt]) -> Lanes:
        """The next blocks of the prompts, which take turns. Blocks that are known are not computed again, except a
        prompt's last one: its last token gives the logits."""
        lanes, used, turns = self._no_lanes(), 0, True
        while turns and used < self.lanes:
            turns = False
            for prompt in working:
                self._find_blocks(prompt)
                number = len(prompt.blocks)
                if used == self.lanes or number == self._needed(prompt.ids):
                    continue
                turns, tokens = True, prompt.ids[number * self.size : (number + 1) * self.size]
                prompt.blocks.append(self.cache.take())
                if number < len(prompt.block_keys):  # others may find it now: this program computes it
                    self.cache.publish(prompt.blocks[-1], prompt.block_keys[number])
                lanes.tokens[used, : len(tokens)] = tokens
                lanes.row[used], lanes.number[used], lanes.count[used] = prompt.row, number, len(tokens)
                lanes.last[prompt.row] = used * self.size + len(tokens) - 1
                used += 1
        for prompt in working:
            lanes.table[prompt.row] = self._table(prompt)
        return lanes

    def _find_blocks(self, prompt: ChunkedPrompt) -> None:
        while len(prompt.blocks) < self._needed(prompt.ids) - 1:
            found = self.cache.find(prompt.block_keys[len(prompt.blocks)])
            if found is None:
                return
            prompt.blocks.append(found)
            prompt.found += self.size
            self.cache.hits += self.size

    def _adapt(self, prompts: list[ChunkedPrompt], entered: tuple) -> dict[int, tuple]:
        """(adjustments, keys and values of last tokens but one) of prompts with an adapter, both with one row, by the
        prompt's row. Windows of each size have a program of their own, so each costs and rounds as it does alone."""
        if not prompts:
            return {}
        assert self.bank is not None
        entries: list[Entry | None] = [None] * ROWS
        of_size: dict[int, list[ChunkedPrompt]] = {}
        for prompt in prompts:
            assert prompt.entry is not None
            entries[prompt.row] = prompt.entry
            of_size.setdefault(self._window_size(prompt.entry.config), []).append(prompt)
        adjustments, carried = make_adjustments(self.bank.rows_of(entries, ROWS), entered)
        made = {}
        for size, together in of_size.items():
            windows = self._run_windows(size, together, adjustments) if size else None
            for prompt in together:
                last = self._nothing[1] if windows is None else in_room(windows, prompt.row, self.window)
                made[prompt.row] = one_row(carried, prompt.row), last
        return made

    def _run_windows(self, size: int, prompts: list[ChunkedPrompt], adjustments: tuple) -> tuple:
        """Runs the windows of these prompts, which all have this size, without the prompts' last tokens. Returns the
        windows' keys and values, in the prompts' rows."""
        tokens, table = np.zeros((ROWS, size), np.int32), np.zeros((ROWS, self._longest), np.int32)
        length, adapted = np.zeros(ROWS, np.int32), np.zeros(ROWS, np.int32)
        for prompt in prompts:
            row, last = prompt.row, prompt.ids[:-1][-size:]
            tokens[row, size - len(last) :], table[row] = last, self._table(prompt)
            length[row], adapted[row] = len(prompt.ids) - 1, prompt.adapted
        windows = Windows(tokens, table, length, adapted)
        return run_windows(self._treedef, self._leaves, self.pool, adjustments, windows)

    def _no_lanes(self) -> Lanes:
        row, number, count = (np.zeros(self.lanes, np.int32) for _ in range(3))
        tokens, table = np.zeros((self.lanes, self.size), np.int32), np.zeros((self.rows, self._longest), np.int32)
        return Lanes(tokens, row, number, count, table, np.zeros(self.rows, np.int32))

    # ------------------------------------------------------------------------------------------------------ the prompts

    def _needed(self, ids: Sequence[int]) -> int:
        """Blocks of a prompt."""
        return -(-len(ids) // self.size)

    def _fits(self, others: Collection[ChunkedPrompt], ids: Sequence[int]) -> bool:
        """Whether there are a row and blocks for one more prompt next to these."""
        blocks = sum(self._needed(one.ids) for one in others)
        return len(others) < self.rows and blocks + self._needed(ids) <= self._room

    def _drop(self, prompt: ChunkedPrompt) -> None:
        del self._prompts[prompt.key]
        self.cache.release(prompt.blocks)

    def _suspect(self, working: list[ChunkedPrompt], error: Exception) -> None:
        """Notes prompts whose program raised. Raises PromptFailed for one that was alone for the second time."""
        keys = {prompt.key for prompt in self._prompts.values()}
        self._suspects = {key: count for key, count in self._suspects.items() if key in keys}
        alone = len(working) == 1
        for prompt in working:
            self._suspects[prompt.key] = self._suspects.get(prompt.key, 0) + alone
            if self._suspects[prompt.key] == 2:
                del self._suspects[prompt.key]
                raise PromptFailed(prompt, error)

    def _grow_window(self, configs: Iterable[Any]) -> None:
        """Makes room for the windows of adapters of these configs."""
        wanted = max((self._window_size(config) for config in configs if has_plain_prompts(config)), default=0)
        if wanted > self.window:
            for prompt in [prompt for prompt in self._prompts.values() if prompt.made is not None]:
                self._drop(prompt)
            self.window = wanted
            self._nothing = self._of_no_adapter()

    def _window_size(self, config: Any) -> int:
        """Tokens of an adapter's window without the last one, rounded up to a power of two, for fewer programs."""
        tokens = scope_of(config)[1] - 1
        return min(1 << (tokens - 1).bit_length(), self._longest * self.size) if tokens else 0

    def _of_no_adapter(self) -> tuple:
        """The adjustments, and the keys and values of last tokens, of prompts without an adapter: zeros."""
        shape = lambda leaf: (1, leaf.shape[1], self.window, leaf.shape[3])  # noqa: E731
        last = jax.tree.map(lambda leaf: empty_held(shape(leaf), leaf.dtype), self.row.cache)
        return zeros_of(self.row.adjustments, 1), last

    def _empty(self, leaf) -> jax.Array:
        return empty_held((self.cache.blocks, leaf.shape[1], self.size, leaf.shape[3]), leaf.dtype)


def token_bytes(row: DecodeState) -> int:
    """Bytes of a token's keys and values in all layers.

    Args:
        row: the abstract state of one row.
    """
    return sum(leaf.shape[1] * leaf.shape[3] * leaf.dtype.itemsize for leaf in jax.tree.leaves(row.cache))


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill_chunk(treedef, leaves, pool, lanes: Lanes):
    """The pool with the lanes' blocks, and what each row's last token leaves. The model is passed flat; the given pool
    is donated."""
    pool, last = prefill_blocks(jax.tree.unflatten(treedef, leaves), pool, lanes)
    logits = constrain(last.logits, (None, "vocab"))  # whole ones would gather the head's weights
    return constrain_held(pool), last._replace(logits=logits, entered=replicate(last.entered))


@jax.jit
def take_rows(chosen, logits, entered: tuple) -> tuple:
    """These rows of the logits, and of the streams that enter each layer."""
    return constrain(logits[chosen], (None, "vocab")), replicate(tuple(stream[chosen] for stream in entered))


@jax.jit
def make_adjustments(adapters, entered: tuple) -> tuple[tuple, tuple]:
    """The adjustments of prompts, per layer: in float32, and as decode carries them."""
    made, dtype = adjustments_of(adapters, entered), entered[0].dtype
    return replicate((made, jax.tree.map(lambda a: a.astype(dtype), made)))


@partial(jax.jit, static_argnums=0)
def run_windows(treedef, leaves, pool, adjustments: tuple, windows: Windows) -> tuple:
    """Keys and values of last tokens with their adapters. The model is passed flat."""
    return constrain_held(adapt_window(jax.tree.unflatten(treedef, leaves), pool, adjustments, windows))


@jax.jit
def one_row(adjustments: tuple, row) -> tuple:
    return replicate(jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, row, 1), adjustments))


@partial(jax.jit, static_argnums=2)
def in_room(last: tuple, row, room: int) -> tuple:
    """A row's keys and values of last tokens in the last of `room` places; zeros before them."""

    def places(part):
        padding = (0, 0), (0, 0), (room - part.shape[2], 0), (0, 0)
        return jnp.pad(jax.lax.dynamic_slice_in_dim(part, row, 1), padding)

    return constrain_held(jax.tree.map(places, last))
