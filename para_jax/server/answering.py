"""The endpoints of /v1/chat/completions and /v1/completions: from a body to the engine, and from its pieces to an
answer, whole or as a stream. A client that leaves and a deadline that passes cancel the request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

from ..io.checks import printable
from .api_keys import Access
from .body import ClientLeft, read_body
from .choices import Choice, choices_of
from .config import ServerConfig
from .engine_loop import Answer, EngineLoop
from .engine_requests import MAX_LOGPROBS, engine_requests, logprobs_of, refused, require_few
from .errors import ApiError, retry_later
from .metrics import Metrics
from .models import Models
from .protocol import Body, read
from .responses import DONE, Shape, encoded, event, usage
from .token_text import TokenTexts
from .traffic import Outcome

#: Seconds in which a client must take the last words of a stream that has passed its deadline.
LAST_SECONDS = 1.0
#: Seconds within which a body must have come.
BODY_SECONDS = 30
#: Log-probabilities that all open requests may ask for together, alternatives included.
OPEN_LOGPROBS = 2 * MAX_LOGPROBS
#: Characters of a prompt in the log, if prompts are logged.
LOGGED = 2000


class Answering:
    """An endpoint, as an ASGI app."""

    def __init__(
        self,
        fields: type[Body],
        shape: Shape,
        loop: EngineLoop,
        models: Models,
        config: ServerConfig,
        metrics: Metrics,
        logprobs: dict[Answer, int],
        loading: ThreadPoolExecutor,
    ):
        """
        Args:
            logprobs: how many each open request of all endpoints asks for.
            loading: where adapters are loaded that the bank does not hold, so that other requests find a thread.
        """
        self.fields, self.shape, self.loop, self.models, self.config = fields, shape, loop, models, config
        self.metrics, self.logprobs, self.loading = metrics, logprobs, loading
        self.tokens = TokenTexts(loop.engine.tokenizer)

    async def __call__(self, scope, receive, send) -> None:
        outcome: Outcome = scope["state"]["outcome"]
        work, watch = None, None
        try:
            self.loop.require_ready()  # before the body is read
            body = await read_body(scope, receive, most=self.config.max_body, seconds=BODY_SECONDS)
            work = asyncio.create_task(self._answer(body, scope["state"]["access"], outcome, send))
            watch = asyncio.create_task(left(receive))  # nothing else would notice that it left
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientLeft
            work.result()
        except ClientLeft:
            outcome.error = "client_left"
        finally:
            await end(work)
            await end(watch)

    async def _answer(self, data: bytes, access: Access, outcome: Outcome, send) -> None:
        answer, began = Answer(), asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout_at(began + self.config.timeout) as deadline:
                body = await asyncio.to_thread(self._read, data)  # a long body must not hold up others
                if body.timeout is not None:
                    deadline.reschedule(began + min(body.timeout, self.config.timeout))
                self._reserve_logprobs(body, answer)
                tenant = None
                if self.models.must_load(body.model, access):
                    resolve = asyncio.get_running_loop().run_in_executor
                    tenant = await resolve(self.loading, self.models.resolve, body.model, access)
                await asyncio.to_thread(self._open, body, tenant, access, answer, outcome)
                self.metrics.traffic.begin(outcome)
                choices = choices_of(body, answer.streams, self.loop.engine, self.tokens)
                give = self._stream if body.stream else self._whole
                await give(body, answer, choices, outcome, send)
        except TimeoutError:
            late = ApiError(504, "the request has passed its deadline and was cancelled", code="timeout")
            await self._fail(late, outcome, send)
        except ApiError as error:
            await self._fail(error, outcome, send)
        finally:
            outcome.note_times(answer.streams)
            self.loop.close(answer)  # cancels what is still open
            self.logprobs.pop(answer, None)
            deadline = None  # noqa: F841  # it refers to the task of this frame, and the circle would keep the adapter

    def _read(self, data: bytes) -> Body:
        require_few(data, self.loop.engine.max_length)
        return read(self.fields, data)

    def _reserve_logprobs(self, body: Body, answer: Answer) -> None:
        """Raises ApiError 503 if these have no room next to the log-probabilities of other open requests."""
        count = logprobs_of(body, self.loop.engine.max_length)
        if count and self.logprobs and sum(self.logprobs.values()) + count > OPEN_LOGPROBS:
            message = "open requests ask for as many log-probabilities as the memory has room for; try again"
            raise retry_later(503, 1, message, "overloaded")
        if count:
            self.logprobs[answer] = count

    def _open(self, body: Body, tenant: tuple | None, access: Access, answer: Answer, outcome: Outcome) -> None:
        """Opens the streams of a request.

        Args:
            tenant: with its adapter, if they are known.
        """
        name, entry = tenant or self.models.resolve(body.model, access)
        try:
            requests = engine_requests(body, name, self.loop.engine, access.salt)
            self.loop.open([(request, entry) for request in requests], answer)
        except ValueError as error:
            raise refused(error, body, self.loop.engine.max_length) from None
        outcome.served, outcome.tenant, outcome.choices = True, name, len(requests) * body.n
        outcome.prompt_tokens = sum(len(stream.prompt_ids) for stream in answer.streams)
        if self.config.log_prompts:
            outcome.prompt = printable(repr(body.prompts), LOGGED)

    async def _whole(self, body: Body, answer: Answer, choices: dict, outcome: Outcome, send) -> None:
        while any(choice.finish_reason is None for choice in choices.values()):
            await take_news(answer, choices, outcome)

        def write() -> bytes:
            parts = [self.shape.choice(choice, part) for choice in choices.values() if (part := choice.take())]
            head = self.shape.head(body.model, outcome.request_id) | {"object": self.shape.whole}
            return encoded(head | {"choices": parts, "usage": usage_of(answer, outcome, outcome.new_tokens)})

        data = await written_for(body, write)
        await send(start(200, b"application/json", (b"content-length", str(len(data)).encode())))
        await send({"type": "http.response.body", "body": data})

    async def _stream(self, body: Body, answer: Answer, choices: dict, outcome: Outcome, send) -> None:
        # x-accel-buffering: nginx would keep the events until it has a page of them
        quick = ((b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))
        await send(start(200, b"text/event-stream; charset=utf-8", *quick))
        head = self.shape.head(body.model, outcome.request_id) | {"object": self.shape.chunk}
        options, told = body.stream_options, 0  # new tokens of the events so far: the engine may be ahead of them

        def chunk(choices: list[dict], usage: dict | None) -> bytes:
            return event(encoded(head | {"choices": choices} | ({"usage": usage} if options.include_usage else {})))

        def write(changed: list[Choice]) -> bytes:
            nonlocal told
            events = []
            for choice in changed:
                if part := choice.take():
                    told += part.new_tokens
                    now = usage_of(answer, outcome, told) if options.continuous_usage_stats else None
                    events += (chunk([delta], now) for delta in self.shape.deltas(choice, part))
            return b"".join(events)

        while any(choice.finish_reason is None for choice in choices.values()):
            changed = await take_news(answer, choices, outcome)
            if events := await written_for(body, partial(write, changed)):
                await send({"type": "http.response.body", "body": events, "more_body": True})
        last = chunk([], usage_of(answer, outcome, outcome.new_tokens)) if options.include_usage else b""
        await send({"type": "http.response.body", "body": last + DONE})

    async def _fail(self, error: ApiError, outcome: Outcome, send) -> None:
        """Raises the error, or makes it the end of a stream that has begun."""
        if outcome.status is None:  # no byte has gone out, so a status can say it
            raise error
        outcome.error = error.code or "invalid_request"
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_SECONDS):
                await send({"type": "http.response.body", "body": event(error.body) + DONE})


async def written_for(body: Body, write: Callable[[], bytes]) -> bytes:
    """What `write` gives. Log-probabilities are written in a thread: those of a long prompt with many others take
    seconds, and asyncio must not wait."""
    return write() if body.alternatives is None else await asyncio.to_thread(write)


async def take_news(answer: Answer, choices: dict[tuple[int, int], Choice], outcome: Outcome) -> list[Choice]:
    """Gives the next pieces to their choices, and returns these. Raises ApiError for a piece that is an error."""
    changed: dict[Choice, None] = {}
    news = await answer.news()
    outcome.note_times(answer.streams)
    for at, number, piece in news:
        if piece.finish_reason == "error":
            outcome.finish_reasons.append("error")
            raise ApiError(500, piece.error or "the engine failed on this request", code="engine_error")
        choice = choices[number, piece.index]
        choice.put(piece)
        outcome.note_piece(choice.index, at, len(piece.tokens), choice.finish_reason)
        changed[choice] = None
    return list(changed)


def usage_of(answer: Answer, outcome: Outcome, new: int) -> dict:
    outcome.cached_tokens = sum(stream.cached_tokens for stream in answer.streams)
    return usage(outcome.prompt_tokens, outcome.cached_tokens, new)


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
