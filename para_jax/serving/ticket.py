"""What an engine remembers of an open request: a ticket, and the samples that it asks for."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property

from ..adapters.bank import Entry
from ..inference.answer_text import AnswerText, text_of, word_tokens
from ..inference.beams import BeamSearch
from ..inference.grammar import Guide
from ..inference.logprobs import TokenLogprob
from ..inference.sampling import Sampling
from .prefix_cache import prompt_key
from .request import Completion, Piece, Request
from .speculation import Lookup


@dataclass
class Times:
    """When a request passed its stages, in seconds of time.monotonic; None until then."""

    queued: float
    started: float | None = None
    """its first sample left the queue"""
    first_token: float | None = None
    """the first token of its first sample was there"""
    ended: float | None = None
    """its last sample ended"""


class Ticket:
    """An open request."""

    def __init__(self, request: Request, streamed: bool):
        self.request, self.id, self.streamed = request, request.id, streamed
        """streamed: the answer goes to a stream, not to run()"""
        self.samples: list[Sample] = []
        self.error: str | None = None
        """why the request was refused"""
        self.times = Times(time.monotonic())
        self.cached_tokens: int | None = None
        """tokens of the prompt that another request computed; None: not known yet"""

    def start(self, cached_tokens: int | None) -> None:
        """Notes that a sample has left the queue. The first one gives cached_tokens: the others share its prompt."""
        if self.times.started is None:
            self.times.started, self.cached_tokens = time.monotonic(), cached_tokens

    @property
    def ended(self) -> bool:
        return all(sample.completion is not None for sample in self.samples)


class Sample:
    """One sample of a request: it waits, decodes in a slot, and ends."""

    def __init__(self, ticket: Ticket, index: int, ids: list[int], entry: Entry | None, stops: tuple[int, ...] = ()):
        """
        Args:
            stops: the request's own token ids that end an answer, in addition to the engine's.
        """
        self.ticket, self.index, self.ids, self.entry = ticket, index, ids, entry
        self.number = -1
        """the order of arrival, set when it is queued"""
        self.stops = frozenset(stops)
        self.key = prompt_key(entry.content if entry else None, ids, ticket.request.cache_salt)
        self.tokens: list[int] = []
        self.reached = 0
        """how many tokens it had when it last gave up its slot; the same ones come again"""
        self.logprobs: list[TokenLogprob] = []
        """of each of `tokens`, if the request asks for them"""
        self.kept_end = False
        """whether the last of `tokens` is the one that ended the answer"""
        self.prompt_logprobs: list[TokenLogprob | None] | None = None
        """of the prompt, once it is scored"""
        self.guide: Guide | None = None
        """what its tokens may be, if the request asks for structured outputs"""
        self.lookup: Lookup | None = None
        """what may follow its tokens, where the engine speculates"""
        self.search: BeamSearch | None = None
        """its beams while they decode, if the request asks for them. The other samples get their answers from it too"""
        self.score: float | None = None
        """of its answer in the beam search"""
        self.text: AnswerText | None = None
        """the text of the tokens so far, kept only where it is needed before the end: for stop texts and streams"""
        self.completion: Completion | None = None

    @property
    def request(self) -> Request:
        return self.ticket.request

    @cached_property
    def sampling(self) -> Sampling:
        """How its tokens are drawn. The request has its seed once it is queued."""
        return self.request.sampling.for_index(self.index)

    @property
    def rows(self) -> int:
        """How many slots it needs."""
        return int(self.request.num_beams)

    @property
    def followers(self) -> list[Sample]:
        """The samples that get their answers from this one's beam search. They are never queued."""
        return self.ticket.samples[1:] if self.rows > 1 and self.index == 0 else []

    def restart(self, tokenizer) -> None:
        """Forgets the tokens, which will be decoded again. Keeps the prompt's scores, which a stream may be about to
        show, unless the pass that gave them has to give its token too."""
        self.reached = max(self.reached, self.length)
        self.tokens, self.logprobs, self.text, self.lookup, self.search = [], [], None, None, None
        if not self.decodes:
            self.prompt_logprobs = None
        if self.guide is not None:
            self.guide.restart()
        self.follow_text(tokenizer)

    @property
    def length(self) -> int:
        """Tokens of its answer so far, or of its beams'."""
        return len(self.search.running[0].tokens if self.search else self.tokens)

    @property
    def unscored(self) -> bool:
        """Whether its prompt has yet to be scored."""
        return self.request.prompt_logprobs is not None and self.prompt_logprobs is None

    @property
    def decodes(self) -> bool:
        """Whether it needs a slot. Scoring a prompt also gives the token after it."""
        return self.request.prompt_logprobs is None or self.request.max_new_tokens > 1

    def follow_text(self, tokenizer) -> None:
        """Decodes the text along with the tokens, if it is needed before the end."""
        stop = self.request.stop_texts
        if stop or self.ticket.streamed:
            self.text = AnswerText(tokenizer, stop, strip=self.request.strip, after=self.tokens_before(tokenizer))

    def full_text(self, tokenizer, partial: bool) -> str:
        """The text of the tokens. Where they have none, raises the error, or gives "" if `partial`."""
        if self.text is not None:
            return str(self.text)
        try:
            tokens = self.tokens[:-1] if self.kept_end else self.tokens
            text = text_of(tokenizer, tokens, self.tokens_before(tokenizer))
            return text.strip() if self.request.strip else text
        except BaseException as error:
            if not (partial and is_request_error(error)):
                raise
            return ""

    def tokens_before(self, tokenizer) -> tuple[int, ...]:
        """Tokens before the answer's, with which its text is decoded."""
        return () if self.request.strip or self.request.alone else word_tokens(tokenizer)

    def piece(self, given: int) -> Piece | None:
        """What has become certain after the first `given` tokens; None for nothing."""
        ended, count = self.completion, len(self.tokens)
        if ended is None and count <= given:  # fewer after an interrupt: the same tokens come again
            return None
        assert self.text is not None, "a streamed sample follows its text"
        texts = self.text.pieces
        logprobs = None if self.request.logprobs is None else self.logprobs[given:]
        if ended is None:
            return Piece(self.index, "".join(texts[given:count]), self.tokens[given:], logprobs=logprobs)
        return Piece(
            self.index, "".join(texts[given:]), self.tokens[given:], ended.finish_reason, ended.error, logprobs
        )


def is_request_error(error: BaseException) -> bool:
    """Whether an error while a request's text is read or written concerns that request alone: any Exception, and the
    panics of the tokenizers library, which are not Exceptions."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
