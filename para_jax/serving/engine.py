"""Engine: continuous batching. Requests of many tenants share a fixed number of slots. A row that ends leaves, and the
next request takes its place while the others go on.

Any thread may submit, cancel and stream. One thread at a time drives: it makes rounds, in which free slots are filled
and all rows decode a few tokens. What is certain is kept in `_open`, the requests without a complete answer; the queue
and the slots follow from it. If an exception or an interrupt ends a round halfway, the next round starts them again
from there: unfinished answers are decoded once more from their prompts, to the same tokens.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import jax
import numpy as np

from ..adapters.bank import AdapterBank, Entry
from ..adapters.rows import Rows
from ..backbone.transformer import Transformer
from ..config import printable, require, shorten
from ..data.examples import Ids, Prompt, encode_prompt, most_characters, special_stop_ids, stop_token_ids, turn_stop_ids
from ..devices import say
from ..inference.generate import up_to_multiple
from ..inference.sampling import derived_seed
from ..model import prefill
from .capacity import KEPT, capacity
from .queue import FairQueue
from .request import Completion, Piece, Request, check_request, stop_texts
from .sample import Sample, Ticket, of_the_request
from .slots import empty_slots, insert, row_sampling, steps

#: Decode steps per dispatch, after which the tokens are looked at, and prompts that are prefilled at most before the
#: next dispatch while rows decode.
STEPS, PREFILLS = 4, 2


class QueueFull(ValueError):
    """The engine's queue holds as many requests as it may; take answers first."""


class Engine:
    """Serves requests of the bank's tenants.

    `submit`, `cancel` and `stream` may be called from any thread at any time. One thread at a time drives, by `run` or
    `step`; a second one gets a RuntimeError. A stream drives by itself while nobody else does. Whatever a round raises,
    the engine can go on: run() again gives all answers that are missing.
    """

    def __init__(
        self,
        model: Transformer,
        bank: AdapterBank | None,
        tokenizer,
        *,
        slots: int,
        max_length: int,
        queue_limit: int | None = None,
        queue_limit_per_tenant: int | None = None,
        seed: int = 0,
    ):
        """
        Args:
            bank: its tenants may ask, with the methods that may join it. None: the base model alone.
            slots: rows that decode together.
            max_length: tokens per row, prompt and answer.
            queue_limit: samples that may wait at most; more are refused. None: no limit.
            queue_limit_per_tenant: the same for each tenant. Tenants that wait are served in turn.
            seed: requests without a seed get one drawn from this one and their number, the order of submission.

        Says on stderr what the slots need and, where the memory is known, how many would fit.
        """
        for name, value in (("slots", slots), ("max_length", max_length)):
            require(type(value) is int and value >= 1, name, value, "a whole number of at least 1")
        longest = model.config.max_positions
        require(2 <= max_length <= longest, "max_length", max_length, f"2 to {longest} tokens, the model's positions")
        for name, limit in (("queue_limit", queue_limit), ("queue_limit_per_tenant", queue_limit_per_tenant)):
            require(limit is None or (type(limit) is int and limit >= 1), name, limit, "at least 1, or None")
        self.model, self.bank, self.tokenizer, self.slots = model, bank, tokenizer, slots
        self.max_length, self.seed = max_length, seed
        self.queue_limit, self.queue_limit_per_tenant = queue_limit, queue_limit_per_tenant
        self._leaves, self._treedef = jax.tree.flatten(model)
        self._stops = frozenset(stop_token_ids(tokenizer, model.config.eos_token_ids))
        self._buckets = sorted({min(up_to_multiple(-(-max_length // part), 16), max_length) for part in (4, 2, 1)})
        self._most_characters = most_characters(tokenizer, max_length)
        one, base = np.zeros((1, 1), np.int32), self._adapters(None)
        self._row = jax.eval_shape(lambda: prefill(model, base, one, 1, max_length=max_length)[1])
        say(capacity(bank, self._row, slots, max_length))

        self._lock = threading.RLock()
        """held briefly by whoever reads or changes what follows; a plain `with` on it is safe against interrupts"""
        self._numbers, self._places = itertools.count(), itertools.count()
        """of requests, and of samples, in the order of submission"""
        self._open: OrderedDict[Hashable, Ticket] = OrderedDict()
        self._queue: FairQueue[Sample] = FairQueue()
        self._done: OrderedDict[int, Completion] = OrderedDict()
        """answers that run() has yet to give, by the sample's number"""
        self._refused: dict[int, str | None] = {}
        """of these, requests that were refused, with their tenants: they count as waiting, so that they are bounded"""
        self._torn = False
        """whether the queue is being changed: an interrupt may have left it halfway"""
        self._news = threading.Condition(self._lock)
        self._rounds = 0

        self._driving = threading.Lock()
        """held during a round; the rest belongs to whoever holds it"""
        self._driver: threading.Thread | None = None
        """the thread of run() or step()"""
        self._rows: list[Sample | None] = [None] * slots
        self._kept: OrderedDict[tuple, tuple] = OrderedDict()
        self._slots = empty_slots(self._row, slots)
        self._broken = False
        """whether a round is under way; if it still is when the next one starts, something ended it halfway"""

    @property
    def open(self) -> int:
        """Requests whose answers have yet to be given."""
        return len(self._open) + len(self._done)

    def warm_up(self) -> None:
        """Compiles everything. Afterwards nothing is compiled, unless an adapter of a config joins that is unlike all
        before it in more than rank and sites. Raises ValueError while requests are open, whose slots it would use."""
        with self._driving:
            require(not self._open, "warm_up: open requests", len(self._open), "none: take their answers first")
            self._begin()
            sampling = row_sampling([None])
            for bucket in self._buckets:
                logits, row = self._prefill([0] * min(bucket, self.max_length - 1), None)
                self._slots, _ = insert(self._slots, 0, logits, row, sampling)
            tokens = self._decode([None] * self.slots)
            jax.block_until_ready(tokens)
            self._broken = False

    # ------------------------------------------------------------------------------------------- calls from any thread

    def submit(self, request: Request, *, entry: Entry | None = None) -> Hashable:
        """Queues a request and returns its id. The adapter that its tenant has now answers it.

        A request that can't be served (a bad field, an unknown tenant, too long) is answered with a Completion whose
        finish_reason is "error".

        Args:
            entry: the adapter that answers, as `bank.entry(name)` gave it, whatever the tenant's name stands for now.

        Raises QueueFull, and ValueError for an id that is still open or can't be one.
        """
        return self._submit(request, entry, streamed=False).id

    def cancel(self, id: Hashable) -> bool:
        """Ends a request at once: samples without an answer are answered with the error "cancelled", and their slots
        are free. Returns whether the request was open."""
        with self._lock:
            ticket = self._open.get(id)
            if ticket is None:
                return False
            for sample in ticket.samples:
                self._end(sample, "error", "cancelled")
            self._news.notify_all()
        return True

    def stream(self, request: Request | Hashable) -> Iterator[Piece]:
        """The pieces of a request's answer as they are made, tagged with their sample's index. The answer goes to the
        stream alone; run() does not give it. A stream that is closed before its end cancels the request.

        Args:
            request: the id of an open request, or a Request, which is submitted.

        Raises at the call: ValueError for an id that is not open or is streamed already, and the error of a request
        that was refused; QueueFull.
        """
        if isinstance(request, Request):
            ticket = self._submit(request, None, streamed=True)
            if ticket.error is not None:
                raise ValueError(ticket.error)
            return self._pieces(ticket)
        with self._lock:
            ticket = self._open.get(request)
            if ticket is None:
                return iter(self._pieces_of_ended(request))
            if ticket.streamed:
                raise ValueError(f"stream: the request {shorten(request)} is streamed already; each has one stream")
            ticket.streamed = True
            for sample in ticket.samples:
                self._done.pop(sample.number, None)
                sample.read(self.tokenizer)
            return self._pieces(ticket)

    # ----------------------------------------------------------------------------------------------- the driver's calls

    def run(self) -> Iterator[Completion]:
        """Answers as they end, until every request is answered; more may be submitted meanwhile. Raises RuntimeError
        if another thread drives."""
        with self._claimed():
            while self._done or self._open:
                if not self._done:
                    self._round()
                while self._done:
                    with self._lock:
                        number = next(iter(self._done), None)
                    try:
                        completion = self._done[number]
                        del self._done[number]  # no call from here to the yield: no interrupt can lose the answer
                    except KeyError:  # a stream has taken it
                        continue
                    yield completion
                    self._driver = threading.current_thread()  # a generator may go on in another one

    def step(self) -> list[Completion]:
        """Makes one round and returns the answers that have ended. Raises RuntimeError if another thread drives."""
        with self._claimed():
            self._round()
            with self._lock:
                return [self._given(number) for number in list(self._done)]

    @contextmanager
    def _claimed(self) -> Iterator[None]:
        with self._lock:
            before, me = self._driver, threading.current_thread()
            if before is not None and before is not me and before.is_alive():
                raise RuntimeError(f"the thread {before.name} drives the engine; only one may, by run() or step()")
            self._driver = me
            self._settle()
        try:
            yield
        finally:
            with self._lock:
                self._driver = before
                self._news.notify_all()

    # ------------------------------------------------------------------------------------------------------- one round

    def _round(self) -> None:
        """Fills free slots, makes some decode steps, and takes the tokens."""
        with self._driving:
            self._begin()
            first = self._fill()
            active = [(slot, sample) for slot, sample in enumerate(self._rows) if sample and not sample.completion]
            if active:
                tokens = self._decode([sample.sampling if sample else None for sample in self._rows])
                first, tokens = jax.device_get((first, tokens))
                for slot, sample in active:
                    self._extend(sample, [*(int(token[0]) for token in first.get(slot, [])), *tokens[:, slot].tolist()])
            with self._lock:
                self._rows = [sample if sample and not sample.completion else None for sample in self._rows]
                self._broken = False
                self._rounds += 1
                self._news.notify_all()

    def _decode(self, rows: list[tuple | None]) -> jax.Array:
        """The next tokens of all slots, from how each row is sampled; None is a row without a sample."""
        live = np.array([row is not None for row in rows])
        self._slots, tokens = steps(self._treedef, self._leaves, self._slots, row_sampling(rows), live, STEPS)
        return tokens

    def _begin(self) -> None:
        """Notes that the slots are in use, and makes them again if their last use was not ended."""
        with self._lock:
            if self._broken or self._torn:
                self._restart()
            self._broken = True

    def _restart(self) -> None:
        """Makes slots and queue again from the open requests: their samples wait in the order they came, from their
        prompts. Sampling is by seed and position, so their tokens will be the same."""
        self._rows, self._slots = [None] * self.slots, None  # the old slots may have been donated
        self._kept.clear()
        self._slots = empty_slots(self._row, self.slots)
        self._queue = FairQueue()
        self._settle()
        for ticket in self._open.values():
            for sample in ticket.samples:
                if sample.completion is None:
                    sample.restart(self.tokenizer)
                    self._queue.put(sample.request.tenant, sample.number, sample)
        self._torn = False

    def _settle(self) -> None:
        """Finishes what an interrupt may have left of `_end`: an answer that is among the done ones has been given."""
        if self._torn or self._broken:
            for id, ticket in list(self._open.items()):
                for sample in ticket.samples:
                    sample.completion = sample.completion or self._done.get(sample.number)
                if ticket.ended:
                    del self._open[id]

    def _fill(self) -> dict[int, list]:
        """Takes queued samples into free slots; the first token of each, by slot."""
        first, prefills = {}, 0
        free = [slot for slot, sample in enumerate(self._rows) if sample is None or sample.completion]
        busy = len(free) < self.slots
        while free:
            with self._lock:
                head = self._queue.head()
                known = head is not None and head.key in self._kept
                if head is None or (busy and not known and prefills == PREFILLS):
                    break
                sample = self._queue.take()
            prefills += not known
            try:
                logits, row = self._prefilled(sample)
            except Exception as error:
                sample.failures += not isinstance(error, SystemError)  # which is what C code makes of an interrupt
                if sample.failures < 2:  # the driver hears of it, and the request gets a second try
                    raise
                self._end(sample, "error", f"the prompt could not be prefilled: {shorten(str(error), 200)}")
                continue
            slot = free.pop(0)
            self._slots, token = insert(self._slots, slot, logits, row, row_sampling([sample.sampling]))
            self._rows[slot], first[slot] = sample, [token]
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
        """Adds a sample's new tokens, up to its end. An error in making its text ends this sample alone."""
        request = sample.request
        with self._lock:
            if sample.completion is not None:  # cancelled during the round
                return
            try:
                for token in new:
                    if not request.ignore_eos and (token in self._stops or token in sample.stops):
                        return self._end(sample, "stop")
                    sample.tokens.append(token)
                    if sample.text is not None and sample.text.add(token):
                        return self._end(sample, "stop")
                    if len(sample.tokens) == request.max_new_tokens:
                        return self._end(sample, "length")
            except BaseException as error:
                if not of_the_request(error):
                    raise
                self._end(sample, "error", f"the answer's tokens have no text: {shorten(str(error), 200)}")

    def _end(self, sample: Sample, reason: str, error: str | None = None) -> None:
        """Gives a sample its answer, unless it has one."""
        with self._lock:
            if sample.completion is not None:
                return
            if error is None and sample.text is not None:
                reason = "stop" if sample.text.finish() else reason
            text = sample.whole_text(self.tokenizer, partial=error is not None)
            completion = Completion(sample.ticket.id, sample.index, text, sample.tokens, reason, error)
            self._torn = True
            self._queue.remove(sample.request.tenant, sample.number)
            if not sample.ticket.streamed:
                self._done[sample.number] = completion
            sample.completion = completion
            if sample.ticket.ended and self._open.get(sample.ticket.id) is sample.ticket:
                del self._open[sample.ticket.id]
            self._torn = False

    # ------------------------------------------------------------------------------------------------------ submission

    def _submit(self, request: Request, entry: Entry | None, streamed: bool) -> Ticket:
        """The ticket of a request. One that can't be served has an error and no samples."""
        ticket = Ticket(request, request.id, streamed)
        self._require_new(ticket.id)
        samples, error = [], None
        try:
            samples = self._samples(ticket, entry)
        except BaseException as raised:
            if not of_the_request(raised):
                raise
            own = isinstance(raised, ValueError)
            error = str(raised) if own else printable(f"{type(raised).__name__}: {raised}")
        with self._lock:
            if ticket.id is not None:
                self._require_new(ticket.id)
            tenant = request.tenant if isinstance(request.tenant, str) else None
            self._require_room(tenant, len(samples) or 1)
            number, first = next(self._numbers), next(self._places)
            if ticket.id is None:
                ticket.id = next(n for n in itertools.chain([number], self._numbers) if n not in self._open)
            if request.seed is None:
                ticket.request = replace(request, seed=derived_seed(self.seed, number))
            if error is not None:
                ticket.error = error
                if not streamed:
                    self._done[first], self._refused[first] = Completion(ticket.id, 0, "", [], "error", error), tenant
                return ticket
            self._torn = True
            for sample in samples:
                sample.number = first if sample is samples[0] else next(self._places)
                self._queue.put(tenant, sample.number, sample)
            ticket.samples = samples
            self._open[ticket.id] = ticket
            self._torn = False
            self._news.notify_all()
        return ticket

    def _samples(self, ticket: Ticket, entry: Entry | None) -> list[Sample]:
        """The samples of a request. Raises ValueError for one that can't be served."""
        request = ticket.request
        check_request(request)
        for name in ("queue_limit", "queue_limit_per_tenant"):
            limit = getattr(self, name)
            require(limit is None or request.n <= limit, "n", request.n, f"at most {limit}, the engine's {name}")
        if entry is None and request.tenant is not None:
            entry = self._entry(request.tenant)
        ids = self._ids(request.prompt)
        if len(ids) + request.max_new_tokens > self.max_length:
            raise ValueError(
                f"prompt: {len(ids)} tokens and max_new_tokens {request.max_new_tokens} are more than the engine's "
                f"max_length {self.max_length}"
            )
        stops = special_stop_ids(self.tokenizer, stop_texts(request)) + turn_stop_ids(self.tokenizer, request.prompt)
        stops += tuple(request.stop_token_ids)
        made = [Sample(ticket, index, ids, entry, stops) for index in range(request.n)]
        for sample in made:
            sample.read(self.tokenizer)
        return made

    def _require_new(self, id: Hashable) -> None:
        try:
            taken = id in self._open
        except TypeError:
            raise ValueError(f"id: {shorten(id)} is not hashable; give a text or a number") from None
        require(not taken, "id", id, "one that no open request has")

    def _require_room(self, tenant: str | None, new: int) -> None:
        """Raises QueueFull if the queue has no room for new samples of a tenant. Requests that were refused count
        until their errors are taken."""
        if self.queue_limit is None and self.queue_limit_per_tenant is None:
            self._refused.clear()
            return
        self._refused = {number: name for number, name in self._refused.items() if number in self._done}
        waiting = len(self._queue) + len(self._refused)
        if self.queue_limit is not None and waiting + new > self.queue_limit:
            raise QueueFull(f"the queue holds {waiting} of {self.queue_limit} samples; take answers first")
        own = self._queue.waiting(tenant) + sum(name == tenant for name in self._refused.values())
        if self.queue_limit_per_tenant is not None and own + new > self.queue_limit_per_tenant:
            raise QueueFull(
                f"the queue holds {own} of {self.queue_limit_per_tenant} samples of tenant {shorten(tenant)}; "
                "take answers first"
            )

    def _ids(self, prompt: Prompt | Ids) -> list[int]:
        ids = (
            list(prompt)
            if isinstance(prompt, tuple)
            else encode_prompt(self.tokenizer, prompt, most=self._most_characters)
        )
        known = self.model.config.vocab_size
        require(max(ids) < known, "prompt: token id", max(ids), f"less than {known}, the model's tokens")
        return ids

    def _entry(self, tenant: str) -> Entry:
        if self.bank is None:
            raise ValueError(f"tenant: {shorten(tenant)} is not possible; expected None, for the engine has no bank")
        return self.bank.entry(tenant)

    # --------------------------------------------------------------------------------------------------------- streams

    def _pieces(self, ticket: Ticket) -> Iterator[Piece]:
        """What a ticket's samples make, as it comes. If a round of ours raises, run() will give the answer."""
        given = [0] * len(ticket.samples)
        left = set(range(len(ticket.samples)))
        try:
            while left:
                with self._lock:
                    rounds = self._rounds
                    found = [piece for i in sorted(left) if (piece := self._piece(ticket.samples[i], given[i]))]
                for piece in found:
                    given[piece.index] += len(piece.tokens)
                    if piece.finish_reason is not None:
                        left.remove(piece.index)
                    yield piece
                if left and not found:
                    self._advance(rounds)
        except GeneratorExit:
            self.cancel(ticket.id)
            raise
        except BaseException:
            with self._lock:
                ticket.streamed = False
                self._done |= {s.number: s.completion for s in ticket.samples if s.completion is not None}
            raise

    def _pieces_of_ended(self, id: Hashable) -> list[Piece]:
        """The pieces of an answer that run() has yet to give, one per sample, and takes it. Raises its error."""
        found = [number for number, completion in self._done.items() if completion.id == id]
        if not found:
            raise ValueError(f"stream: no open request has the id {shorten(id)}; give the id of one, or a Request")
        ended = [self._given(number) for number in found]
        for completion in ended:
            if completion.error is not None:
                raise ValueError(completion.error)
        return [Piece(c.index, c.text, c.tokens, c.finish_reason) for c in ended]

    def _piece(self, sample: Sample, given: int) -> Piece | None:
        """What a sample has made after its first `given` tokens; None for nothing."""
        ended, made = sample.completion, len(sample.tokens)
        if ended is None and made <= given:  # fewer after an interrupt: the same tokens come again
            return None
        pieces = sample.text.pieces if sample.text is not None else []
        text = "".join(pieces[given:] if ended else pieces[given:made])
        tokens = sample.tokens[given:]
        return Piece(sample.index, text, tokens, *((ended.finish_reason, ended.error) if ended else ()))

    def _advance(self, rounds: int) -> None:
        """Returns when a round has ended after the first `rounds`: another thread's, or else one of our own."""
        with self._lock:
            driver = self._driver
            if driver is not None and driver is not threading.current_thread() and driver.is_alive():
                if self._rounds == rounds:
                    self._news.wait(timeout=1.0)  # a while, in case an interrupt has swallowed the news
                return
        self._round()

    def _given(self, number: int) -> Completion:
        """Takes an answer out of those that run() has yet to give."""
        self._refused.pop(number, None)
        return self._done.pop(number)
