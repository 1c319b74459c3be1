"""Engine: continuous batching. Requests of many tenants share a fixed number of slots. A row that ends leaves its slot,
and the next request takes it while the other rows continue.

Any thread may submit, cancel and stream. One thread at a time drives: it makes rounds. In each, free slots are filled,
prompts advance by a chunk, and all rows decode a few tokens. If an exception or an interrupt ends a round halfway, the
next round starts again from the open requests: unfinished answers are decoded once more from their prompts, to the same
tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager

import jax

from ..adapters.bank import AdapterBank, Entry
from ..backbone.transformer import Transformer
from ..config import printable, shorten
from ..data.examples import Ids, Prompt, stop_token_ids
from ..messages import say, warn
from .admission import Admission
from .capacity import capacity
from .decoder import Decoder
from .open_requests import OpenRequests
from .prefills import PromptFailed, token_bytes
from .prefix_cache import PrefixCacheStats
from .request import Completion, Piece, Request, check_request
from .ticket import Sample, Ticket, is_request_error

#: Prompts that are prefilled whole between two dispatches, at most, while rows decode.
PREFILLS = 2
#: Tokens of prompts that are computed in chunks between two dispatches. A CPU computes few tokens as fast per token.
CHUNK, CPU_CHUNK = 256, 64


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
        prefix_cache_bytes: int | None = None,
        prefill_chunk: int | None = None,
        block_size: int = 16,
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
            prefix_cache_bytes: memory for the beginnings of prompts, which later prompts of the base model and of
                adapters with scope `response` share. None: half of what the slots' caches take. 0: nothing is shared.
            prefill_chunk: tokens of such prompts that are computed per round, at most. Rows that decode wait for no
                more. None: 64 on a CPU, else 256.
            block_size: tokens per block. Prompts share complete blocks.

        Reports the memory that the slots need and, where the free memory is known, how many slots would fit.
        """
        chunk = prefill_chunk
        if chunk is None:
            chunk = CPU_CHUNK if jax.default_backend() == "cpu" else CHUNK
        sizes = {"slots": slots, "max_length": max_length, "prefill_chunk": chunk, "block_size": block_size}
        for name, count in sizes.items():
            if type(count) is not int or count < 1:
                raise ValueError(f"{name} is {shorten(count)}; give a whole number of at least 1")
        if prefix_cache_bytes is not None and (type(prefix_cache_bytes) is not int or prefix_cache_bytes < 0):
            raise ValueError(f"prefix_cache_bytes is {shorten(prefix_cache_bytes)}; give a number of bytes, or None")
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
        self._decoder = Decoder(
            model, bank, slots, max_length, block_size=block_size, chunk=chunk, cache_bytes=prefix_cache_bytes
        )
        self._prefills = self._decoder.prefills
        pool, cached = (blocks * block_size for blocks in (self._prefills.cache.blocks, self._prefills.cached))
        say(capacity(bank, self._decoder.row, slots, max_length, pool=pool, cached=cached))

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
        self._waiting: dict[int, Sample] = {}
        """by slot: samples that will decode there once their prompts are prefilled"""
        self._pins: dict[tuple[int, ...], list[bytes]] = {}
        """the keys of pinned prompts, by their ids"""
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

    @property
    def prefix_cache(self) -> PrefixCacheStats:
        """How the prefix cache fares since the engine was made."""
        cache, each = self._prefills.cache, self._prefills.size * token_bytes(self._decoder.row)
        return PrefixCacheStats(cache.queries, cache.hits, cache.known * each, cache.pinned_blocks * each)

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

    def pin(self, prefix: Prompt | Ids) -> int:
        """Keeps the beginning of prompts in the prefix cache, whatever else comes. The next rounds prefill it. Returns
        how many of its tokens are kept: those in complete blocks.

        Raises ValueError for a prefix that is too short or too long, and if the cache has no room for it next to what
        is pinned already.
        """
        check_request(Request(prefix))
        ids, cache = tuple(self._admission.ids(prefix)), self._prefills.cache
        if len(ids) > self.max_length:
            raise ValueError(f"pin: {len(ids)} tokens are more than the engine's max_length {self.max_length}")
        keys = cache.keys(ids)
        if not keys:
            raise ValueError(f"pin: {len(ids)} tokens are less than a block of {cache.size}; give a longer prefix")
        with self._lock:
            pins = self._pins | {ids[: len(keys) * cache.size]: keys}
            needed = len({key for of_one in pins.values() for key in of_one})
            if needed > self._prefills.cached:
                raise ValueError(
                    f"pin: the pinned prefixes would have {needed * cache.size} tokens, and the cache has room for "
                    f"{self._prefills.cached * cache.size}; make the engine with larger prefix_cache_bytes"
                )
            self._pins = pins
        return len(keys) * cache.size

    def unpin(self, prefix: Prompt | Ids) -> None:
        """Lets a pinned prefix leave the cache when its room is needed. Raises ValueError for one that isn't pinned."""
        ids = tuple(self._admission.ids(prefix))
        ids = ids[: len(ids) // self._prefills.cache.size * self._prefills.cache.size]
        with self._lock:
            if ids not in self._pins:
                raise ValueError(f"unpin: {shorten(prefix)} is not pinned")
            self._pins = {kept: keys for kept, keys in self._pins.items() if kept != ids}

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
            self._prefills.pin(self._pins)
            first = self._fill()
            if not self._advance_prompts(first):
                return
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
                self._rows, self._waiting = [None] * self.slots, {}
                self._decoder.reset()
                self._requests.requeue()
            self._broken = True

    def _fill(self) -> dict[int, jax.Array]:
        """Moves queued samples into free slots. Returns the first token [1] of each, by slot. Where a prompt is
        prefilled in chunks, it starts, and the sample keeps the slot for it."""
        first, prefills = {}, 0
        self._waiting = {slot: sample for slot, sample in self._waiting.items() if not sample.completion}
        self._prefills.keep({sample.key for sample in self._waiting.values()})
        empty = [slot for slot, sample in enumerate(self._rows) if sample is None or sample.completion]
        busy, free = len(empty) < self.slots, [slot for slot in empty if slot not in self._waiting]
        while free:
            with self._lock:
                queue = self._requests.queue
                head = queue.head()
                if head is None:
                    break
                known, in_chunks = self._decoder.keeps(head), self._prefills.takes(head.entry)
                room = self._prefills.has_room(head.key) if in_chunks else not busy or prefills < PREFILLS
                if not known and not room:
                    break
                sample = queue.take()
            if in_chunks and not known:
                self._prefills.start(sample.key, sample.ids, sample.entry)
                self._waiting[free.pop(0)] = sample
                continue
            prefills += not known
            try:
                prefilled = self._decoder.prefilled(sample)
            except Exception as error:
                sample.failures += not isinstance(error, SystemError)  # C code turns an interrupt into a SystemError
                if sample.failures < 2:  # the driver gets the error, and the request a second try
                    raise
                self._fail(sample, error)
                continue
            self._insert(free.pop(0), sample, prefilled, first)
        return first

    def _advance_prompts(self, first: dict[int, jax.Array]) -> bool:
        """Computes a chunk of the prompts that samples wait for. Samples with a complete one move into their slots, and
        their first tokens into `first`. Returns False if a prompt failed, which ends the round."""
        try:
            self._prefills.advance()
        except PromptFailed as failed:
            for sample in [sample for sample in self._waiting.values() if sample.key == failed.key]:
                self._fail(sample, failed)
            with self._lock:
                kept = {ids: keys for ids, keys in self._pins.items() if (None, ids) != failed.key}
                if len(kept) < len(self._pins):
                    warn(f"engine: a pinned prefix could not be prefilled, and is no longer pinned: {failed}")
                    self._pins = kept
                self._news.notify_all()
            return False
        for slot, sample in list(self._waiting.items()):
            if self._decoder.keeps(sample):
                self._insert(slot, sample, self._decoder.prefilled(sample), first)
                del self._waiting[slot]
        return True

    def _insert(self, slot: int, sample: Sample, prefilled, first: dict[int, jax.Array]) -> None:
        token = self._decoder.insert(slot, prefilled, sample.sampling)
        if token is not None:
            first[slot] = token
        self._rows[slot] = sample

    def _fail(self, sample: Sample, error: Exception) -> None:
        self._requests.end(sample, "error", f"the prompt could not be prefilled: {shorten(str(error), 200)}")

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
