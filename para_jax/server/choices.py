"""Choices: the samples of a request's prompts, as their pieces come from the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..data.examples import Ids, Prompt
from ..inference.answer_text import AnswerText, special_ids, text_of, word_tokens
from ..inference.logprobs import TokenLogprob
from ..serving.engine import Engine
from ..serving.request import Piece
from .engine_requests import one_token_is_scored
from .protocol import Body, ChatBody
from .token_text import TokenTexts
from .tools import calls_of, certain


class ChoicePart(NamedTuple):
    """What is new of a choice."""

    text: str
    logprobs: list[TokenLogprob | None] | None
    """of its tokens, and with echo first of the prompt's; None if they were not asked for. The first token of a prompt
    has none"""
    offsets: list[int] | None
    """where each of these tokens begins in the choice's text"""
    ids: list[int]
    """the tokens' ids"""
    new_tokens: int
    """how many of them are the answer's"""
    finish_reason: str | None
    first: bool = False
    """whether nothing of the choice came before"""
    calls: Sequence[dict] = ()
    """of functions, with the last part"""


class Choice:
    """One choice. `take` gives what is new since the last time."""

    def __init__(self, index: int, body: Body, prompt: Prompt | Ids, stream, engine: Engine, tokens: TokenTexts):
        """
        Args:
            stream: the engine's, of this prompt.
        """
        self.index, self.tokens, self.finish_reason = index, tokens, None
        self._body, self._prompt, self._stream, self._engine = body, prompt, stream, engine
        self._text, self._ids, self._logprobs = "", [], []
        self._begun = self._has_text = False
        after = () if body.echo else word_tokens(engine.tokenizer)
        self._offsets = Offsets(engine.tokenizer, after, prompt if body.echo and isinstance(prompt, str) else "")

    def put(self, piece: Piece) -> None:
        """Adds the next piece of its sample."""
        self._text += piece.text
        self._ids += piece.tokens
        self._logprobs += piece.logprobs or []
        self.finish_reason = piece.finish_reason
        if piece.finish_reason == "length" and one_token_is_scored(self._body):
            self.finish_reason = "stop" if piece.tokens[-1:] and piece.tokens[-1] in self._engine.stop_ids else "length"

    def take(self) -> ChoicePart | None:
        """What is new; None for nothing that a client could see."""
        scored, first, finish = self._body.alternatives is not None, not self._begun, self.finish_reason
        text, held, calls = self._text, "", []
        if isinstance(self._body, ChatBody) and self._body.may_call:
            if finish is None:
                at = certain(text, self._body, self._has_text)
                text, held = text[:at], text[at:]
            else:
                text, calls = calls_of(text, self._body, self._has_text)
                finish = "tool_calls" if calls and finish == "stop" else finish
        if not (text or finish or (scored and self._ids)):
            return None
        self._begun, self._has_text = True, self._has_text or bool(text)
        ids, logprobs, new = self._ids, self._logprobs, len(self._ids)
        self._text, self._ids, self._logprobs = held, [], []
        if first and self._body.echo:
            before, prompt = list(self._stream.prompt_ids), self._prompt
            text = (prompt if isinstance(prompt, str) else text_of(self._engine.tokenizer, before)) + text
            if scored:
                ids, logprobs = before + ids, list(self._stream.prompt_logprobs) + logprobs
        offsets = [self._offsets.next(token) for token in ids] if scored else None
        return ChoicePart(text, logprobs if scored else None, offsets, ids, new, finish, first, calls)


class Offsets:
    """Where tokens begin in a text, one after the other."""

    def __init__(self, tokenizer, after: tuple[int, ...], prompt: str = ""):
        """
        Args:
            after: tokens that the text follows.
            prompt: what the text begins with, as it was given. It may have special tokens by their names, where an
                answer has no text for them.
        """
        self._text, self._at = AnswerText(tokenizer, strip=False, after=after), 0
        self._tokenizer, self._prompt = tokenizer, prompt

    def next(self, token: int) -> int:
        start = self._at
        self._text.add(token)
        self._at += len(self._text.pieces[-1])
        if start < len(self._prompt) and token in special_ids(self._tokenizer, len(self._tokenizer)):
            name = self._tokenizer.convert_ids_to_tokens(token)
            self._at += len(name) if self._prompt.startswith(name, start) else 0
        return start


def choices_of(body: Body, streams: list, engine: Engine, tokens: TokenTexts) -> dict[tuple[int, int], Choice]:
    """The choices of a request, by the numbers of prompt and sample: the first prompt's samples come first."""
    return {
        (number, sample): Choice(number * body.n + sample, body, prompt, stream, engine, tokens)
        for number, (prompt, stream) in enumerate(zip(body.prompts, streams, strict=True))
        for sample in range(body.n)
    }
