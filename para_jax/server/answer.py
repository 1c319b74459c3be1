"""Answer: carries the pieces of an answer from the engine's thread into asyncio."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from ..serving.request import Piece
from ..serving.stream import Stream
from .errors import ApiError


class News(NamedTuple):
    """A piece of an answer."""

    at: float
    """when it was there, in seconds of time.monotonic()"""
    number: int
    """of its prompt"""
    piece: Piece


class Answer:
    """The engine's streams for one HTTP request, one per prompt, and what they have given since the last look.

    The streams are written by the driving thread. What they give is read in asyncio.
    """

    def __init__(self):
        self.streams: list[Stream] = []
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

    def put(self, pieces: list[News]) -> None:
        self._news += pieces
        self._event.set()

    def fail(self, error: ApiError) -> None:
        self._failure = error
        self._event.set()


def put_all(batch: list[tuple[Answer, list[News]]]) -> None:
    for answer, pieces in batch:
        answer.put(pieces)


def close(answer: Answer) -> None:
    for stream in answer.streams:
        stream.close()
