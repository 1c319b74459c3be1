"""Which of an engine's requests are open, which samples wait for a slot, and which answers run() has yet to give.

The open tickets and the answers are always right. After an exception in a round, `requeue` makes the queue from them.
"""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import replace
from queue import Empty, SimpleQueue

from ..inference.sampling import derived_seed
from ..io.checks import shorten
from .queue import FairQueue
from .request import Completion
from .ticket import Sample, Ticket


class QueueFull(ValueError):
    """The engine's queue is full; take answers first."""

    def __init__(self, message: str, *, tenant_full: bool = False):
        super().__init__(message)
        self.tenant_full = tenant_full
        """whether it is the queue of the request's tenant that is full; False: that of all tenants"""


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Ctrl-C waits for the end of the body: it could leave a request half changed, or JAX without its own state. A
    second one ends the body at once. Threads other than the main one receive no signals."""
    handler, received = signal.getsignal(signal.SIGINT), []
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return

    def hold_back(*arguments) -> None:
        signal.signal(signal.SIGINT, handler)
        received.append(arguments)

    signal.signal(signal.SIGINT, hold_back)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if received:
            handler(*received[0])


class OpenRequests:
    """All tickets, samples and answers of one engine. `requeue` is called with the lock held."""

    def __init__(self, tokenizer, seed: int, limit: int | None, limit_per_tenant: int | None):
        """
        Args:
            seed: requests without a seed get one derived from this and their number, the order of submission.
            limit, limit_per_tenant: samples that may wait at most; None: no limit.
        """
        self.tokenizer, self.seed, self.limit, self.limit_per_tenant = tokenizer, seed, limit, limit_per_tenant
        self.lock = threading.RLock()
        """held while anything here is read or changed; a plain `with` on it is safe against interrupts"""
        self.news = threading.Condition(self.lock)
        """notified when a round has ended, and when requests come or are cancelled"""
        self.tickets: OrderedDict[Hashable, Ticket] = OrderedDict()
        self.queue: FairQueue[Sample] = FairQueue()
        self.done: OrderedDict[int, Completion] = OrderedDict()
        """answers that run() has yet to give, by the sample's number"""
        self.dropped: SimpleQueue[Ticket] = SimpleQueue()
        """requests whose streams were dropped: to be cancelled"""
        self._request_numbers, self._sample_numbers = itertools.count(), itertools.count()
        """in the order of submission"""

    @interrupts_held_back()
    def add(self, ticket: Ticket, samples: list[Sample], error: str | None) -> None:
        """Takes in a new ticket and queues its samples; with an `error`, answers it at once. Raises QueueFull."""
        with self.lock:
            if ticket.id is not None and ticket.id in self.tickets:
                raise ValueError(f"id: {shorten(ticket.id)} belongs to an open request; choose another")
            tenant = ticket.request.tenant if isinstance(ticket.request.tenant, str) else None
            self._require_room(tenant, len(samples) or 1)  # a request that is answered by an error counts too
            ticket.times.queued = time.monotonic()
            number, first = next(self._request_numbers), next(self._sample_numbers)
            if ticket.id is None:
                numbers = itertools.chain([number], self._request_numbers)  # an id of a client may be this
                ticket.id = next(n for n in numbers if n not in self.tickets)
            if ticket.request.seed is None:
                ticket.request = replace(ticket.request, seed=derived_seed(self.seed, number))
            self.news.notify_all()
            if error is not None:
                ticket.error = error
                if not ticket.streamed:
                    self.done[first] = Completion(ticket.id, 0, "", [], "error", error)
                return
            ticket.samples = samples
            for sample in samples:
                sample.number = first if sample is samples[0] else next(self._sample_numbers)
                if sample not in samples[0].followers:
                    self.queue.put(tenant, sample.number, sample)
            self.tickets[ticket.id] = ticket

    @interrupts_held_back()
    def end(self, sample: Sample, reason: str, error: str | None = None) -> None:
        """Gives a sample its answer, unless it has one."""
        with self.lock:
            if sample.completion is not None:
                return
            for follower in sample.followers if error is not None else ():
                self.end(follower, reason, error)
            if error is None and sample.text is not None and sample.text.finish():
                reason = "stop"
            text = sample.full_text(self.tokenizer, partial=error is not None)
            logprobs = None if sample.request.logprobs is None else sample.logprobs
            found = sample.tokens, reason, error, logprobs, sample.prompt_logprobs, len(sample.ids), sample.score
            completion = Completion(sample.ticket.id, sample.index, text, *found)
            self.queue.remove(sample.request.tenant, sample.number)
            if not sample.ticket.streamed:
                self.done[sample.number] = completion
            sample.completion = completion
            if sample.ticket.ended and self.tickets.get(sample.ticket.id) is sample.ticket:
                self._close(sample.ticket)

    def cancel(self, ticket: Ticket) -> bool:
        """Gives the samples without an answer the error "cancelled". Returns whether the request was open."""
        with self.lock:
            if self.tickets.get(ticket.id) is not ticket:
                return False
            for sample in ticket.samples:
                self.end(sample, "error", "cancelled")
            self.news.notify_all()
        return True

    def give_up(self, ticket: Ticket) -> None:
        """Cancels a request whose stream was dropped. If this thread holds the lock, the next round does it: the
        garbage collector then found the stream in the middle of a change."""
        self.dropped.put(ticket)
        if not self.lock._is_owned():  # type: ignore[attr-defined]
            self.cancel_dropped()

    def cancel_dropped(self) -> None:
        with suppress(Empty):
            while True:
                self.cancel(self.dropped.get_nowait())

    @property
    def running(self) -> list[Sample]:
        """The samples that have left the queue and have no answer."""
        with self.lock:
            waiting = set(self.queue)
            return [sample for sample in self._open if sample not in waiting]

    @property
    def waiting(self) -> list[Sample]:
        """The samples in the queue."""
        with self.lock:
            return list(self.queue)

    def requeue(self) -> None:
        """Queues all samples without an answer again, in the order they came. They start from their prompts; sampling
        depends on seed and position only, so their tokens will be the same."""
        self.queue = FairQueue()
        for sample in self._open:
            sample.restart(self.tokenizer)  # the new tokens replace those it had
            self.queue.put(sample.request.tenant, sample.number, sample)

    def put_back(self, sample: Sample) -> None:
        """Queues a sample again that has given up its slot, as its tenant's next one."""
        with self.lock:
            sample.restart(self.tokenizer)
            self.queue.put(sample.request.tenant, sample.number, sample, first=True)

    @property
    def _open(self) -> list[Sample]:
        """The samples without an answer that wait or decode."""
        samples = [one for ticket in self.tickets.values() for one in ticket.samples if one.completion is None]
        following = {follower for one in samples for follower in one.followers}
        return [one for one in samples if one not in following]

    def _close(self, ticket: Ticket) -> None:
        ticket.times.ended = time.monotonic()
        alone = copy(ticket)
        alone.samples = []
        for sample in ticket.samples:
            sample.ticket = alone  # in a reference cycle, the adapters would stay until the garbage collector runs
        del self.tickets[ticket.id]

    def _require_room(self, tenant: str | None, new: int) -> None:
        """Raises QueueFull if the queue has no room for new samples of a tenant."""
        waiting, own = len(self.queue), self.queue.waiting(tenant)
        if self.limit is not None and waiting + new > self.limit:
            raise QueueFull(f"the queue holds {waiting} of {self.limit} samples; take answers first")
        if self.limit_per_tenant is not None and own + new > self.limit_per_tenant:
            message = f"the queue holds {own} of {self.limit_per_tenant} samples of tenant {shorten(tenant)}; "
            raise QueueFull(message + "take answers first", tenant_full=True)
