"""Stream: one request's answer in pieces, as it is decoded."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any

from ..inference.logprobs import TokenLogprob
from .open_requests import OpenRequests
from .request import Piece
from .ticket import Ticket, Times


class Stream:
    """The answer to an open request. One thread at a time may use it.

    Iterating waits for the pieces, and drives the engine while no thread does. `take` never waits. Call `close` to give
    a stream up before its end.
    """

    def __init__(self, ticket: Ticket, requests: OpenRequests, advance: Callable[[Callable[[], bool]], None]):
        """
        Args:
            advance: takes a function, and returns once that gives True or a round has ended.
        """
        self._ticket, self._requests, self._advance = ticket, requests, advance
        self._given = [0] * len(ticket.samples)
        """how many of each sample's tokens are taken"""
        self._left = list(range(len(ticket.samples)))
        """the samples with pieces to come"""

    @property
    def id(self) -> Hashable:
        return self._ticket.id

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt's tokens."""
        return self._ticket.samples[0].ids

    @property
    def cached_tokens(self) -> int:
        """How many of the prompt's tokens did not have to be computed, because an earlier prompt began with them; 0
        until the prompt is prefilled."""
        return self._ticket.cached_tokens or 0

    @property
    def prompt_logprobs(self) -> list[TokenLogprob | None] | None:
        """The log-probabilities of the prompt's tokens, once it is scored. The first is None."""
        return self._ticket.samples[0].prompt_logprobs

    @property
    def times(self) -> Times:
        return self._ticket.times

    @property
    def ended(self) -> bool:
        """Whether all samples have ended and all pieces are taken."""
        return not self._left

    def take(self) -> list[Piece]:
        """What has become certain since the last take, at most one piece per sample. Does not wait for more."""
        with self._requests.lock:
            found = self._pieces()
            for piece in found:
                self._given[piece.index] += len(piece.tokens)
                if piece.finish_reason is not None:
                    self._left.remove(piece.index)
        return found

    def __iter__(self) -> Iterator[Piece]:
        """The pieces as they come. Closing the iterator cancels the request, and so does an exception in a round of
        ours."""
        pieces = self._as_they_come()
        next(pieces)  # a generator that has not begun would not see that it is closed
        return pieces

    def _as_they_come(self) -> Iterator[Any]:
        """Gives None, and then the pieces."""
        try:
            yield None
            while self._left:
                found = self.take()
                yield from found
                if not found:
                    self._advance(lambda: bool(self._pieces()))
        except BaseException:
            self._requests.give_up(self._ticket)
            raise

    def close(self) -> None:
        """Cancels the request, unless it has ended."""
        self._requests.cancel(self._ticket)

    def _pieces(self) -> list[Piece]:
        samples = self._ticket.samples
        return [piece for i in self._left if (piece := samples[i].piece(self._given[i]))]
