"""The engine's work on the device: prefilled prompts, and a fixed number of rows that decode together. One thread at a
time may use it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import jax
import numpy as np

from ..adapters.bank import AdapterBank, Entry
from ..adapters.methods import has_plain_prompts
from ..adapters.rows import Rows
from ..backbone.transformer import Transformer
from ..data.batches import right_padded, rounded_up
from ..inference.draw import row_sampling
from ..inference.grammar import words_of
from ..inference.logprobs import Logprobs
from ..inference.sampling import Sampling
from ..io.progress import Progress
from ..model.adapted import DecodeState, prefill
from ..runtime.sharding import mesh_of
from .prefills import Prefills
from .prompt_table import ChunkedPrompt, WholePrompt
from .row_blocks import RowBlocks
from .scoring import ScoredPrompt, score_prompt
from .slots import PrefilledPrompt, empty_slots, first_logprobs, fork, insert, insert_prompt, steps, verify
from .speculation import UNMEASURED, draft_array
from .ticket import Sample

#: Decode steps per dispatch, after which the tokens are fetched.
STEPS = 4
#: Runs of a program that are timed; the fastest counts.
TIMED = 5


class Decoded(NamedTuple):
    """New tokens of all slots."""

    tokens: jax.Array
    """int32 [steps, slots]"""
    logprobs: Logprobs | None
    """of them, if asked for"""
    counts: Any
    """[slots], how many of them count"""


class Decoder:
    """A model with its rows on the device."""

    def __init__(
        self,
        model: Transformer,
        bank: AdapterBank | None,
        slots: int,
        max_length: int,
        *,
        block_size: int,
        blocks: Callable[[DecodeState, int], int],
        chunk: int,
        shared: bool,
        top: int,
        guided: bool,
        drafted: int,
    ):
        """
        Args:
            slots: rows that decode together.
            max_length: tokens per row, prompt and answer.
            block_size, chunk, top: the engine's block_size, prefill_chunk and max_logprobs.
            blocks: blocks(the abstract state of one row, blocks of the longest row) gives the number of all blocks.
            shared: whether prompts share blocks.
            guided: whether answers may have to follow a grammar.
            drafted: the engine's speculative_tokens.
        """
        self.top, self.guided, self.drafted = top, guided, drafted
        self.verify_cost = {False: UNMEASURED, True: UNMEASURED}
        """of a pass over drafts, in decode steps, by whether rows are sampled: a pass draws at each of its positions"""
        self.all_tokens = np.full(words_of(model.config.vocab_size), -1, np.int32)
        """the mask that allows all of them"""
        self.model, self.bank, self.slots, self.max_length = model, bank, slots, max_length
        self.mesh = mesh_of(model)
        self._leaves, self._treedef = jax.tree.flatten(model)  # flattening it at each dispatch takes longer
        self._buckets = sorted({min(rounded_up(-(-max_length // part), 16), max_length) for part in (4, 2, 1)})
        """padded lengths of prompts that are computed whole: at most three, each its own program"""
        one, base = np.zeros((1, 1), np.int32), self._adapters(None)
        self.row = jax.eval_shape(lambda: prefill(model, base, one, 1, max_length=max_length)[1])
        """the abstract state of one row"""
        self._state: Any = empty_slots(self.row, slots)
        """None once an exception has dropped it, until the next round"""
        longest = -(-max_length // block_size)
        counts = {"size": block_size, "longest": longest, "chunk": chunk, "blocks": blocks(self.row, longest)}
        self.prefills = Prefills(model, bank, self.row, shared=shared, **counts)
        self.rows = RowBlocks(self.prefills.table, slots, longest)

    def drop(self) -> None:
        """Lets go of the slots and the prompts after an exception: each program donates them, so they may be lost."""
        self._state = self.prefills.pool = None  # memory is free before new arrays are made

    def reset(self) -> None:
        """Makes the slots and the prompts' blocks again, all empty, if they were dropped."""
        if self._state is None:  # after `drop`
            self.prefills.reset()
            self._state = empty_slots(self.row, self.slots)
            self.rows = RowBlocks(self.prefills.table, self.slots, self.prefills.longest)

    def warm_up(self) -> None:
        """Compiles everything that the base model and the bank's adapters need, held or expected; for an empty bank,
        also what adapters of the scope `all` need."""
        configs = self.bank.configs if self.bank is not None else []
        whole = self.bank is not None and not (configs and all(map(has_plain_prompts, configs)))
        buckets, scored = self._buckets if whole else [], self._buckets if self.top else []
        masks = np.tile(self.all_tokens, (self.slots, 1))
        # with and without log-probabilities are two programs, and so are guided and free rounds
        asked = [False, True] if self.top else [False]
        variants = list(product(asked, [None, masks] if self.guided else [None]))
        variants += [(True, masks)] * (self.top > 0 and not self.guided)  # for beams
        passes = asked if self.drafted else []
        programs = len(buckets) + len(scored) + 1 + len(variants) + len(passes)
        with Progress("warming up the engine", programs, unit="program") as bar:
            for bucket in buckets:
                prefilled = self._prefill([0] * min(bucket, self.max_length - 1), None)  # with room to write
                self.insert(0, prefilled, 1, None, logprobs=self.top > 0)
                bar.advance()
            for bucket in scored:
                jax.block_until_ready(self._score([0] * bucket, None, bucket, None))
                bar.advance()
            self.insert(0, self.prefills.warm_up(), 1, None, logprobs=self.top > 0)
            bar.advance()
            for logprobs, allowed in variants:
                jax.block_until_ready(self.decode([None] * self.slots, logprobs=logprobs, allowed=allowed))
                bar.advance()
            self.fork([], [], [])
            for logprobs in passes:
                jax.block_until_ready(self.verify([None] * self.slots, {}, logprobs=logprobs))
                bar.advance()
        for sampled in self.verify_cost if self.drafted else ():
            rows: list[Sampling | None] = [Sampling(temperature=float(sampled))] * self.slots
            step = seconds_of(partial(self.decode, rows, logprobs=False)) / STEPS
            self.verify_cost[sampled] = seconds_of(partial(self.verify, rows, {}, logprobs=False)) / step
        self.rows.release(0)

    def keeps(self, sample: Sample) -> bool:
        """Whether the sample's prompt is prefilled already."""
        return sample.key in self.prefills.table.kept

    def whole_tokens(self, sample: Sample) -> int:
        """Tokens, with padding, that have to be computed of a sample's prompt in one piece: to score it, and to prefill
        it if its adapter changes the prompt's own states."""
        whole = sample.decodes and not self.prefills.takes(sample.entry) and not self.keeps(sample)
        return (sample.unscored + whole) * self._padded_length(sample.ids)  # scoring and prefilling are two passes

    def prefilled(self, sample: Sample) -> WholePrompt | ChunkedPrompt:
        """A sample's prefilled prompt, kept for samples with the same adapter and the same whole prompt."""
        prompt = self.prefills.table.find(sample.key)
        if prompt is None:
            assert not self.prefills.takes(sample.entry)
            prompt = self._prefill(sample.ids, sample.entry)
            self.prefills.table.keep_whole(sample.key, prompt)
        return prompt

    def blocks_to_begin(self, sample: Sample) -> int:
        """How many blocks the pool must have to begin a sample: for what was decoded of its answer already and one
        block more, up to its longest answer. Beams share the complete blocks of their prompt."""
        cache, kept, prompt = self.prefills.cache, self.prefills.table.kept.get(sample.key), len(sample.ids)
        longest, whole = cache.blocks_of(prompt + sample.request.max_new_tokens - 1), prompt // cache.size
        own = sample.rows * (min(cache.blocks_of(prompt + sample.reached) + 1, longest) - whole)
        if isinstance(kept, ChunkedPrompt):
            return own
        return own + whole + self.prefills.takes(sample.entry)  # the row copies its prompt's last block

    def insert(
        self,
        slot: int,
        prefilled: WholePrompt | ChunkedPrompt,
        tokens: int,
        sampling: Sampling | None,
        *,
        logprobs: bool,
        allowed: np.ndarray | None = None,
        sharing: int | None = None,
    ) -> tuple[jax.Array, Logprobs | None]:
        """Puts a prefilled prompt into a slot, and returns its first token [1] and its log-probabilities. The pool must
        have room for its blocks.

        Args:
            tokens: of the prompt.
            logprobs: whether they are asked for.
            allowed: int32 [words], the tokens that may be drawn; None: all.
            sharing: a slot with the same prompt, whose blocks this one shares.
        """
        drawn, allowed = row_sampling([sampling]), (self.all_tokens if allowed is None else allowed)[None]
        if isinstance(prefilled, ChunkedPrompt):
            assert prefilled.made is not None
            row, logits, _ = prefilled.made
            blocks = self.rows.begin(slot, prefilled.blocks, tokens)
            prompt = PrefilledPrompt(tokens, *prefilled.made)
            self._state, self.prefills.pool, token = insert_prompt(
                self._state, self.prefills.pool, slot, *blocks, prompt, drawn, allowed
            )
        else:
            row, logits = 0, prefilled.logits
            self.rows.begin(slot, () if sharing is None else self.rows.of_slot(sharing), tokens)
            self._state, self.prefills.pool, token = insert(
                self._state, self.prefills.pool, slot, self.rows.of(slot), *prefilled, drawn, allowed
            )
        return token, first_logprobs(logits, row, token, self.top) if logprobs else None

    def decode(self, rows: list[Sampling | None], *, logprobs: bool, allowed: np.ndarray | None = None) -> Decoded:
        """The next STEPS tokens of all slots. None is a slot without a sample.

        Args:
            logprobs: whether any slot needs them.
            allowed: int32 [slots, words], the tokens that may be drawn. It holds for one step, so there is only one.
        """
        count, top = STEPS if allowed is None else 1, self.top if logprobs else None
        self._state, self.prefills.pool, new = steps(*self._given(rows), count, top, allowed)
        return Decoded(new[0], new[1], np.full(self.slots, count))

    def fork(self, slots: Sequence[int], parents: Sequence[int], tokens: Sequence[int]) -> None:
        """Lets each of these slots continue the row of the slot parents[i] with a token. Rows that exchange their
        blocks have the same adjustments."""
        last, copies = np.full(self.slots, -1, np.int32), np.zeros((2, self.slots), np.int32)
        if slots:
            last[slots], copies[:, slots] = tokens, np.transpose(self.rows.fork(slots, parents))
        self._state, self.prefills.pool = fork(self._state, self.prefills.pool, last, *copies)

    def verify(self, rows: list[Sampling | None], drafts: dict[int, list[int]], *, logprobs: bool) -> Decoded:
        """The next tokens of all slots from one pass over drafts: one of each slot, and those that were drafted right.

        Args:
            rows, logprobs: as in `decode`.
            drafts: tokens by slot, at most `drafted` each.
        """
        drafted, top = draft_array(drafts, self.slots, self.drafted), self.top if logprobs else None
        self._state, self.prefills.pool, new = verify(*self._given(rows), drafted, top)
        return Decoded(new[0], new[1], new[2])

    def _given(self, rows: list[Sampling | None]) -> tuple:
        """What both programs take of the rows."""
        live = np.array([row is not None for row in rows])
        state = self._treedef, self._leaves, self._state, self.prefills.pool
        return *state, self.rows.table(), row_sampling(rows), live

    def score(self, sample: Sample) -> ScoredPrompt:
        """The log-probabilities of the sample's prompt, and the token after it."""
        context = sample.request.context_length or len(sample.ids)
        return self._score(sample.ids, sample.entry, context, sample.sampling)

    def _score(self, ids: list[int], entry: Entry | None, context: int, sampling: Sampling | None) -> ScoredPrompt:
        lengths, drawn = (np.array([count], np.int32) for count in (context, len(ids))), row_sampling([sampling])
        adapters, tokens = self._adapters(entry), self._whole(ids)
        return score_prompt(self._treedef, self._leaves, adapters, tokens, *lengths, drawn, self.top)

    def _prefill(self, ids: list[int], entry: Entry | None) -> WholePrompt:
        tokens, length = self._whole(ids), np.array([len(ids)])
        return WholePrompt(*prefill(self.model, self._adapters(entry), tokens, length, max_length=tokens.shape[1]))

    def _whole(self, ids: list[int]) -> np.ndarray:
        """A prompt as int32 [1, T], padded to a length that has a program."""
        return right_padded([ids], 1, self._padded_length(ids))[0]

    def _padded_length(self, ids: list[int]) -> int:
        return next(length for length in self._buckets if length >= len(ids))

    def _adapters(self, entry: Entry | None) -> Rows | None:
        return None if self.bank is None else self.bank.rows_of([entry])


def seconds_of(dispatch: Callable) -> float:
    """The shortest time that a program took."""
    found = []
    for _ in range(TIMED):
        began = time.perf_counter()
        jax.block_until_ready(dispatch())
        found.append(time.perf_counter() - began)
    return min(found)
