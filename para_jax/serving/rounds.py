"""One round of the engine: free slots are filled, prompts are computed up to a bound, and all rows decode a few tokens.
Where the pool has no room for these, the youngest rows give up their slots, and start again when there is room.

After an exception in a round, the next one starts again from the open requests. Ctrl-C waits for the end of the round.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import jax
import numpy as np

from ..inference.beams import BeamSearch
from ..inference.draw import NO_TOKEN, NO_TOKEN_MESSAGE
from ..inference.logprobs import TokenLogprob
from ..inference.sampling import Sampling
from ..io.checks import shorten
from ..runtime.sharding import using
from .decoder import STEPS, Decoded, Decoder
from .open_requests import OpenRequests, interrupts_held_back
from .prompt_table import ChunkedPrompt, PromptFailed, WholePrompt
from .row_blocks import RowBlocks
from .scoring import ScoredPrompt
from .speculation import Lookup, SpeculationStats
from .ticket import Sample, is_request_error

#: The share of max_prefill_tokens that a round may compute for each slot that does not decode. So one long prompt does
#: not hold up all others for as long as many short ones may.
PER_SLOT = 0.25


@dataclass
class Started:
    """What a round starts and computes of prompts before its rows decode."""

    limit: int
    """tokens of prompts that it may compute; one whole prompt and one chunk may always run"""
    tokens: int = 0
    """those that it has computed, with padding"""
    wholes: int = 0
    """prompts that were prefilled whole or scored"""
    chunks: int = 0
    free: list[int] = field(default_factory=list)
    """slots that neither a row nor a prompt has"""
    first: dict[int, tuple] = field(default_factory=dict)
    """by slot: the first token [1] of its row and its log-probabilities"""
    scored: list[tuple[Sample, ScoredPrompt]] = field(default_factory=list)
    failed: list[Exception] = field(default_factory=list)
    """of prompts that were prefilled whole or scored"""

    def has_room(self, tokens: int) -> bool:
        return self.tokens + tokens <= self.limit

    def take(self, slots: int) -> list[int]:
        """Takes free slots."""
        taken, self.free = self.free[:slots], self.free[slots:]
        return taken


class Rounds:
    """What the rounds of one engine share. One thread at a time makes a round."""

    def __init__(self, decoder: Decoder, requests: OpenRequests, stops: frozenset[int], limit: int):
        """
        Args:
            stops: token ids that end every answer.
            limit: the engine's max_prefill_tokens.
        """
        self._decoder, self._prefills, self._requests = decoder, decoder.prefills, requests
        self._prompts = decoder.prefills.table
        self._stops, self._limit = stops, limit
        self.decoding = 0
        """rows that decoded in the last round"""
        self.speculated = SpeculationStats(0, 0, 0)
        self.preempted = 0
        """samples that gave up their slots, since the engine was made"""
        self._driving = threading.Lock()
        """held during a round; guards the decoder and what follows"""
        self._rows: list[Sample | None] = [None] * decoder.slots

    def warm_up(self) -> None:
        """Compiles everything. Raises ValueError while requests are open."""
        if self._requests.tickets:
            raise ValueError(f"warm_up: {len(self._requests.tickets)} requests are open; take their answers first")
        with self._round():
            self._decoder.warm_up()

    @property
    def keeps_ended(self) -> bool:
        """Whether slots still have samples that were cancelled after the last round. The next round lets go of them and
        of their adapters."""
        return any(sample and sample.completion for sample in (*self._rows, *self._prompts.waiting.values()))

    def make(self, wait: bool = True) -> bool:
        """Fills free slots, decodes a few tokens, and adds them to the answers. Returns False, without `wait`, if
        another thread is making a round. Raises the error of a prompt only if nothing else could be computed, because
        the device may be lost: one tenant's prompt stops no others."""
        with self._round(wait) as begun:
            if not begun:
                return False
            self._requests.cancel_dropped()  # their slots are free for this round
            self._let_go()
            empty = [slot for slot, sample in enumerate(self._rows) if sample is None]
            started, self.decoding = Started(int(self._limit * min(PER_SLOT * max(len(empty), 1), 1))), 0
            if not self._fill(started, empty):
                self._start_again()
                return True
            self._make_room(started)
            self._fork_beams(started)
            active = self._active
            drafts = self._drafts(active, started.first)
            speculates = self._pays(active, drafts)
            # dispatched, not yet waited for
            decoded = self._decode(active, started.first, drafts if speculates else {}) if active else None
            scored = started.scored
            self.decoding = len(active)
            if scored or active:
                prompts = [prompt for _, prompt in scored]
                prompts, first, decoded = jax.device_get((prompts, started.first, decoded))
                for (sample, _), prompt in zip(scored, prompts, strict=True):
                    self._give_scores(sample, prompt)
                for slot, sample in active:
                    if sample.search:
                        continue
                    tokens, records = new_tokens(sample, first.get(slot), decoded, slot)
                    if slot in drafts:
                        self._learn(sample, drafts[slot], tokens, speculates)
                    self._extend(sample, tokens, records)
                for sample, search, slots in beams_of(active):
                    found = decoded.logprobs
                    self._extend_beams(sample, search, found.top_ids[0, slots], found.of_top[0, slots])
            with self._requests.lock:
                self._let_go()
                self._requests.news.notify_all()
        if started.failed and not (active or scored or self._prompts.waiting):  # the device may be lost
            raise started.failed[0]
        return True

    @property
    def _blocks(self) -> RowBlocks:
        return self._decoder.rows

    def _let_go(self) -> None:
        """Empties the slots of ended samples."""
        for slot, sample in enumerate(self._rows):
            if sample and sample.completion:
                self._rows[slot] = None
                self._blocks.release(slot)

    @property
    def _active(self) -> list[tuple[int, Sample]]:
        """The samples that decode, with their slots."""
        return [(slot, sample) for slot, sample in enumerate(self._rows) if sample and not sample.completion]

    def _make_room(self, started: Started) -> None:
        """Gives each row blocks for the tokens of this round, the oldest first."""
        new = max(STEPS, self._decoder.drafted + 1)
        for slot, sample in sorted(self._active, key=lambda row: row[1].number):
            most = len(sample.ids) + sample.request.max_new_tokens - 1  # the last token is never in the pool
            tokens = min(len(sample.ids) + max(sample.length - 1, 0) + (1 if sample.search else new), most)
            while self._rows[slot] is sample and not self._blocks.grow(slot, tokens):
                if not self._prompts.drop_kept(left=0):
                    self._preempt(started)

    def _preempt(self, started: Started) -> None:
        """Takes the slots of the youngest sample. The oldest one always stays: the pool has room for any single one."""
        held = dict(self._active) | self._prompts.waiting
        youngest = max(held.values(), key=lambda sample: sample.number)
        self._requests.put_back(youngest)
        self.preempted += 1
        for slot in [slot for slot, sample in held.items() if sample is youngest]:
            self._prompts.waiting.pop(slot, None)
            self._rows[slot] = None
            started.first.pop(slot, None)
            self._blocks.release(slot)
        self._prompts.keep_wanted()

    @contextmanager
    def _round(self, wait: bool = True) -> Iterator[bool]:
        """A round of this thread: the body. If it raises, the next round starts again from the open requests. Gives
        False, without `wait`, if another thread is making one."""
        with interrupts_held_back(), using(self._decoder.mesh):
            if not self._driving.acquire(blocking=wait):  # another thread drives the engine already
                yield False
                return
            try:
                self._decoder.reset()
                yield True
            except BaseException:
                self._start_again()
                raise
            finally:
                self._driving.release()

    @interrupts_held_back()
    def _start_again(self) -> None:
        """Empties the slots and queues the samples without an answer again."""
        with self._requests.lock:
            self._rows = [None] * len(self._rows)
            self._prompts.waiting = {}
            self._requests.requeue()
        self._decoder.drop()  # the next round makes its state again, when the exception's frames hold no memory

    def _fill(self, started: Started, empty: list[int]) -> bool:
        """Moves queued samples into free slots until no slot is free, no sample can start, or the round has computed as
        many tokens of prompts as it may: rows that decode wait meanwhile. Returns False if a prompt failed, which ends
        the round.

        Args:
            empty: slots that do not decode.
        """
        self._prompts.keep_wanted()
        started.free = [slot for slot in empty if slot not in self._prompts.waiting]
        while True:  # whole prompts and chunks take turns, so that neither uses up the tokens of the other
            before = started.tokens
            self._start_samples(started)
            if not self._advance_prompts(started):
                return False
            if started.tokens == before:  # neither could go on
                break
        return True

    def _start_samples(self, started: Started) -> None:
        """Moves queued samples into free slots, up to the first with a prompt that has to be prefilled whole or scored.
        Where a prompt is prefilled in chunks, it starts, and the sample keeps the slot for it."""
        tokens = 0
        while not tokens:
            with self._requests.lock:
                sample = self._next(started)
                if sample is None:
                    return
                self._requests.queue.take(sample.request.tenant)  # under the lock, so that no cancel comes between
                known = sample.decodes and self._decoder.keeps(sample)
                in_chunks = sample.decodes and self._prefills.takes(sample.entry)
                tokens = self._decoder.whole_tokens(sample)
                sample.ticket.start(len(sample.ids) if known else None if in_chunks else 0)
            started.tokens += tokens
            started.wholes += tokens > 0  # only the first of a round may exceed its limit
            try:
                if sample.unscored:
                    started.scored.append((sample, self._decoder.score(sample)))
                if not sample.decodes:
                    continue
                if in_chunks and not known:  # its slot is reserved while others start
                    self._prompts.start(sample.key, sample.ids, sample.entry)
                    self._prompts.waiting |= dict.fromkeys(started.take(sample.rows), sample)
                    continue
                prefilled = self._decoder.prefilled(sample)
            except Exception as error:
                if in_chunks:  # the prompts may be in disorder
                    raise
                started.failed.append(error)  # nothing that others use has changed
                self._fail(sample, error)
                continue
            self._insert(started.take(sample.rows), sample, prefilled, started)

    def _next(self, started: Started) -> Sample | None:
        """The sample that starts next: the one whose turn it is, or None if it can't start yet. While no slot is free,
        the first that needs none."""
        sample = self._requests.queue.head(lambda sample: bool(started.free) or not sample.decodes)
        if sample is None or (started.wholes and not started.has_room(self._decoder.whole_tokens(sample))):
            return None
        if sample.decodes and (len(started.free) < sample.rows or not self._has_room(sample)):
            return None  # the others wait too, or many small ones would hold up a large one for ever
        return sample

    def _has_room(self, sample: Sample) -> bool:
        """Whether there are blocks for a sample, and for half of the rows to grow by one. Kept prompts make room."""
        live = sum(row is not None and not row.completion for row in self._rows)  # with less room, many are preempted
        while self._prompts.room < self._decoder.blocks_to_begin(sample) + (live + 1) // 2:
            if not self._prompts.drop_kept(left=0, but=sample.key):
                return False
        in_chunks = self._prefills.takes(sample.entry) and not self._decoder.keeps(sample)
        return not in_chunks or sample.key in self._prompts.working or self._prompts.has_row

    def _advance_prompts(self, started: Started) -> bool:
        """Computes a chunk of the prompts that samples wait for, if the round may. Samples with a complete one move
        into their slots. Returns False if a prompt failed, which ends the round."""
        if started.chunks and not started.has_room(self._prefills.chunk):  # the first chunk of a round always runs
            return True
        try:
            computed = self._prefills.advance()
        except PromptFailed as failed:
            for sample in [sample for sample in self._prompts.waiting.values() if sample.key == failed.key]:
                self._fail(sample, failed)
            with self._requests.lock:
                self._requests.news.notify_all()
            return False
        started.tokens += computed
        started.chunks += computed > 0
        for sample in dict.fromkeys(self._prompts.waiting.values()):
            if self._decoder.keeps(sample):
                prompt = self._decoder.prefilled(sample)
                assert isinstance(prompt, ChunkedPrompt)
                if sample.ticket.cached_tokens is None:  # the first of several samples of one request says it
                    sample.ticket.cached_tokens = prompt.found
                slots = [slot for slot, waiting in self._prompts.waiting.items() if waiting is sample]
                for slot in slots:
                    del self._prompts.waiting[slot]  # it has room for one block from now on
                self._insert(slots, sample, prompt, started)
        while self._prompts.drop_kept():
            pass
        return True

    def _insert(
        self, slots: list[int], sample: Sample, prefilled: WholePrompt | ChunkedPrompt, started: Started
    ) -> None:
        if sample.rows > 1:
            ends = sample.stops | (frozenset() if sample.request.ignore_eos else self._stops)
            sample.search = BeamSearch(sample.sampling, ends)
        logprobs, allowed = sample.request.logprobs is not None or sample.rows > 1, sample.guide and sample.guide.first
        for slot in slots:
            sharing = None if slot == slots[0] else slots[0]
            given = prefilled, len(sample.ids), sample.sampling
            first = self._decoder.insert(slot, *given, logprobs=logprobs, allowed=allowed, sharing=sharing)
            started.first[slot] = first
            self._rows[slot] = sample

    def _fork_beams(self, started: Started) -> None:
        """Gives each beam its last token, behind the row of the beam that it continues."""
        slots, parents, tokens = [], [], []
        for sample, search, own in beams_of(self._active):
            if own[0] in started.first:
                _, found = jax.device_get(started.first[own[0]])
                self._extend_beams(sample, search, found.top_ids, found.of_top)
            if sample.completion is None:
                slots += own
                parents += [own[beam.row] for beam in search.running]
                tokens += [beam.tokens[-1] for beam in search.running]
        if slots:
            self._decoder.fork(slots, parents, tokens)

    def _extend_beams(self, sample: Sample, search: BeamSearch, ids: np.ndarray, logprobs: np.ndarray) -> None:
        """Extends a sample's beams by a token, and gives the answers when they are found."""
        try:
            search.advance(ids, logprobs)
        except ValueError as error:
            self._requests.end(sample, "error", str(error))
        if search.over:
            for one, answer in zip([sample, *sample.followers], search.answers, strict=False):
                one.score = answer.score
                self._extend(one, answer.tokens, [])

    def _drafts(self, active: list[tuple[int, Sample]], first: dict[int, tuple]) -> dict[int, list[int]]:
        """The drafts by slot. A row that begins has none, because its first token is still on the device. If any row
        follows a grammar or is a beam, no row has one: they decode one token."""
        if not self._decoder.drafted or any(sample.guide or sample.search for _, sample in active):
            return {}
        drafts = {}
        for slot, sample in active:
            if slot not in first:
                sample.lookup = sample.lookup or Lookup(sample.ids, self._decoder.drafted)
                if draft := sample.lookup.draft(sample.tokens):
                    drafts[slot] = draft
        return drafts

    def _pays(self, active: list[tuple[int, Sample]], drafts: dict[int, list[int]]) -> bool:
        """Whether a pass over the drafts is likely to give more tokens than decode steps would in the same time."""
        won = sum(sample.lookup.expected for slot, sample in active if slot in drafts and sample.lookup)
        cost = self._decoder.verify_cost[any(sample.request.temperature > 0 for _, sample in active)]
        return bool(drafts) and won + len(active) > cost * len(active)

    def _learn(self, sample: Sample, draft: list[int], tokens: list[int], verified: bool) -> None:
        """Compares a draft with the tokens that the round gave."""
        assert sample.lookup is not None
        right = sample.lookup.compare(draft, tokens)
        if verified:
            drafts, drafted, accepted = self.speculated
            self.speculated = SpeculationStats(drafts + 1, drafted + len(draft), accepted + right)

    def _decode(
        self, active: list[tuple[int, Sample]], first: dict[int, tuple], drafts: dict[int, list[int]]
    ) -> Decoded:
        rows: list[Sampling | None] = [None] * len(self._rows)
        for slot, sample in active:
            rows[slot] = sample.sampling
        logprobs = any(sample.search or sample.request.logprobs is not None for _, sample in active)
        if drafts:
            return self._decoder.verify(rows, drafts, logprobs=logprobs)
        return self._decoder.decode(rows, logprobs=logprobs, allowed=self._allowed(active, first))

    def _allowed(self, active: list[tuple[int, Sample]], first: dict[int, tuple]) -> np.ndarray | None:
        """Which tokens each slot may draw next, int32 [slots, words]; None if no answer follows a grammar and no row is
        a beam. A row that begins waits for its first token here, on which its second one depends."""
        guided = [(slot, sample, sample.guide) for slot, sample in active if sample.guide]
        if not guided and not beams_of(active):
            return None
        allowed = np.tile(self._decoder.all_tokens, (len(self._rows), 1))
        begun = jax.device_get({slot: first[slot][0] for slot, *_ in guided if slot in first})
        for slot, sample, guide in guided:
            new = [int(token) for token in begun.get(slot, ())]
            if any(token == NO_TOKEN or self._is_end(sample, token) for token in new):
                continue  # the row ends, whatever it draws
            try:
                guide.allow([*sample.tokens, *new], allowed[slot])
            except ValueError as error:
                self._requests.end(sample, "error", str(error))
        return allowed

    def _is_end(self, sample: Sample, token: int) -> bool:
        """Whether a token ends a sample's answer."""
        return token in sample.stops or (token in self._stops and not sample.request.ignore_eos)

    def _give_scores(self, sample: Sample, scored: ScoredPrompt) -> None:
        """Gives a sample the log-probabilities of its prompt and, if it needs no slot, the token that follows."""
        request = sample.request
        records = jax.tree.map(lambda a: a[0], scored.prompt).records(sample.ids[1:], request.prompt_logprobs or 0)
        sample.prompt_logprobs = [None, *records]
        if request.max_new_tokens == 0:
            self._requests.end(sample, "length")
        elif not sample.decodes:
            token = scored.token.tolist()
            self._extend(sample, token, scored.of_token.records(token, request.logprobs or 0))

    def _fail(self, sample: Sample, error: Exception) -> None:
        self._requests.end(sample, "error", f"the prompt could not be prefilled: {shorten(str(error), 200)}")

    def _extend(self, sample: Sample, new: list[int], logprobs: list[TokenLogprob]) -> None:
        """Adds new tokens to a sample, up to its end, and their log-probabilities. An error in decoding its text ends
        this sample alone."""
        request, times = sample.request, sample.ticket.times
        with self._requests.lock:
            if sample.completion is not None:  # cancelled during the round
                return
            if new:
                times.first_token = times.first_token or time.monotonic()  # a request is timed by its first sample
            try:
                for i, token in enumerate(new):
                    if token == NO_TOKEN:
                        return self._requests.end(sample, "error", NO_TOKEN_MESSAGE)
                    is_end = self._is_end(sample, token)
                    if is_end and not request.keep_end:
                        return self._requests.end(sample, "stop")
                    sample.logprobs += logprobs[i : i + 1]  # empty where none were asked for
                    sample.tokens.append(token)
                    if is_end:
                        sample.kept_end = True
                        return self._requests.end(sample, "stop")
                    if sample.text is not None and sample.text.add(token):
                        return self._requests.end(sample, "stop")
                    if len(sample.tokens) == request.max_new_tokens:
                        return self._requests.end(sample, "length")
            except BaseException as error:
                if not is_request_error(error):  # such as an interrupt, which ends the round
                    raise
                message = f"the answer's tokens have no text: {shorten(str(error), 200)}"
                self._requests.end(sample, "error", message)


def beams_of(active: list[tuple[int, Sample]]) -> list[tuple[Sample, BeamSearch, list[int]]]:
    """The samples that search with beams, and their slots."""
    samples = {sample: sample.search for _, sample in active if sample.search}
    return [(one, search, [slot for slot, row in active if row is one]) for one, search in samples.items()]


def new_tokens(
    sample: Sample, first: tuple | None, decoded: Decoded, slot: int
) -> tuple[list[int], list[TokenLogprob]]:
    """The tokens that a round gave a sample, and their log-probabilities if its request asks for them.

    Args:
        first: its first token and that one's Logprobs, if the round began with it.
    """
    parts, asked = [first] if first else [], sample.request.logprobs
    count, logprobs = decoded.counts[slot], decoded.logprobs
    own = asked is not None and jax.tree.map(lambda a: a[:count, slot], logprobs)
    parts.append((decoded.tokens[:count, slot], own))
    tokens, records = [], []
    for of_part, logprobs in parts:
        new = of_part.tolist()
        tokens += new
        if asked is not None:
            records += logprobs.records(new, asked)
    return tokens, records
