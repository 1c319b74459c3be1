"""What an engine remembers of a request that is open: a ticket, and the samples that it asks for."""

from __future__ import annotations

from collections.abc import Hashable

from ..adapters.bank import Entry
from ..inference.answer_text import AnswerText, text_of
from .request import Completion, Request, stop_texts


class Ticket:
    """An open request."""

    def __init__(self, request: Request, id: Hashable, streamed: bool):
        self.request, self.id, self.streamed = request, id, streamed
        """streamed: the answer goes to a stream, not to run()"""
        self.samples: list[Sample] = []
        self.error: str | None = None
        """why it was refused"""

    @property
    def ended(self) -> bool:
        return all(sample.completion is not None for sample in self.samples)


class Sample:
    """One sample of a request: it waits, decodes in a slot, and ends."""

    def __init__(self, ticket: Ticket, index: int, ids: list[int], entry: Entry | None, stops: tuple[int, ...] = ()):
        """
        Args:
            stops: the request's own token ids that end an answer, next to the engine's.
        """
        self.ticket, self.index, self.ids, self.entry = ticket, index, ids, entry
        self.number = -1
        """the order of arrival, once it waits"""
        self.stops = frozenset(stops)
        self.key = (entry.content if entry else None, tuple(ids))
        """What a prefilled prompt depends on: PARA's factors are made from all of it. A name is not enough, because its
        adapter may be replaced; a prefix is not enough, because its last token differs."""
        self.tokens: list[int] = []
        self.text: AnswerText | None = None
        """of the tokens so far, where somebody needs it before the end: for stop texts, or for a stream"""
        self.failures = 0
        """prefills that raised"""
        self.completion: Completion | None = None

    @property
    def request(self) -> Request:
        return self.ticket.request

    @property
    def sampling(self) -> tuple[int, float, int, float] | None:
        """Seed, temperature, top_k and top_p; None once it has ended: then it is not sampled."""
        if self.completion is not None:
            return None
        request = self.request
        return ((request.seed or 0) + self.index) % 2**32, request.temperature, request.top_k, request.top_p

    def restart(self, tokenizer) -> None:
        """Forgets the tokens, which will be made again."""
        self.tokens, self.text = [], None
        self.read(tokenizer)

    def read(self, tokenizer) -> None:
        """Makes the text along with the tokens, if it has to be known before the end."""
        stop = stop_texts(self.request)
        if self.text is None and (stop or self.ticket.streamed):
            self.text = AnswerText(tokenizer, tuple(stop))
            for token in self.tokens:
                self.text.add(token)

    def whole_text(self, tokenizer, partial: bool) -> str:
        """The text of the tokens. If they have none, that is an error, or "" if a `partial` one will do."""
        if self.text is not None:
            return str(self.text)
        try:
            return text_of(tokenizer, self.tokens)
        except BaseException as error:
            if not (partial and of_the_request(error)):
                raise
            return ""


def of_the_request(error: BaseException) -> bool:
    """Whether an error in reading or writing a request's text is that request's own: any Exception, and the panics of
    the tokenizers library, which are none."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
