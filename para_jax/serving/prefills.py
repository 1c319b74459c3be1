"""Prompts that are prefilled in pieces, some per round, so that decoding rows never wait for longer than that.

They are the prompts of the base model and of scope `response`. They run through the plain backbone, and share the
blocks in which they agree (prefix_cache.py). An adapter acts on the last tokens alone, the tail of its prompt
(model/blocks.py). prompt_table.py says which prompts are at work. One thread at a time may use this.
"""

from __future__ import annotations

from functools import partial
from math import gcd

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
from .slots import zeros_of

#: Tokens of a piece, at most. A block has one piece or several: a short prompt shall not be padded to a block.
PIECE = 16


class Prefills:
    """The pool of blocks on the device, and the programs that fill it with prompts."""

    def __init__(
        self,
        model: Transformer,
        bank: AdapterBank | None,
        row: DecodeState,
        *,
        size: int,
        longest: int,
        chunk: int,
        blocks: int,
        shared: bool,
    ):
        """
        Args:
            row: the abstract state of one row.
            size: tokens per block.
            longest: blocks of the longest row.
            chunk: tokens that one program computes.
            blocks: of all rows and prompts.
            shared: whether prompts share blocks.
        """
        self.bank, self.row, self.size, self.longest = bank, row, size, longest
        self.piece = gcd(size, PIECE)
        """tokens per lane"""
        self.lanes = -(-chunk // self.piece)
        self._leaves, self._treedef = jax.tree.flatten(model)
        self.cache = PrefixCache(blocks, size, model.fingerprint or "", enabled=shared)
        self.table = PromptTable(self.cache, self.lanes)
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
        return self.lanes * self.piece

    def advance(self) -> int:
        """Computes the next pieces of the prompts, in one program. Returns the tokens that this took, with padding.

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

    def warm_up(self) -> ChunkedPrompt:
        """Compiles the programs. Returns a finished prompt."""
        made = []
        for entry in (None, *filter(self.takes, self.bank.blanks() if self.bank is not None else ())):
            made.append(ChunkedPrompt((), [0], entry, 0))  # one token takes the programs of any prompt
            self._compute(made[-1:])
            self.cache.release(made[-1].blocks)
        return made[0]

    def _compute(self, working: list[ChunkedPrompt]) -> list[ChunkedPrompt]:
        """Computes the next pieces of the prompts. Returns the prompts that are then finished."""
        lanes, tails, adapted = self._planned(working)
        given: tuple = ()
        if adapted:
            assert self.bank is not None
            entries = [prompt.entry for prompt in adapted]  # padded to ROWS, so that one program serves all
            given = self.bank.rows_of(entries + [None] * (ROWS - len(entries)), ROWS), tails
        self.pool, logits, adjustments = prefill_chunk(self._treedef, self._leaves, self.pool, lanes, *given)
        finished = [prompt for prompt in working if prompt.done == len(prompt.ids)]
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
        """The next pieces of the prompts, which take turns, where their adapters act, and the prompts in which they do.
        Blocks that are known are not computed again, except a prompt's last one: its last token gives the logits."""
        lanes, tails, adapted, used, turns = self._no_lanes(), self._no_tails(), [], 0, True
        # One piece each, and again: a short prompt is finished in its first chunk, whatever long ones are at work.
        while turns and used < self.lanes:
            turns = False
            for prompt in working:
                self._find_blocks(prompt)
                start, plain = prompt.done, prompt.plain
                tokens = prompt.ids[start : start + self.piece]
                adapts = start + len(tokens) > plain  # the piece reaches into the tail
                full = adapts and len({*adapted, prompt}) > ROWS
                if used == self.lanes or not tokens or full or self._is_coming(prompt, working):
                    continue
                turns = True
                if start % self.size == 0:
                    prompt.blocks.append(self.cache.take())  # Rounds has made sure of its room
                prompt.done += len(tokens)
                number = len(prompt.blocks) - 1
                if prompt.done % self.size == 0 and number < len(prompt.block_keys):
                    # Others may find it now: this program computes it, if not an earlier one.
                    self.cache.publish(prompt.blocks[-1], prompt.block_keys[number])
                lanes.tokens[used, : len(tokens)] = tokens
                lanes.row[used], lanes.number[used] = prompt.row, start // self.piece
                lanes.count[used], lanes.last[prompt.row] = len(tokens), used * self.piece + len(tokens) - 1
                if adapts:
                    adapted += [prompt] * (prompt not in adapted)  # a long tail may span several pieces
                    row = adapted.index(prompt)
                    tails.of_lane[used], tails.start[used] = row, plain
                    tails.lane[row], tails.count[row] = used, len(tokens)
                used += 1
        for prompt in working:
            lanes.table[prompt.row, : len(prompt.blocks)] = prompt.blocks  # after all pieces have places
        return lanes, tails, adapted

    def _find_blocks(self, prompt: ChunkedPrompt) -> None:
        """Takes the known blocks that continue a prompt."""
        while prompt.done % self.size == 0 and prompt.done + self.size < len(prompt.ids):
            number = len(prompt.blocks)
            found = self.cache.find(prompt.block_keys[number]) if number < len(prompt.block_keys) else None
            if found is None:  # a later block is of no use without this one
                return
            prompt.blocks.append(found)
            prompt.done += self.size
            prompt.found += self.size
            self.cache.hits += self.size

    def _is_coming(self, prompt: ChunkedPrompt, working: list[ChunkedPrompt]) -> bool:
        """Whether another prompt has begun the block that a prompt needs next."""
        number = len(prompt.blocks)
        if prompt.done % self.size or prompt.done + self.size >= len(prompt.ids) or number >= len(prompt.block_keys):
            return False
        begun = [one for one in working if one.done % self.size and self.cache.enabled]
        coming = [one.block_keys[len(one.blocks) - 1] for one in begun if len(one.blocks) <= len(one.block_keys)]
        return prompt.block_keys[number] in coming

    def _no_lanes(self) -> Lanes:
        row, number, count = (np.zeros(self.lanes, np.int32) for _ in range(3))
        tokens, rows = np.zeros((self.lanes, self.piece), np.int32), self.table.rows
        return Lanes(tokens, row, number, count, np.zeros((rows, self.longest), np.int32), np.zeros(rows, np.int32))

    def _no_tails(self) -> Tails:
        start, lane = (np.zeros(count, np.int32) for count in (self.lanes, ROWS))
        return Tails(np.full(self.lanes, -1, np.int32), start, lane, np.ones(ROWS, np.int32))

    def _empty(self, leaf) -> jax.Array:
        return empty_held((1 + self.cache.blocks, leaf.shape[1], self.size, leaf.shape[3]), leaf.dtype)


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
