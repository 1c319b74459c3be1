"""The endpoints of /v1/chat/completions and /v1/completions: from a body to the engine, and from its pieces to an
answer, whole or as a stream. A client that leaves and a deadline that passes cancel the request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple, TypeVar

from ..io.checks import printable
from .answer import Answer
from .api_keys import Access
from .body import ClientLeft, json_object, read_body
from .choices import Choice, choices_of
from .engine_loop import EngineLoop
from .engine_requests import MAX_LOGPROBS, engine_requests, logprobs_of, refused, require_few
from .errors import ApiError, retry_later
from .metrics import Metrics
from .models import Models
from .outcome import Outcome
from .protocol import Asked
from .responses import DONE, Shape, Usage, Writer, error_event
from .token_text import TokenTexts

T = TypeVar("T")

#: Seconds in which a client must take the last words of a stream that has passed its deadline.
LAST_SECONDS = 1.0
#: Log-probabilities that all open requests may ask for together, alternatives included.
OPEN_LOGPROBS = 2 * MAX_LOGPROBS
#: Characters of a prompt in the log, if prompts are logged.
LOGGED = 2000


class Limits(NamedTuple):
    """Bounds of a request."""

    max_body: int = 8 * 2**20
    """bytes"""
    body_seconds: float = 30
    """within which the body must have come"""
    timeout: float = 600
    """seconds from the body to the end of the answer"""
    log_prompts: bool = False


class Answering:
    """An endpoint, as an ASGI app."""

    def __init__(
        self,
        read: Callable[[dict], Asked],
        shape: Shape,
        loop: EngineLoop,
        models: Models,
        limits: Limits,
        metrics: Metrics,
        logprobs: dict[Answer, int],
        loading: ThreadPoolExecutor,
        threads: ThreadPoolExecutor,
    ):
        """
        Args:
            logprobs: how many each open request of all endpoints asks for.
            loading: where adapters are loaded that the bank does not hold, so that other requests find a thread.
            threads: where bodies are parsed and prompts become tokens.
        """
        self.read, self.shape, self.loop, self.models, self.limits = read, shape, loop, models, limits
        self.metrics, self.logprobs = metrics, logprobs
        self.threads, self.loading, self.tokens = threads, loading, TokenTexts(loop.engine.tokenizer)

    async def __call__(self, scope, receive, send) -> None:
        outcome: Outcome = scope["state"]["outcome"]
        work, watch = None, None
        try:
            self.loop.require_ready()
            body = await read_body(scope, receive, most=self.limits.max_body, seconds=self.limits.body_seconds)
            work = asyncio.create_task(self._answer(body, scope["state"]["access"], outcome, send))
            watch = asyncio.create_task(left(receive))
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientLeft
            work.result()
        except ClientLeft:
            outcome.error = "client_left"
        finally:
            await end(work)
            await end(watch)

    async def _answer(self, body: bytes, access: Access, outcome: Outcome, send) -> None:
        answer, began = Answer(), asyncio.get_running_loop().time()
        try:
            self.loop.accept(answer)
            async with asyncio.timeout_at(began + self.limits.timeout) as deadline:
                asked = await self._in_thread(self.threads, answer, self._read, body)
                if asked.timeout is not None:
                    deadline.reschedule(began + min(asked.timeout, self.limits.timeout))
                self._reserve_logprobs(asked, answer)
                found = None
                if self.models.must_load(asked.model, access):
                    found = await self._in_thread(self.loading, answer, self.models.resolve, asked.model, access)
                await self._in_thread(self.threads, answer, self._open, asked, found, access, answer, outcome)
                outcome.served = True
                self.metrics.begin(outcome)
                choices = choices_of(asked, answer.streams, self.loop.engine, self.tokens)
                writer = Writer(self.shape, asked.model, outcome.request_id, include_usage=asked.include_usage)
                give = self._stream if asked.stream else self._whole
                await give(asked, answer, choices, writer, outcome, send)
        except TimeoutError:
            late = ApiError(504, "the request has passed its deadline and was cancelled", code="timeout")
            await self._fail(late, outcome, send)
        except ApiError as error:
            await self._fail(error, outcome, send)
        finally:
            note_times(answer, outcome)
            self.loop.close(answer)
            self.logprobs.pop(answer, None)
            deadline = None  # noqa: F841  # it refers to the task of this frame, and the circle would keep the adapter

    async def _in_thread(self, threads: ThreadPoolExecutor, answer: Answer, call: Callable[..., T], *arguments) -> T:
        """What a call gives. If the request is given up meanwhile, the streams that the call opens are closed at its
        end; one that still waits for a thread never gets one."""
        job = threads.submit(call, *arguments)
        try:
            return await asyncio.wrap_future(job)
        except asyncio.CancelledError:  # which has cancelled the job too, unless it runs
            job.add_done_callback(lambda job: self.loop.close(answer))
            raise

    def _read(self, body: bytes) -> Asked:
        require_few(body, self.loop.engine.max_length)
        return self.read(json_object(body))

    def _reserve_logprobs(self, asked: Asked, answer: Answer) -> None:
        """Raises ApiError 503 if these have no room next to the log-probabilities of other open requests."""
        count = logprobs_of(asked, self.loop.engine.max_length)
        if count and self.logprobs and sum(self.logprobs.values()) + count > OPEN_LOGPROBS:
            message = "open requests ask for as many log-probabilities as the memory has room for; try again"
            raise retry_later(503, 1, message, "overloaded")
        if count:
            self.logprobs[answer] = count

    def _open(self, asked: Asked, found: tuple | None, access: Access, answer: Answer, outcome: Outcome) -> None:
        """Opens the streams of a request.

        Args:
            found: the tenant and its adapter, if they are known.
        """
        tenant, entry = found or self.models.resolve(asked.model, access)
        try:
            requests = engine_requests(asked, tenant, self.loop.engine, access.salt)
            self.loop.open([(request, entry) for request in requests], answer)
        except ValueError as error:
            raise refused(error, asked, self.loop.engine.max_length) from None
        outcome.tenant = tenant
        outcome.prompt_tokens = sum(len(stream.prompt_ids) for stream in answer.streams)
        outcome.choices = len(requests) * asked.n
        if self.limits.log_prompts:
            outcome.prompt = printable(repr(asked.prompts), LOGGED)

    async def _whole(self, asked: Asked, answer: Answer, choices: dict, writer: Writer, outcome: Outcome, send) -> None:
        while any(choice.finish_reason is None for choice in choices.values()):
            take_news(await answer.news(), choices, outcome)
            note_times(answer, outcome)

        def body() -> bytes:
            made = [self.shape.choice(choice, part) for choice in choices.values() if (part := choice.take())]
            return writer.whole(made, usage(answer, outcome))

        written = await written_for(asked, body)
        await send(start(200, b"application/json", (b"content-length", str(len(written)).encode())))
        await send({"type": "http.response.body", "body": written})

    async def _stream(
        self, asked: Asked, answer: Answer, choices: dict, writer: Writer, outcome: Outcome, send
    ) -> None:
        # x-accel-buffering: nginx would keep the events until it has a page of them
        quick = ((b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))
        await send(start(200, b"text/event-stream; charset=utf-8", *quick))
        told = 0  # new tokens of the events so far: the engine may be ahead of them
        while any(choice.finish_reason is None for choice in choices.values()):
            changed = take_news(await answer.news(), choices, outcome)
            note_times(answer, outcome)

            def events(changed: list[Choice] = changed) -> bytes:
                nonlocal told
                written = []
                for choice in changed:
                    if part := choice.take():
                        told += part.new_tokens
                        now = usage(answer, outcome)._replace(new=told) if asked.continuous_usage else None
                        written += (writer.event(delta, now) for delta in self.shape.deltas(choice, part))
                return b"".join(written)

            if written := await written_for(asked, events):
                await send({"type": "http.response.body", "body": written, "more_body": True})
        await send({"type": "http.response.body", "body": writer.usage_event(usage(answer, outcome)) + DONE})

    async def _fail(self, error: ApiError, outcome: Outcome, send) -> None:
        """Raises the error, or makes it the end of a stream that has begun."""
        if outcome.status is None:
            raise error
        outcome.error = error.code or "invalid_request"
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_SECONDS):
                await send({"type": "http.response.body", "body": error_event(error.body) + DONE})


async def written_for(asked: Asked, write: Callable[[], bytes]) -> bytes:
    """What `write` gives. Log-probabilities are written in a thread: those of a long prompt with many others take
    seconds, and asyncio must not wait."""
    return write() if asked.logprobs is None else await asyncio.to_thread(write)


def take_news(news: list, choices: dict[tuple[int, int], Choice], outcome: Outcome) -> list[Choice]:
    """Gives the pieces to their choices, and returns these. Raises ApiError for a piece that is an error."""
    changed: dict[Choice, None] = {}
    for at, number, piece in news:
        if piece.finish_reason == "error":
            outcome.finish_reasons.append("error")
            raise ApiError(500, piece.error or "the engine failed on this request", code="engine_error")
        choice = choices[number, piece.index]
        choice.put(piece)
        outcome.note_piece(choice.index, at, len(piece.tokens), choice.finish_reason)
        changed[choice] = None
    return list(changed)


def usage(answer: Answer, outcome: Outcome) -> Usage:
    outcome.cached_tokens = sum(stream.cached_tokens for stream in answer.streams)
    return Usage(outcome.prompt_tokens, outcome.cached_tokens, outcome.new_tokens)


def note_times(answer: Answer, outcome: Outcome) -> None:
    """Notes the earliest times of a request's streams."""
    for name in ("queued", "started", "first_token"):
        times = [time for stream in answer.streams if (time := getattr(stream.times, name)) is not None]
        setattr(outcome, name, min(times, default=None))


def start(status: int, content_type: bytes, *headers: tuple[bytes, bytes]) -> dict:
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", content_type), *headers]}


async def left(receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def end(task: asyncio.Task | None) -> None:
    """Cancels a task that runs, and waits for its end."""
    if task is not None and not task.done():
        task.cancel()
        await asyncio.wait({task})
