"""The answers of both endpoints as OpenAI's API writes them: whole, and as server-sent events. They are plain
dictionaries: the classes of openai.types would need that package, and a check of each token's event."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from typing import NamedTuple

from ..inference.logprobs import TokenLogprob
from .choices import Choice, ChoicePart
from .errors import ApiError
from .token_text import TokenTexts

DONE = b"data: [DONE]\n\n"
#: JSON has no minus infinity; OpenAI writes this for a token that is very unlikely.
LEAST = -9999.0


class Shape(NamedTuple):
    """How an endpoint writes answers."""

    id: str
    """what ids begin with"""
    whole: str
    """the object of an answer"""
    chunk: str
    """the object of a piece of a stream"""
    choice: Callable[[Choice, ChoicePart], dict]
    """a complete choice"""
    deltas: Callable[[Choice, ChoicePart], list[dict]]
    """what a stream says of a choice when more of it is known"""

    def head(self, model: str, request_id: str) -> dict:
        """What each part of an answer begins with."""
        return {"id": self.id + request_id, "created": int(time.time()), "model": model}


def usage(prompt: int, cached: int, new: int) -> dict:
    """Tokens of all prompts and answers of a request; `cached` of its prompts' were in the prefix cache."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def encoded(value: object) -> bytes:
    """The JSON, in ASCII: some clients take other characters for the end of a line, and so of an event."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def event(data: bytes) -> bytes:
    """A server-sent event."""
    return b"data: " + data + b"\n\n"


# ---------------------------------------------------------------------------------------------------------------- chat


def chat_choice(choice: Choice, part: ChoicePart) -> dict:
    message: dict = {"role": "assistant", "content": part.text}
    if part.calls:
        message = {"role": "assistant", "content": part.text or None, "tool_calls": part.calls}
    return {"index": choice.index, "message": message, "logprobs": chat_logprobs(choice.tokens, part)} | ended(part)


def chat_deltas(choice: Choice, part: ChoicePart) -> list[dict]:
    """The first piece of a choice comes after one that names the role."""
    logprobs = chat_logprobs(choice.tokens, part) if part.logprobs else None
    content: dict = {"content": part.text} if part.text or logprobs else {}
    if part.calls:
        content["tool_calls"] = [{"index": i} | one for i, one in enumerate(part.calls)]
    delta = {"index": choice.index, "delta": content, "logprobs": logprobs} | ended(part)
    first = {"index": choice.index, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
    return [first | {"finish_reason": None}, delta] if part.first else [delta]


def ended(part: ChoicePart) -> dict:
    return {"finish_reason": part.finish_reason}


def chat_logprobs(tokens: TokenTexts, part: ChoicePart) -> dict | None:
    if part.logprobs is None:
        return None

    def fields(token: int, logprob: float) -> dict:
        return {"token": tokens.text(token), "logprob": finite(logprob), "bytes": list(tokens.bytes(token))}

    scored = [one for one in part.logprobs if one is not None]
    tops = ([fields(*top) for top in one.top] for one in scored)
    return {
        "content": [
            fields(one.token, one.logprob) | {"top_logprobs": top} for one, top in zip(scored, tops, strict=True)
        ]
    }


# ---------------------------------------------------------------------------------------------------------------- text


def text_choice(choice: Choice, part: ChoicePart) -> dict:
    logprobs = None if part.logprobs is None else text_logprobs(choice, part)
    return {"index": choice.index, "text": part.text, "logprobs": logprobs} | ended(part)


def text_deltas(choice: Choice, part: ChoicePart) -> list[dict]:
    return [text_choice(choice, part)]


def text_logprobs(choice: Choice, part: ChoicePart) -> dict:
    """Four parallel lists. The first token of an echoed prompt has null."""
    logprobs, tokens = part.logprobs or [], choice.tokens
    return {
        "tokens": [tokens.key(id) for id in part.ids],
        "token_logprobs": [None if one is None else finite(one.logprob) for one in logprobs],
        "top_logprobs": [None if one is None else alternatives(tokens, one) for one in logprobs],
        "text_offset": part.offsets,
    }


def alternatives(tokens: TokenTexts, one: TokenLogprob) -> dict[str, float]:
    """The likeliest tokens, and the token itself. Of tokens with one text, the likeliest counts."""
    logprobs: dict[str, float] = {}
    for token, logprob in [*one.top, (one.token, one.logprob)]:
        logprobs.setdefault(tokens.key(token), finite(logprob))
    return logprobs


def finite(logprob: float) -> float:
    """The number as JSON has it. Raises ApiError for NaN: the adapter or the backbone overflows."""
    if math.isnan(logprob):
        message = "the model's log-probabilities are not numbers (NaN): its adapter or its precision overflows"
        raise ApiError(500, message, code="engine_error")
    return max(logprob, LEAST)


CHAT = Shape("chatcmpl-", "chat.completion", "chat.completion.chunk", chat_choice, chat_deltas)
TEXT = Shape("cmpl-", "text_completion", "text_completion", text_choice, text_deltas)
