"""Engine: continuous batching. Requests of many tenants share a fixed number of slots. A row that ends leaves its slot,
and the next request takes it while the other rows continue.

Any thread may submit, cancel and stream. One thread at a time drives: it makes rounds, in which free slots are filled
and all rows decode a few tokens. If an exception or an interrupt ends a round halfway, the next round starts again from
the open requests: unfinished answers are decoded once more from their prompts, to the same tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager

import jax

from ..adapters.bank import AdapterBank, Entry
from ..backbone.transformer import Transformer
from ..config import printable, shorten
from ..data.examples import stop_token_ids
from ..messages import say
from .admission import Admission
from .capacity import capacity
from .decoder import Decoder
from .open_requests import OpenRequests
from .request import Completion, Piece, Request
from .ticket import Sample, Ticket, is_request_error

#: Prompts that are prefilled between two dispatches, at most, while rows decode.
PREFILLS = 2


class Engine:
    """Serves requests of a bank's tenants.

    `submit`, `cancel` and `stream` may be called from any thread at any time. One thread at a time drives, by `run` or
    `step`; a second one gets a RuntimeError. A stream drives by itself while no thread does. Whatever a round raises,
    the engine can continue: run() then gives all answers that are missing.
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
        stop_ids: Sequence[int] | None = None,
    ):
        """
        Args:
            bank: the tenants to serve; `bank.methods` lists the adapter methods that may join. None: the base model
                alone.
            slots: rows that decode together.
            max_length: tokens per row, prompt and answer.
            queue_limit: samples that may wait at most; more are refused. None: no limit.
            queue_limit_per_tenant: the same for each tenant. Waiting tenants are served in turn.
            seed: requests without a seed get one derived from this and their number, the order of submission.
            stop_ids: token ids that end every answer. None: the end tokens of the tokenizer and the model.

        Reports the memory that the slots need and, where the free memory is known, how many slots would fit.
        """
        for name, count in (("slots", slots), ("max_length", max_length)):
            if type(count) is not int or count < 1:
                raise ValueError(f"{name} is {shorten(count)}; give a whole number of at least 1")
        limits = {"queue_limit": queue_limit, "queue_limit_per_tenant": queue_limit_per_tenant}
        for name, limit in limits.items():
            if limit is not None and (type(limit) is not int or limit < 1):
                raise ValueError(f"{name} is {shorten(limit)}; give a whole number of at least 1, or None")
        longest = model.config.max_positions
        if not 2 <= max_length <= longest:
            raise ValueError(f"max_length is {max_length}; give 2 to {longest} tokens, the model's positions")
        self.model, self.bank, self.tokenizer, self.slots, self.max_length = model, bank, tokenizer, slots, max_length
        self.queue_limit, self.queue_limit_per_tenant = queue_limit, queue_limit_per_tenant
        ends = stop_token_ids(tokenizer, model.config.eos_token_ids) if stop_ids is None else stop_ids
        self.stop_ids = tuple(ends)
        self._stops = frozenset(ends)
        self._admission = Admission(model, bank, tokenizer, max_length, limits)
        self._decoder = Decoder(model, bank, slots, max_length)
        say(capacity(bank, self._decoder.row, slots, max_length))

        self._requests = OpenRequests(tokenizer, seed, queue_limit, queue_limit_per_tenant)
        self._lock = self._requests.lock
        self._news = threading.Condition(self._lock)
        """notified when a round has ended, and when requests come or end"""
        self._rounds = 0
        self._driver: threading.Thread | None = None
        """the thread of run() or step()"""
        self._driving = threading.Lock()
        """held during a round; guards the decoder and what follows"""
        self._rows: list[Sample | None] = [None] * slots
        self._broken = False
        """True during a round; if it is True when the next one starts, something ended that round halfway"""

    @property
    def open(self) -> int:
        """The number of requests whose answers have yet to be given."""
        return len(self._requests.tickets) + len(self._requests.done)

    def warm_up(self) -> None:
        """Compiles everything. Afterwards nothing is compiled, unless an adapter joins whose config differs from all
        earlier ones in more than rank and sites. Raises ValueError while requests are open."""
        with self._driving:
            if self._requests.tickets:
                raise ValueError(f"warm_up: {len(self._requests.tickets)} requests are open; take their answers first")
            self._begin()
            self._decoder.warm_up()
            self._broken = False

    # ------------------------------------------------------------------------------------------- calls from any thread

    def submit(self, request: Request, *, entry: Entry | None = None) -> Hashable:
        """Queues a request and returns its id. It is answered by the adapter that its tenant has now.

        A request that cannot be served (a bad field, an unknown tenant, too long) is answered with a Completion whose
        finish_reason is "error".

        Args:
            entry: the adapter that answers, from `bank.entry(name)`, even if the tenant has another one by now.

        Raises QueueFull, and ValueError for an id that is still open or not hashable.
        """
        return self._submit(request, entry, streamed=False).id

    def cancel(self, id: Hashable) -> bool:
        """Ends a request at once: its samples without an answer get the error "cancelled", and their slots are free.
        Returns whether the request was open."""
        with self._lock:
            ticket = self._requests.tickets.get(id)
            if ticket is None:
                return False
            for sample in ticket.samples:
                self._requests.end(sample, "error", "cancelled")
            self._news.notify_all()
        return True

    def stream(self, request: Request | Hashable) -> Iterator[Piece]:
        """The pieces of a request's answer as they are decoded, each with its sample's index. The answer goes to the
        stream alone; run() does not give it. Closing a stream before its end cancels the request.

        Args:
            request: the id of an open request, or a Request, which is submitted.

        Raises at the call: ValueError for an id that is not open or is streamed already, the error of a request that
        was refused, and QueueFull.
        """
        if isinstance(request, Request):
            ticket = self._submit(request, None, streamed=True)
            if ticket.error is not None:
                raise ValueError(ticket.error)
            return self._pieces(ticket)
        with self._lock:
            ticket = self._requests.tickets.get(request)
            if ticket is None:
                return iter(self._pieces_of_ended(request))
            if ticket.streamed:
                raise ValueError(f"stream: the request {shorten(request)} is streamed already; each has one stream")
            ticket.streamed = True
            for sample in ticket.samples:
                self._requests.done.pop(sample.number, None)
                sample.follow_text(self.tokenizer)
            return self._pieces(ticket)

    # ----------------------------------------------------------------------------------------------- the driver's calls

    def run(self) -> Iterator[Completion]:
        """Answers as they end, until every request is answered. More may be submitted meanwhile. Raises RuntimeError if
        another thread drives."""
        done = self._requests.done
        with self._claimed():
            while done or self._requests.tickets:
                if not done:
                    self._round()
                while done:
                    with self._lock:
                        number = next(iter(done), -1)
                    try:
                        completion = done[number]
                        del done[number]  # no call from here to the yield, so no interrupt can lose the answer
                    except KeyError:  # a stream has taken it
                        continue
                    yield completion
                    self._driver = threading.current_thread()  # a generator may continue in another one

    def step(self) -> list[Completion]:
        """Makes one round and returns the answers that have ended. Raises RuntimeError if another thread drives."""
        with self._claimed():
            self._round()
            with self._lock:
                return [self._requests.take(number) for number in list(self._requests.done)]

    @contextmanager
    def _claimed(self) -> Iterator[None]:
        with self._lock:
            before, me = self._driver, threading.current_thread()
            if before is not None and before is not me and before.is_alive():
                raise RuntimeError(f"the thread {before.name} drives the engine; only one may, by run() or step()")
            self._driver = me
            if self._requests.torn or self._broken:
                self._requests.settle()
        try:
            yield
        finally:
            with self._lock:
                self._driver = before
                self._news.notify_all()

    # ------------------------------------------------------------------------------------------------------- one round

    def _round(self) -> None:
        """Fills free slots, decodes a few tokens, and adds them to the answers."""
        with self._driving:
            self._begin()
            first = self._fill()
            active = [(slot, sample) for slot, sample in enumerate(self._rows) if sample and not sample.completion]
            if active:
                rows = [sample.sampling if sample and not sample.completion else None for sample in self._rows]
                first, tokens = jax.device_get((first, self._decoder.decode(rows)))
                for slot, sample in active:
                    new = first[slot].tolist() if slot in first else []
                    self._extend(sample, new + tokens[:, slot].tolist())
            with self._lock:
                self._rows = [sample if sample and not sample.completion else None for sample in self._rows]
                self._broken = False
                self._rounds += 1
                self._news.notify_all()

    def _begin(self) -> None:
        """Notes that a round has begun. If the last one did not end, empties the slots and queues its samples again."""
        with self._lock:
            if self._broken or self._requests.torn:
                self._rows = [None] * self.slots
                self._decoder.reset()
                self._requests.requeue()
            self._broken = True

    def _fill(self) -> dict[int, jax.Array]:
        """Moves queued samples into free slots. Returns the first token [1] of each, by slot."""
        first, prefills = {}, 0
        free = [slot for slot, sample in enumerate(self._rows) if sample is None or sample.completion]
        busy = len(free) < self.slots
        while free:
            with self._lock:
                queue = self._requests.queue
                head = queue.head()
                known = head is not None and self._decoder.keeps(head)
                if head is None or (busy and not known and prefills == PREFILLS):
                    break
                sample = queue.take()
            prefills += not known
            try:
                prefilled = self._decoder.prefilled(sample)
            except Exception as error:
                sample.failures += not isinstance(error, SystemError)  # C code turns an interrupt into a SystemError
                if sample.failures < 2:  # the driver gets the error, and the request a second try
                    raise
                message = f"the prompt could not be prefilled: {shorten(str(error), 200)}"
                self._requests.end(sample, "error", message)
                continue
            slot = free.pop(0)
            first[slot] = self._decoder.insert(slot, prefilled, sample.sampling)
            self._rows[slot] = sample
        return first

    def _extend(self, sample: Sample, new: list[int]) -> None:
        """Adds new tokens to a sample, up to its end. An error in decoding its text ends this sample alone."""
        request = sample.request
        with self._lock:
            if sample.completion is not None:  # cancelled during the round
                return
            try:
                for token in new:
                    if not request.ignore_eos and (token in self._stops or token in sample.stops):
                        return self._requests.end(sample, "stop")
                    sample.tokens.append(token)
                    if sample.text is not None and sample.text.add(token):
                        return self._requests.end(sample, "stop")
                    if len(sample.tokens) == request.max_new_tokens:
                        return self._requests.end(sample, "length")
            except BaseException as error:
                if not is_request_error(error):
                    raise
                message = f"the answer's tokens have no text: {shorten(str(error), 200)}"
                self._requests.end(sample, "error", message)

    # ------------------------------------------------------------------------------------------------------ submission

    def _submit(self, request: Request, entry: Entry | None, streamed: bool) -> Ticket:
        """The ticket of a request. One that cannot be served has an error and no samples."""
        ticket = Ticket(request, streamed)
        self._requests.require_new(ticket.id)
        samples, error = [], None
        try:
            samples = self._admission.samples(ticket, entry)
        except BaseException as raised:
            if not is_request_error(raised):
                raise
            error = str(raised)
            if not isinstance(raised, ValueError):
                error = printable(f"{type(raised).__name__}: {raised}")
        with self._lock:
            self._requests.add(ticket, samples, error)
            self._news.notify_all()
        return ticket

    # --------------------------------------------------------------------------------------------------------- streams

    def _pieces(self, ticket: Ticket) -> Iterator[Piece]:
        """The pieces of a ticket's samples as they come. If a round of ours raises, run() will give the answer."""
        given = [0] * len(ticket.samples)
        left = set(range(len(ticket.samples)))
        try:
            while left:
                with self._lock:
                    rounds = self._rounds
                    found = [piece for i in sorted(left) if (piece := ticket.samples[i].piece(given[i]))]
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
                self._requests.done |= {s.number: s.completion for s in ticket.samples if s.completion is not None}
            raise

    def _pieces_of_ended(self, id: Hashable) -> list[Piece]:
        """Takes an answer that run() has yet to give, as one piece per sample. Raises its error."""
        found = [number for number, completion in self._requests.done.items() if completion.id == id]
        if not found:
            raise ValueError(f"stream: no open request has the id {shorten(id)}; give the id of one, or a Request")
        ended = [self._requests.take(number) for number in found]
        for completion in ended:
            if completion.error is not None:
                raise ValueError(completion.error)
        return [Piece(c.index, c.text, c.tokens, c.finish_reason) for c in ended]

    def _advance(self, rounds: int) -> None:
        """Returns when a round after the first `rounds` has ended: another thread's, or else one of our own."""
        with self._lock:
            driver = self._driver
            if driver is not None and driver is not threading.current_thread() and driver.is_alive():
                if self._rounds == rounds:
                    self._news.wait(timeout=1.0)  # bounded, in case an interrupt lost the notification
                return
        self._round()
