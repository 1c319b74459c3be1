"""EngineLoop: the one thread that drives the engine and passes its answers on to asyncio."""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress

from ..adapters.bank import Entry
from ..io.checks import printable
from ..io.messages import say, warn
from ..serving.engine import Engine
from ..serving.open_requests import QueueFull
from ..serving.request import Request
from .answer import Answer, News, close, put_all
from .errors import ApiError, retry_later

#: Rounds that fail one after the other before all open requests are given up.
MOST_FAILURES = 3
#: Seconds between the trials of an engine that failed and has no requests.
TRIAL_SECONDS = 5
#: Seconds that the thread waits for a request before it looks whether it should stop.
IDLE_SECONDS = 0.2
#: Seconds that any round may take. It may have to compile, and a compilation must not look like a device that hangs.
LONG_ROUND_SECONDS = 900
#: Seconds that the last round may take when the server stops.
LAST_ROUND_SECONDS = 10


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
        self.draining = False
        """whether new requests are refused, because the server is about to stop"""
        self.fatal: BaseException | None = None
        """why nothing can be served at all"""
        self.failures = 0
        """rounds that failed since the last one that did not"""
        self._next_trial = 0.0
        self._round_began: float | None = None
        """None between two rounds"""
        self._accepted: set[Answer] = set()
        """of requests that are not open yet, although their bodies are there"""
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
        if self._stopping.is_set():
            return
        self._stopping.set()
        self._accepted.clear()
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
        return self.fatal is None and self.failures < MOST_FAILURES and not self.hangs

    @property
    def open_answers(self) -> int:
        """How many HTTP requests wait for their answers."""
        return len(self._accepted) + len(self._open)

    async def drain(self, seconds: float) -> None:
        """Refuses new requests and waits until the open ones have ended. After `seconds` those that are left fail."""
        self.draining = True
        until = time.monotonic() + seconds
        while self.open_answers and time.monotonic() < until:
            await asyncio.sleep(0.02)
        self._accepted.clear()
        self.fail_all(shutting_down)

    def accept(self, answer: Answer) -> None:
        """Counts a request as open, now that its body is there. Raises as require_ready does."""
        self.require_ready()
        self._accepted.add(answer)

    # ---------------------------------------------------------------------------------------- calls from any thread

    def require_ready(self) -> None:
        """Raises ApiError 503 while no request is taken, and 500 if none will ever be."""
        if self.fatal is not None:
            raise engine_failed()
        if self.draining or self._stopping.is_set():
            raise shutting_down()
        if not self.warm:
            raise retry_later(503, 5, "the server is starting", "starting")

    def open(self, requests: Iterable[tuple[Request, Entry | None]], answer: Answer) -> None:
        """Opens a stream for each request in `answer`, which was accepted, or none.

        Raises ApiError 429 if the queue has no room and 503 if the server has stopped meanwhile, and ValueError for a
        request that cannot be served.
        """
        try:
            for request, entry in requests:
                answer.streams.append(self.engine.open_stream(request, entry=entry))
        except BaseException as error:
            close(answer)
            if isinstance(error, QueueFull):
                raise queue_full(error) from None
            raise
        with self._delivering:
            self._open[answer] = None
        if self.fatal is not None or answer not in self._accepted:  # it came too late for `fail_all`
            self.close(answer)
            raise shutting_down() if self.draining or self._stopping.is_set() else engine_failed()
        self._accepted.discard(answer)
        self._deliver([answer])

    def close(self, answer: Answer) -> None:
        """Cancels the streams that are still open."""
        self._accepted.discard(answer)
        self._open.pop(answer, None)
        close(answer)

    def fail_all(self, error: Callable[[], ApiError]) -> None:
        """Ends all open requests, each with an error of its own: a request that has ended empties its error's frames,
        and with a shared error those of requests that have not (error_frames.forget_frames)."""
        for answer in list(self._open):
            self._call(answer.fail, error())  # first, so that the pieces of a cancelled stream come too late
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
        while not self._stopping.is_set():
            has_work = self.engine.wait(IDLE_SECONDS)
            if not has_work and (self.healthy or time.monotonic() < self._next_trial):
                continue
            self._round_began = time.monotonic()
            try:
                if has_work:
                    self.engine.step()
                else:  # an engine that failed tries itself, because no client asks a server that is not ready
                    self.engine.warm_up()
                self.failures = 0
            except BaseException as error:  # an engine can go on after whatever a round raises
                if has_work or not self.engine.open:  # a request that has just come keeps warm_up from its work
                    self._note_failure(error)
            self._round_began = None
            self._deliver(list(self._open))

    def _note_failure(self, error: BaseException) -> None:
        self.failures += 1
        self._on_failure()
        lines = "".join(traceback.format_exception(error)).strip().splitlines()
        warn(f"engine: a round failed ({self.failures} in a row): {printable(str(error), 500)}")
        say("\n".join(printable(line, 500) for line in lines))
        if self.failures >= MOST_FAILURES:
            self.fail_all(engine_failed)
        self._next_trial = time.monotonic() + TRIAL_SECONDS
        self._stopping.wait(min(0.1 * self.failures, 1))

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


def shutting_down() -> ApiError:
    return retry_later(503, 5, "the server is shutting down; send the request to another one", "shutting_down")


def engine_failed() -> ApiError:
    return ApiError(500, "the engine failed, and the request was given up", code="engine_failed")


def queue_full(error: QueueFull) -> ApiError:
    """429. The count of waiting requests concerns other tenants too, so the error does not reveal it."""
    whose = "this model's queue" if error.tenant_full else "the server's queue"
    return retry_later(429, 1, f"{whose} is full; try again", "rate_limit_exceeded")
