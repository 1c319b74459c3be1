"""A client that streams many answers at once over HTTP, with nothing but asyncio, so that it takes little of the
machine that it measures. It runs in a process of its own.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

PATH = "/v1/completions"


class Streamed(NamedTuple):
    """One streamed answer, in seconds on the client's clock."""

    sent: float
    """when the request was sent"""
    events: list[float]
    """when each event with text came"""
    ended: float
    prompt_tokens: int
    tokens: int
    """of the answer, by the server's usage"""
    text: str

    @property
    def first_token(self) -> float:
        """Seconds from sending the request to the first text."""
        return self.events[0] - self.sent

    @property
    def per_token(self) -> float:
        """Seconds per token after the first text. The tokens of one event come together."""
        return (self.events[-1] - self.events[0]) / max(self.tokens - 1, 1)


def stream_all(url: str, bodies: Sequence[dict], clients: int) -> list[Streamed]:
    """The answers to all requests, in their order. Each of `clients` connections sends the next request when its answer
    has ended.

    Args:
        bodies: JSON bodies for /v1/completions, without the fields about streams.

    Raises RuntimeError for an answer that is not a complete stream.
    """
    return asyncio.run(_stream_all(url, bodies, clients))


async def _stream_all(url: str, bodies: Sequence[dict], clients: int) -> list[Streamed]:
    answers: dict[int, Streamed] = {}
    left = iter(enumerate(bodies))

    async def client() -> None:
        for number, body in left:  # the clients share one iterator
            answers[number] = await stream_one(url, body)

    await asyncio.gather(*(client() for _ in range(clients)))
    return [answers[number] for number in range(len(bodies))]


async def stream_one(url: str, body: dict) -> Streamed:
    """The answer to one request."""
    parts = urlsplit(url)
    sent = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    begun, events, texts, usage = time.perf_counter(), [], [], None
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        writer.write(f"{head}Content-Length: {len(sent)}\r\n\r\n".encode() + sent)
        status = await reader.readline()
        if status.split()[1:2] != [b"200"]:
            raise RuntimeError(f"{url}: {status!r} {(await reader.read(4096))!r}")
        async for line in reader:
            if not line.startswith(b"data: {"):
                if line.startswith(b"data: [DONE]"):
                    break
                continue
            event = json.loads(line[len(b"data: ") :])
            if "error" in event:
                raise RuntimeError(f"{url}: {event['error']}")
            usage = event.get("usage") or usage
            text = "".join(choice["text"] for choice in event["choices"])
            if text:
                events.append(time.perf_counter())
                texts.append(text)
    finally:
        writer.close()
    if usage is None or not events:
        raise RuntimeError(f"{url}: the stream ended without usage or text")
    return Streamed(
        begun, events, time.perf_counter(), usage["prompt_tokens"], usage["completion_tokens"], "".join(texts)
    )
