"""ConcurrencyLimit: how many requests may wait for answers. A server has more connections than that, so that probes and
Prometheus are answered, and further requests are refused, however many wait."""

from __future__ import annotations

from typing import NamedTuple

from ..messages import warn
from .connections import BoundedProtocol, allow_open_files
from .errors import retry_later
from .gate import OPEN_PATHS

#: Paths that are answered however many requests wait.
ALWAYS_ANSWERED = (*OPEN_PATHS, "/metrics")
#: Requests that become tokens or are being refused, next to those that have a slot or a place in the queue.
SPARE_REQUESTS = 128
#: Connections for what is answered at once.
SPARE_CONNECTIONS = 256
#: The length of a queue without a limit, as far as connections are concerned.
LONG_QUEUE = 1024


class Concurrency(NamedTuple):
    """What may be open at the same time."""

    requests: int
    """that wait for answers"""
    connections: int


def concurrency_for(slots: int, queue_limit: int | None) -> Concurrency:
    """Enough for full slots and a full queue, if this process may open that many files. Raises its limit of them."""
    requests = slots + (LONG_QUEUE if queue_limit is None else queue_limit) + SPARE_REQUESTS
    wanted = max(BoundedProtocol.max_connections, requests + SPARE_CONNECTIONS)
    files = allow_open_files(4 * wanted)
    connections = min(wanted, files * 3 // 4)
    most = max(1, min(requests, connections - SPARE_CONNECTIONS))
    if most < requests:
        warn(f"this process may open {files} files, so only {most} requests may be open; raise the limit (ulimit -n)")
    return Concurrency(most, connections)


class ConcurrencyLimit:
    """An ASGI app around another one. A request counts from the end of its body until the last part of its answer is
    sent. So a client that sends slowly takes no place of others, and one that has its answer may ask again at once."""

    def __init__(self, app, most: int):
        self.app, self.most, self.waiting = app, most, 0

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http" or scope["path"] in ALWAYS_ANSWERED:
            return await self.app(scope, receive, send)
        counted = False

        def count() -> None:
            nonlocal counted
            if not counted and self.waiting >= self.most:
                raise retry_later(503, 1, "too many requests wait for answers at the moment; try again", "overloaded")
            self.waiting, counted = self.waiting + (not counted), True

        def release() -> None:
            nonlocal counted
            self.waiting, counted = self.waiting - counted, False

        async def read():
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body", False):
                count()
            return message

        async def write(message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                release()
            await send(message)

        try:
            if scope["method"] != "POST":
                count()
            await self.app(scope, read, write)
        finally:
            release()
