"""EngineLoop: the one thread that drives the engine and passes its answers on to asyncio."""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple

from ..adapters.bank import Entry
from ..io.checks import printable
from ..io.messages import say, warn
from ..serving.engine import Engine
from ..serving.open_requests import QueueFull
from ..serving.request import Piece, Request
from ..serving.stream import Stream
from .errors import ApiError, retry_later

#: Rounds that fail one after the other before all open requests are given up.
MOST_FAILURES = 3
#: Seconds that the thread waits for a request before it looks whether it should stop.
IDLE_SECONDS = 0.2
#: Seconds that any round may take. It may have to compile, and a compilation must not look like a device that hangs.
LONG_ROUND_SECONDS = 900
#: Seconds that the last round may take when the server stops.
LAST_ROUND_SECONDS = 10


class News(NamedTuple):
    """A piece of an answer."""

    at: float
    """when it was there, in seconds of time.monotonic()"""
    number: int
    """of its prompt"""
    piece: Piece


class Answer:
    """The engine's streams for one HTTP request, one per prompt, and what they have given since the last look.

    The driving thread writes the streams. What they give is read in asyncio.
    """

    def __init__(self):
        self.streams: list[Stream] = []
        self.closed = False
        self._news: list[News] = []
        self._failure: ApiError | None = None
        self._event = asyncio.Event()

    async def news(self) -> list[News]:
        """Waits for the next pieces of the answer. A reader that comes late gets all of them. Raises ApiError if there
        will be no more."""
        await self._event.wait()
        self._event.clear()
        if self._failure is not None:
            raise self._failure
        news, self._news = self._news, []
        return news

    def put(self, news: list[News], failure: ApiError | None = None) -> None:
        self._news += news
        self._failure = failure
        self._event.set()

    def close(self) -> None:
        """Cancels the streams that are still open."""
        self.closed = True
        for stream in self.streams:
            stream.close()


class EngineLoop:
    """Drives an engine in a thread of its own, from `start` to `stop`."""

    def __init__(self, engine: Engine, on_failure: Callable[[], None] = lambda: None, timeout: float = 0):
        """
        Args:
            on_failure: called when a round raised an error.
            timeout: seconds that a request may take. A round that lasts longer, and longer than LONG_ROUND_SECONDS,
                means that the device hangs.
        """
        self.engine, self._on_failure, self._timeout = engine, on_failure, timeout
        self.warm = False
        """whether everything is compiled"""
        self.fatal: BaseException | None = None
        """why nothing can be served at all"""
        self._round_began: float | None = None
        """None between two rounds"""
        self._open: dict[Answer, None] = {}
        self._delivering = threading.Lock()
        """held while streams are read and their pieces handed over, which keeps the pieces in order"""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._drive, name="para-jax-engine", daemon=True)

    def start(self) -> None:
        """Starts the thread, which first warms the engine up. Called in asyncio's thread."""
        self._asyncio = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Ends the thread after its round. Open requests fail. Does not wait long for a round that does not end: the
        thread ends with the process."""
        self._stopping.set()
        self.fail_all(shutting_down)
        until = time.monotonic() + LAST_ROUND_SECONDS
        while self._thread.is_alive() and time.monotonic() < until:
            await asyncio.sleep(0.01)
        if self._thread.is_alive():
            warn(f"engine: the last round has not ended after {LAST_ROUND_SECONDS} s; the server stops without it")

    @property
    def hangs(self) -> bool:
        """Whether a round has lasted so long that the device must have stopped working."""
        began = self._round_began
        return began is not None and time.monotonic() - began > max(self._timeout, LONG_ROUND_SECONDS)

    @property
    def healthy(self) -> bool:
        return self.fatal is None and not self.hangs

    # ---------------------------------------------------------------------------------------- calls from any thread

    def require_ready(self) -> None:
        """Raises ApiError 503 while no request is taken, and 500 if none will ever be."""
        if self.fatal is not None:
            raise engine_failed()
        if self._stopping.is_set():
            raise shutting_down()
        if not self.warm:
            raise retry_later(503, 5, "the server is starting", "starting")

    def open(self, requests: Iterable[tuple[Request, Entry | None]], answer: Answer) -> None:
        """Opens a stream for each request in `answer`, or none.

        Raises ApiError 429 if the queue has no room, as require_ready does if the server has stopped meanwhile, and
        ValueError for a request that cannot be served.
        """
        try:
            for request, entry in requests:
                answer.streams.append(self.engine.open_stream(request, entry=entry))
            with self._delivering:
                self._open[answer] = None
            self.require_ready()  # or it came too late for `fail_all`
        except BaseException as error:
            self.close(answer)
            if isinstance(error, QueueFull):
                raise queue_full(error) from None
            raise
        if answer.closed:  # the client left meanwhile
            self.close(answer)
        self._deliver([answer])

    def close(self, answer: Answer) -> None:
        """Cancels the streams that are still open, or about to be."""
        self._open.pop(answer, None)
        answer.close()

    def fail_all(self, error: Callable[[], ApiError]) -> None:
        """Ends all open requests, each with an error of its own: a request that has ended empties its error's frames,
        and with a shared error those of requests that have not (error_frames.forget_frames)."""
        for answer in list(self._open):
            self._call(answer.put, [], error())  # first, so that the pieces of a cancelled stream come too late
            self.close(answer)

    # ------------------------------------------------------------------------------------------------- the thread

    def _drive(self) -> None:
        try:
            self.engine.warm_up()
            self.warm = True
            self._make_rounds()
        except BaseException as error:
            self.fatal = error
            self.fail_all(engine_failed)

    def _make_rounds(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            if not self.engine.wait(IDLE_SECONDS):
                continue
            self._round_began = time.monotonic()
            try:
                self.engine.step()
                failures = 0
            except Exception as error:  # an engine can go on after whatever a round raises
                failures += 1
                self._note_failure(error, failures)
                if failures >= MOST_FAILURES:
                    self.fail_all(engine_failed)
                    if not self.engine.open:  # if no request was the reason, this raises and ends the server
                        self.engine.warm_up()
                        failures = 0
            self._round_began = None
            self._deliver(list(self._open))

    def _note_failure(self, error: Exception, failures: int) -> None:
        self._on_failure()
        warn(f"engine: a round failed ({failures} in a row): {printable(str(error), 500)}")
        say("\n".join(printable(line, 500) for line in "".join(traceback.format_exception(error)).strip().splitlines()))
        self._stopping.wait(0.1 * failures)

    def _deliver(self, answers: list[Answer]) -> None:
        """Hands over what the streams have given since the last time."""
        with self._delivering:
            batch, now = [], time.monotonic()
            for answer in answers:
                pieces = [News(now, i, piece) for i, stream in enumerate(answer.streams) for piece in stream.take()]
                if pieces:
                    batch.append((answer, pieces))
                if all(stream.ended for stream in answer.streams):
                    self._open.pop(answer, None)
            if batch:
                self._call(put_all, batch)

    def _call(self, function, *arguments) -> None:
        with suppress(RuntimeError):  # asyncio's loop has ended, and with it all clients
            self._asyncio.call_soon_threadsafe(function, *arguments)


def put_all(batch: list[tuple[Answer, list[News]]]) -> None:
    for answer, news in batch:
        answer.put(news)


def shutting_down() -> ApiError:
    return retry_later(503, 5, "the server is shutting down; send the request to another one", "shutting_down")


def engine_failed() -> ApiError:
    return ApiError(500, "the engine failed, and the request was given up", code="engine_failed")


def queue_full(error: QueueFull) -> ApiError:
    """429. The count of waiting requests concerns other tenants too, so the error does not reveal it."""
    whose = "this model's queue" if error.tenant_full else "the server's queue"
    return retry_later(429, 1, f"{whose} is full; try again", "rate_limit_exceeded")
