"""Engine: continuous batching. Requests of many tenants share a fixed number of slots; a row that ends leaves, and the
next request takes its place while the others go on.

First come, first served. Between two bursts of decode steps at most `PREFILLS` prompts are prefilled, so that those who
decode never wait longer than that.
"""

from __future__ import annotations

import itertools
import os
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator
from dataclasses import replace

import jax
import numpy as np

from ..adapters.bank import AdapterBank, Entry
from ..adapters.rows import Rows
from ..backbone.transformer import Transformer
from ..config import require
from ..data.examples import Ids, Prompt, encode_prompt, special_stop_ids, stop_token_ids, turn_stop_ids
from ..devices import say
from ..inference.generate import before_first, up_to_multiple
from ..inference.sampling import derived_seed
from ..model import DecodeState, prefill
from .request import Completion, Request, check_request
from .slots import empty_slots, insert, row_sampling, steps

#: Decode steps of a dispatch, after which the tokens are looked at, and the most prompts prefilled before the next
#: while rows decode.
STEPS, PREFILLS = 4, 2
#: Prefilled prompts that are kept for the next request of the same adapter and prompt.
KEPT = 4


class QueueFull(ValueError):
    """The engine's queue holds as many requests as it may; take answers first."""


class Sample:
    """One sample of a request: it waits, stands in a slot, and ends."""

    def __init__(self, request: Request, id: Hashable, index: int, ids: list[int], entry: Entry | None, stops=()):
        """
        Args:
            stops: the request's own token ids that end an answer, beside the engine's.
        """
        self.request, self.id, self.index, self.ids, self.entry = request, id, index, ids, entry
        self.stops: tuple[int, ...] = stops
        self.tokens: list[int] = []
        self.ended = False

    @property
    def key(self) -> tuple:
        """What a prefilled prompt depends on, whole: PARA's factors are made of all of it. A name is not enough, for
        its adapter may be replaced; a prefix is not enough, for its last token differs."""
        return (self.entry.content if self.entry else None, tuple(self.ids))


class Engine:
    """Serves requests of the bank's tenants. One thread drives it, by run() or stream()."""

    def __init__(
        self,
        model: Transformer,
        bank: AdapterBank | None,
        tokenizer,
        *,
        slots: int,
        max_length: int,
        queue_limit: int | None = None,
        seed: int = 0,
    ):
        """
        Args:
            bank: whose tenants may ask; which methods may join is its `methods`. None: the base model alone.
            slots: rows that decode together.
            max_length: tokens a row, prompt and answer.
            queue_limit: the most samples that may wait; more are refused. None: no limit.

        Says on stderr what the slots need, and, where the memory is known, how many would fit.
        """
        for name, value in (("slots", slots), ("max_length", max_length)):
            require(type(value) is int and value >= 1, name, value, "a whole number of at least 1")
        longest = model.config.max_positions
        require(2 <= max_length <= longest, "max_length", max_length, f"2 to {longest} tokens, the model's positions")
        require(queue_limit is None or queue_limit >= 1, "queue_limit", queue_limit, "at least 1, or None")
        self.model, self.bank, self.tokenizer = model, bank, tokenizer
        self.max_length, self.queue_limit = max_length, queue_limit
        self._leaves, self._treedef = jax.tree.flatten(model)
        self._stops = frozenset(stop_token_ids(tokenizer, model.config.eos_token_ids))
        self._buckets = sorted({min(up_to_multiple(-(-max_length // part), 16), max_length) for part in (4, 2, 1)})
        one, base = np.zeros((1, 1), np.int32), self._adapters(None)
        row = jax.eval_shape(lambda: prefill(model, base, one, 1, max_length=max_length)[1])
        say(capacity(bank, row, slots, max_length))
        self._slots = empty_slots(row, slots)
        self._rows: list[Sample | None] = [None] * slots
        self._queue: deque[Sample] = deque()
        self._done: deque[Completion] = deque()
        self._open: dict[Hashable, list[Sample]] = {}
        self._kept: OrderedDict[tuple, tuple] = OrderedDict()
        self._numbers = itertools.count()
        self._seed, self._draws = seed, itertools.count()

    @property
    def slots(self) -> int:
        return len(self._rows)

    @property
    def open(self) -> int:
        """Requests whose answers run() has yet to give."""
        return len(self._open) + len(self._done)

    def warm_up(self) -> None:
        """Compiles everything. Afterwards nothing is compiled, unless an adapter of a config joins that is unlike all
        before it in more than rank and sites. Raises ValueError while rows decode, whose slots it would use."""
        require(not any(self._rows), "warm_up: open requests", self.open, "none: take their answers first")
        for bucket in self._buckets:
            logits, row = self._prefill([0] * min(bucket, self.max_length - 1), None)
            self._slots, _ = insert(self._slots, 0, logits, row, row_sampling(1))
        self._slots, tokens = steps(self._treedef, self._leaves, self._slots, STEPS)
        jax.block_until_ready(tokens)

    def submit(self, request: Request) -> Hashable:
        """Queues a request; its id. It is answered by the adapter that its tenant has now.

        A request that can't be served (a bad field, an unknown tenant, too long) is answered with a Completion whose
        finish_reason is "error". Raises QueueFull, and ValueError for an id that is still open.
        """
        id = next(n for n in self._numbers if n not in self._open) if request.id is None else request.id
        require(id not in self._open, "id", id, "one that no open request has")
        try:
            check_request(request)
            if request.seed is None:
                request = replace(request, seed=derived_seed(self._seed, next(self._draws)))
            most = self.queue_limit or request.n
            require(request.n <= most, "n", request.n, f"at most {most}, the engine's queue_limit")
            entry = None if request.tenant is None else self._entry(request.tenant)
            ids = self._ids(request.prompt)
            if len(ids) + request.max_new_tokens > self.max_length:
                raise ValueError(
                    f"prompt: {len(ids)} tokens and max_new_tokens {request.max_new_tokens} are more than the "
                    f"engine's max_length {self.max_length}"
                )
        except ValueError as error:
            self._done.append(Completion(id, 0, "", [], "error", str(error)))
            return id
        if self.queue_limit is not None and len(self._queue) + request.n > self.queue_limit:
            raise QueueFull(f"the queue holds {len(self._queue)} of {self.queue_limit} samples; take answers first")
        stops = special_stop_ids(self.tokenizer, request.stop) + turn_stop_ids(self.tokenizer, request.prompt)
        self._open[id] = [Sample(request, id, index, ids, entry, stops) for index in range(request.n)]
        self._queue.extend(self._open[id])
        return id

    def cancel(self, id: Hashable) -> bool:
        """Ends a request: its slots are free at once, and what was not answered is answered with an error that says so.
        Whether the request was open."""
        samples = [sample for sample in self._open.get(id, []) if not sample.ended]
        for sample in samples:
            if sample in self._queue:
                self._queue.remove(sample)
            else:
                self._rows[self._rows.index(sample)] = None
            self._answer(sample, "error", "cancelled")
        return bool(samples)

    def stream(self, id: Hashable) -> Iterator[int]:
        """The tokens of an open request's first sample, as they are made; the engine runs meanwhile, and other answers
        wait for run(). Nothing for a request that has ended."""
        given, samples = 0, self._open.get(id, [])
        while samples:
            ended = samples[0].ended
            new = samples[0].tokens[given:]
            yield from new
            given += len(new)
            if ended:
                return
            self._round()

    def run(self) -> Iterator[Completion]:
        """Answers as they end, until every request is answered; more may be submitted meanwhile."""
        while self._done or self._queue or any(self._rows):
            if not self._done:
                self._round()
            while self._done:
                yield self._done.popleft()

    # ---------------------------------------------------------------------------------------------------- one round

    def _round(self) -> None:
        """Fills free slots, makes some decode steps, and takes the tokens."""
        first = self._fill()
        active = [(slot, sample) for slot, sample in enumerate(self._rows) if sample is not None]
        if not active:
            return
        self._slots, tokens = steps(self._treedef, self._leaves, self._slots, STEPS)
        first, tokens = jax.device_get((first, tokens))
        for slot, sample in active:
            new = [*(int(token[0]) for token in first.get(slot, [])), *tokens[:, slot].tolist()]
            self._extend(sample, new)
            if sample.ended:
                self._rows[slot] = None

    def _fill(self) -> dict[int, list]:
        """Takes queued samples into free slots; the first token of each, by slot."""
        first, prefills = {}, 0
        busy = any(self._rows)
        for slot in [slot for slot, sample in enumerate(self._rows) if sample is None]:
            if not self._queue:
                break
            known = self._queue[0].key in self._kept
            if busy and not known and prefills == PREFILLS:
                break
            prefills += not known
            sample = self._queue[0]
            logits, row = self._prefilled(sample)
            asked = sample.request
            sampling = row_sampling(1, asked.seed + sample.index, asked.temperature, asked.top_k, asked.top_p)
            self._slots, token = insert(self._slots, slot, logits, row, sampling)
            self._rows[slot], first[slot] = self._queue.popleft(), [token]
        return first

    def _prefilled(self, sample: Sample) -> tuple:
        """(logits, row) of a sample's prompt; the same for the same adapter and whole prompt."""
        if sample.key not in self._kept:
            self._kept[sample.key] = self._prefill(sample.ids, sample.entry)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(sample.key)
        return self._kept[sample.key]

    def _prefill(self, ids: list[int], entry: Entry | None) -> tuple:
        bucket = next(length for length in self._buckets if length >= len(ids))
        tokens = np.zeros((1, bucket), np.int32)
        tokens[0, : len(ids)] = ids
        return prefill(self.model, self._adapters(entry), tokens, np.array([len(ids)]), max_length=bucket)

    def _adapters(self, entry: Entry | None) -> Rows | None:
        return None if self.bank is None else self.bank.rows_of([entry])

    def _extend(self, sample: Sample, new: list[int]) -> None:
        """Adds a sample's new tokens, up to its end."""
        asked = sample.request
        for token in new:
            if token in self._stops or token in sample.stops:
                return self._answer(sample, "stop")
            sample.tokens.append(token)
            if asked.stop and any(end in self._text(sample.tokens) for end in asked.stop):
                return self._answer(sample, "stop")
            if len(sample.tokens) == asked.max_new_tokens:
                return self._answer(sample, "length")

    def _answer(self, sample: Sample, reason: str, error: str | None = None) -> None:
        sample.ended = True
        text = before_first(self._text(sample.tokens), sample.request.stop)
        self._done.append(Completion(sample.id, sample.index, text, sample.tokens, reason, error))
        if all(other.ended for other in self._open[sample.id]):
            del self._open[sample.id]

    def _ids(self, prompt: Prompt | Ids) -> list[int]:
        ids = list(prompt) if isinstance(prompt, tuple) else encode_prompt(self.tokenizer, prompt)
        known = self.model.config.vocab_size
        require(max(ids) < known, "prompt: token id", max(ids), f"less than {known}, the model's tokens")
        return ids

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _entry(self, tenant: str) -> Entry:
        if self.bank is None:
            raise ValueError(f"tenant: {tenant!r} is not possible; expected None, for the engine has no bank")
        return self.bank.entry(tenant)


def capacity(bank: AdapterBank | None, row: DecodeState, slots: int, max_length: int) -> str:
    """What the slots need, how many rows like theirs fit into the memory that is free, and who may join.

    Args:
        row: the abstract state of one row.
    """
    a_row = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(row))
    text = f"engine: {slots} slots of {max_length} tokens, {slots * a_row / 1e9:.2f} GB ({a_row / 1e6:.2f} MB a row)"
    free = free_memory()
    if free is not None:
        text += f"; {free // a_row} such rows fit into the {free / 1e9:.1f} GB that are free"
    if bank is not None:
        text += f"; methods that may join: {', '.join(bank.methods)}"
    return text


def free_memory() -> int | None:
    """Bytes that are free on the first device, or of a CPU's main memory; None where neither is known."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not on this system
        return None
