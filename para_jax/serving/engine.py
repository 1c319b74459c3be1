"""Engine: continuous batching. Requests of many tenants share a fixed number of slots. A row that ends leaves its slot,
and the next request takes it while the other rows continue.

Any thread may submit, cancel and stream. One thread at a time makes a round, in which free slots are filled, prompts
advance by a chunk, and all rows decode a few tokens. Ctrl-C waits for the end of the round. After an exception
the next round starts again from the open requests: unfinished answers are decoded once more from their prompts, to the
same tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial

import jax

from ..adapters.bank import AdapterBank, Entry
from ..backbone.transformer import Transformer
from ..data.examples import stop_token_ids
from ..inference.grammar import has_grammars
from ..io.checks import printable
from ..io.messages import say
from ..runtime.sharding import mesh_of, using
from .admission import Admission
from .capacity import blocks_for, capacity
from .decoder import Decoder
from .open_requests import OpenRequests
from .prefills import token_bytes
from .prefix_cache import PrefixCacheStats
from .request import Completion, Piece, Request
from .rounds import Rounds
from .speculation import SpeculationStats
from .stream import Stream
from .ticket import Sample, Ticket, is_request_error

#: Tokens of prompts in blocks that one program computes. A CPU computes few tokens as fast per token.
CHUNK, CPU_CHUNK = 256, 64
#: Tokens of prompts that are computed between two dispatches.
PREFILL_TOKENS, CPU_PREFILL_TOKENS = 4096, 1024


class Engine:
    """Serves requests of a bank's tenants, on the devices that the model was loaded over (load_backbone's `mesh`).

    `submit`, `cancel` and `stream` may be called from any thread at any time. `run` and `step` drive; two threads that
    do would share the answers. A stream drives by itself while no thread makes a round. Whatever a round raises, the
    engine can continue: run() then gives all answers that are missing.

    >>> engine = Engine(model, bank, tokenizer, slots=2, max_length=64)
    >>> engine.submit(Request("Hello", tenant="acme", max_new_tokens=4, ignore_eos=True))
    0
    >>> [len(completion.tokens) for completion in engine.run()]
    [4]
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
        kv_cache_bytes: int | None = None,
        prefix_cache_bytes: int | None = None,
        prefill_chunk: int | None = None,
        max_prefill_tokens: int | None = None,
        block_size: int = 64,
        max_logprobs: int = 0,
        speculative_tokens: int = 0,
    ):
        """
        Args:
            model: on one device or several of this host.
            bank: the tenants to serve; `bank.methods` lists the adapter methods that may join. None: the base model
                alone.
            slots: rows that decode together.
            max_length: tokens per row, prompt and answer.
            queue_limit: samples that may wait at most; more are refused. None: no limit.
            queue_limit_per_tenant: the same for each tenant. Waiting tenants are served in turn.
            seed: requests without a seed get one derived from this and their number, the order of submission.
            stop_ids: token ids that end every answer. None: the end tokens of the tokenizer and the model.
            kv_cache_bytes: memory for the keys and values of all rows and prompts, on each device. Rows take blocks of
                it as they grow. Where none is left, the youngest row gives up its slot, and starts again when there is
                room. None: enough for every slot to reach max_length, and for prefix_cache_bytes, but at most a
                quarter of a CPU's memory, or 0.9 of what is free on another device.
            prefix_cache_bytes: memory for the beginnings of prompts, which later prompts of the base model and of
                adapters with scope `response` share; they may also take what rows do not need. None: half of what the
                slots can take. 0: no blocks are shared.
            prefill_chunk: tokens of such prompts that one program computes. None: 64 on a CPU, else 256.
            max_prefill_tokens: tokens of prompts, with padding, that are computed in a round, at most: rows that decode
                wait for no more. More fill empty slots sooner. For each slot that does not decode, and each prompt
                that is only scored, a round computes at most a quarter of them. One chunk and one prompt that can't
                be cut (of scope `all`, or one to score) may run in each round, whatever their lengths. None: 1024 on
                a CPU, else 4096.
            block_size: tokens per block. Prompts share complete blocks, and each row wastes half a block on average.
            max_logprobs: alternatives per token that a request may ask for. Above 0, warm_up compiles a second decode
                program, for rounds in which a row asks for log-probabilities, and those that score prompts. 0: such
                requests are refused.
            speculative_tokens: tokens that are drafted for a row at most, from its prompt and its answer so far, for
                one pass to verify. The answers stay the same, except where two tokens are equally likely up to
                rounding. Passes are made only while they are likely to save time. 0: none.

        Reports the memory that this takes.
        """
        cpu = jax.default_backend() == "cpu"
        chunk = prefill_chunk or (CPU_CHUNK if cpu else CHUNK)
        prefill_tokens = max_prefill_tokens or (CPU_PREFILL_TOKENS if cpu else PREFILL_TOKENS)
        if not 2 <= max_length <= model.config.max_positions:
            raise ValueError(
                f"max_length is {max_length}; give 2 to {model.config.max_positions}, the model's positions"
            )
        if not 0 <= speculative_tokens < max_length:
            raise ValueError(f"speculative_tokens is {speculative_tokens}; give 0 to {max_length - 1}")
        ends = stop_token_ids(tokenizer, model.config.eos_token_ids) if stop_ids is None else tuple(stop_ids)
        if bank is not None:
            bank.fingerprint = model.fingerprint
        self.model, self.bank, self.tokenizer, self.slots, self.max_length = model, bank, tokenizer, slots, max_length
        self.queue_limit, self.queue_limit_per_tenant = queue_limit, queue_limit_per_tenant
        self.max_logprobs = max_logprobs
        self.stop_ids = ends
        mesh = mesh_of(model)
        if mesh is not None and mesh.is_multi_process:
            raise ValueError("Engine: the model lies on devices of several hosts; an engine serves from those of one")
        with using(mesh):
            self._decoder = Decoder(
                model,
                bank,
                slots,
                max_length,
                block_size=block_size,
                blocks=partial(blocks_for, slots, block_size, kv_cache_bytes, prefix_cache_bytes),
                chunk=chunk,
                shared=prefix_cache_bytes != 0,
                top=max_logprobs,
                guided=has_grammars(),
                drafted=speculative_tokens,
            )
            self._prefills = self._decoder.prefills
            rows = slots, self._prefills.cache
            self._admission = Admission(model, bank, tokenizer, max_length, max_logprobs, ends, *rows)
            say(capacity(bank, self._decoder.row, slots, max_length, self._prefills.cache.blocks, block_size))

        self._requests = OpenRequests(tokenizer, seed, queue_limit, queue_limit_per_tenant)
        self._rounds = Rounds(self._decoder, self._requests, frozenset(ends), prefill_tokens)

    def warm_up(self) -> None:
        """Compiles everything. Afterwards nothing is compiled, unless an adapter joins whose config differs from all
        earlier ones in more than rank and sites. Raises ValueError while requests are open."""
        self._rounds.warm_up()
        self._admission.grammars.prepare()

    @property
    def open(self) -> int:
        """The number of requests whose answers have yet to be given."""
        return len(self._requests.tickets) + len(self._requests.done)

    @property
    def running(self) -> dict[str | None, int]:
        """How many samples hold a slot, by tenant."""
        return per_tenant(self._requests.running)

    @property
    def decoding(self) -> int:
        """How many slots decoded in the last round."""
        return self._rounds.decoding

    @property
    def waiting(self) -> dict[str | None, int]:
        """How many samples wait for a slot, by tenant."""
        return per_tenant(self._requests.waiting)

    @property
    def kv_usage(self) -> float:
        """The share of the KV cache's blocks that hold running samples, from 0 to 1."""
        return self._decoder.rows.used / self._prefills.cache.blocks

    @property
    def preemptions(self) -> int:
        """How often a sample gave up its slot because the KV cache was full, since the engine was made."""
        return self._rounds.preempted

    @property
    def prefix_cache(self) -> PrefixCacheStats:
        """The statistics of the prefix cache since the engine was made."""
        cache, each = self._prefills.cache, self._prefills.size * token_bytes(self._decoder.row)
        return PrefixCacheStats(cache.queries, cache.hits, cache.known * each)

    @property
    def speculation(self) -> SpeculationStats:
        """What was drafted and accepted since the engine was made."""
        return self._rounds.speculated

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
        with self._requests.lock:
            ticket = self._requests.tickets.get(id)
            return ticket is not None and self._requests.cancel(ticket)

    def open_stream(self, request: Request, *, entry: Entry | None = None) -> Stream:
        """Queues a request and returns the stream of its answer, which goes to the stream alone; run() does not give
        it.

        Args:
            entry: as for `submit`.

        Raises at the call: ValueError for a request that cannot be served and for an id that is open, and QueueFull.
        """
        ticket = self._submit(request, entry, streamed=True)
        if ticket.error is not None:
            raise ValueError(ticket.error)
        return Stream(ticket, self._requests, self._advance)

    def stream(self, request: Request) -> Iterator[Piece]:
        """As `open_stream`: the pieces of the answer as they are decoded, each with its sample's index. Closing the
        iterator before its end cancels the request."""
        return iter(self.open_stream(request))

    def wait(self, timeout: float) -> bool:
        """Waits until there is work for a round, at most `timeout` seconds: a request is open, or was cancelled in its
        slot. Returns whether there is. For a thread that drives the engine with `step`."""
        with self._requests.news:
            return self._requests.news.wait_for(lambda: self.open > 0 or self._rounds.keeps_ended, timeout)

    # ----------------------------------------------------------------------------------------------- the driver's calls

    def run(self) -> Iterator[Completion]:
        """Answers as they end, until every request is answered. More may be submitted meanwhile."""
        done = self._requests.done
        while done or self._requests.tickets:
            if not done:
                self._rounds.make()
            while done:
                with self._requests.lock:
                    number = next(iter(done), -1)
                try:
                    completion = done[number]
                    del done[number]  # no call from here to the yield, so no interrupt can lose the answer
                except KeyError:  # another thread has taken it
                    continue
                yield completion

    def step(self) -> list[Completion]:
        """Makes one round and returns the answers that have ended."""
        self._rounds.make()
        with self._requests.lock:
            return [self._requests.done.pop(number) for number in list(self._requests.done)]

    def _advance(self, ready: Callable[[], bool]) -> None:
        """Returns once `ready` gives True, or a round has ended: another thread's, or else one of our own."""
        if not self._rounds.make(wait=False):
            with self._requests.news:
                if not ready():
                    self._requests.news.wait(timeout=0.1)  # bounded: that round may have ended just before

    # ------------------------------------------------------------------------------------------------------ submission

    def _submit(self, request: Request, entry: Entry | None, streamed: bool) -> Ticket:
        """The ticket of a request. One that cannot be served has an error and no samples."""
        ticket = Ticket(request, streamed)
        samples, error = [], None
        try:
            samples = self._admission.samples(ticket, entry)
        except BaseException as raised:
            if not is_request_error(raised):
                raise
            error = str(raised)
            if not isinstance(raised, ValueError):
                error = printable(f"{type(raised).__name__}: {raised}")
        self._requests.add(ticket, samples, error)
        return ticket


def per_tenant(samples: list[Sample]) -> dict[str | None, int]:
    """The number of samples of each tenant."""
    return dict(Counter(sample.request.tenant for sample in samples))
