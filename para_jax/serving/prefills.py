"""Prompts that are prefilled in blocks, some blocks per round, so that decoding rows never wait for longer than that.

They are the prompts of the base model and of scope `response`. They run through the plain backbone, and share the
blocks in which they agree (prefix_cache.py). An adapter acts on the last tokens alone, the tail of its prompt
(model/blocks.py). prompt_table.py says which prompts are at work. One thread at a time may use this.
"""

from __future__ import annotations

from functools import partial

import jax
import numpy as np

from ..adapters.bank import AdapterBank, Entry
from ..adapters.methods import has_plain_prompts
from ..backbone.cache import constrain_held, empty_held
from ..backbone.transformer import Transformer
from ..model.adapted import DecodeState
from ..model.blocks import Lanes, Tails, prefill_blocks
from ..runtime.sharding import constrain, replicate
from .prefix_cache import PrefixCache
from .prompt_table import ROWS, ChunkedPrompt, PromptTable
from .slots import PrefilledPrompt, zeros_of


class Prefills:
    """The pool of blocks on the device, and the programs that fill it."""

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
        self.cache = PrefixCache(ROWS * longest + cached, size, model.fingerprint or "", enabled=cached > 0)
        self.table = PromptTable(self.cache, longest, lanes)
        self.reset()

    def reset(self) -> None:
        """Forgets all prompts and blocks. What an interrupt may have left halfway is made again."""
        self.pool = None
        self.table.clear()
        self.cache.clear()
        self._nothing = zeros_of(self.row.adjustments, 1)  # what the base model decodes with
        self.pool = jax.tree.map(self._empty, self.row.cache)

    def takes(self, entry: Entry | None) -> bool:
        """Whether the prompts of an adapter are prefilled in blocks."""
        return entry is None or has_plain_prompts(entry.config)

    @property
    def chunk(self) -> int:
        """Tokens that one program computes, with padding."""
        return self.lanes * self.size

    def advance(self) -> int:
        """Computes the next blocks of the prompts, in one program. Returns the tokens that this took, with padding.

        Raises PromptFailed, or what the program raised. Only `reset` may follow: the program had donated the pool.
        """
        working = self.table.turn()
        if not working:
            return 0
        try:
            finished = self._compute(working)
        except Exception as error:
            self.table.suspect(working, error)  # the next rounds find out whose prompt it was
            raise
        self.table.finish(finished)
        return self.chunk

    def for_slot(self, prompt: ChunkedPrompt) -> PrefilledPrompt:
        """A finished prompt, to be inserted into a slot."""
        assert prompt.made is not None
        return PrefilledPrompt(self._block_table(prompt), len(prompt.ids), *prompt.made)

    def _block_table(self, prompt: ChunkedPrompt) -> np.ndarray:
        """The pool's blocks of a prompt, int32 [blocks of the longest prompt]."""
        table = np.zeros(self._longest, np.int32)
        table[: len(prompt.blocks)] = prompt.blocks
        return table

    def warm_up(self) -> ChunkedPrompt:
        """Compiles the programs. Returns a finished prompt."""
        made = []
        for entry in (None, *filter(self.takes, self.bank.blanks() if self.bank is not None else ())):
            made.append(ChunkedPrompt((), [0], entry, 0))  # one token takes the programs of any prompt
            self._compute(made[-1:])
            self.cache.release(made[-1].blocks)
        return made[0]

    def _compute(self, working: list[ChunkedPrompt]) -> list[ChunkedPrompt]:
        """Computes the next blocks of the prompts. Returns the prompts that are then finished."""
        lanes, tails, adapted = self._planned(working)
        given: tuple = ()
        if adapted:
            assert self.bank is not None
            entries = [prompt.entry for prompt in adapted]  # padded to ROWS, so that one program serves all
            given = self.bank.rows_of(entries + [None] * (ROWS - len(entries)), ROWS), tails
        self.pool, logits, adjustments = prefill_chunk(self._treedef, self._leaves, self.pool, lanes, *given)
        finished = [prompt for prompt in working if len(prompt.blocks) == self.cache.blocks_of(prompt.ids)]
        for start in range(0, len(finished), ROWS):
            # A kept prompt holds the logits of ROWS prompts, not of all rows of the program: these may be many.
            together, chosen = finished[start : start + ROWS], np.zeros(ROWS, np.int32)
            chosen[: len(together)] = [prompt.row for prompt in together]
            of_rows = take_rows(chosen, logits)
            for place, prompt in enumerate(together):
                own = one_row(adjustments, adapted.index(prompt)) if prompt.entry is not None else self._nothing
                prompt.made = place, of_rows, own
        return finished

    def _planned(self, working: list[ChunkedPrompt]) -> tuple[Lanes, Tails, list[ChunkedPrompt]]:
        """The next blocks of the prompts, which take turns, where their adapters act, and the prompts in which they do.
        Blocks that are known are not computed again, except a prompt's last one: its last token gives the logits."""
        lanes, tails, adapted, used, turns = self._no_lanes(), self._no_tails(), [], 0, True
        # One block each, and again: a short prompt is finished in its first chunk, whatever long ones are at work.
        while turns and used < self.lanes:
            turns = False
            for prompt in working:
                self._find_blocks(prompt)
                number, plain = len(prompt.blocks), prompt.plain
                tokens = prompt.ids[number * self.size : (number + 1) * self.size]
                adapts = number * self.size + len(tokens) > plain  # the block reaches into the tail
                if used == self.lanes or not tokens or (adapts and len({*adapted, prompt}) > ROWS):
                    continue
                turns = True
                prompt.blocks.append(self.cache.take())  # PromptTable.start has made sure of its room
                if number < len(prompt.block_keys):  # others may find it now: this program computes it
                    self.cache.publish(prompt.blocks[-1], prompt.block_keys[number])
                lanes.tokens[used, : len(tokens)] = tokens
                lanes.row[used], lanes.number[used], lanes.count[used] = prompt.row, number, len(tokens)
                lanes.last[prompt.row] = used * self.size + len(tokens) - 1
                if adapts:
                    adapted += [prompt] * (prompt not in adapted)  # a long tail may span several blocks
                    row = adapted.index(prompt)
                    tails.of_lane[used], tails.start[used] = row, plain
                    tails.lane[row], tails.count[row] = used, len(tokens)
                used += 1
        for prompt in working:
            lanes.table[prompt.row] = self._block_table(prompt)  # after all blocks of this chunk have places
        return lanes, tails, adapted

    def _find_blocks(self, prompt: ChunkedPrompt) -> None:
        while len(prompt.blocks) < self.cache.blocks_of(prompt.ids) - 1 and len(prompt.blocks) < len(prompt.block_keys):
            found = self.cache.find(prompt.block_keys[len(prompt.blocks)])
            if found is None:  # a later block is of no use without this one
                return
            prompt.blocks.append(found)
            prompt.found += self.size
            self.cache.hits += self.size

    def _no_lanes(self) -> Lanes:
        row, number, count = (np.zeros(self.lanes, np.int32) for _ in range(3))
        tokens, rows = np.zeros((self.lanes, self.size), np.int32), self.table.rows
        return Lanes(tokens, row, number, count, np.zeros((rows, self._longest), np.int32), np.zeros(rows, np.int32))

    def _no_tails(self) -> Tails:
        start, lane = (np.zeros(count, np.int32) for count in (self.lanes, ROWS))
        return Tails(np.full(self.lanes, -1, np.int32), start, lane, np.ones(ROWS, np.int32))

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
