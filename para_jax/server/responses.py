"""The answers of both endpoints as OpenAI's API writes them: whole, and as server-sent events."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import NamedTuple

from .choices import Choice, ChoicePart
from .logprobs import chat_logprobs, text_logprobs

DONE = b"data: [DONE]\n\n"
#: Characters that JSON leaves as they are, and that end a line to clients that read an event line by line with Python's
#: splitlines, such as httpx.
LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}


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


class Usage(NamedTuple):
    """Tokens of all prompts and answers of a request."""

    prompt: int
    cached: int
    """of the prompt, those that were in the prefix cache"""
    new: int

    def json(self) -> dict:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.new,
            "total_tokens": self.prompt + self.new,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class Writer:
    """Writes the answer to one request."""

    def __init__(self, shape: Shape, model: str, request_id: str, *, include_usage: bool = False):
        """
        Args:
            model: the name that the client asked for.
            include_usage: whether a stream ends with the usage.
        """
        self._shape, self._include_usage = shape, include_usage
        self._head = {"id": shape.id + request_id, "created": int(time.time()), "model": model}

    def whole(self, choices: list[dict], usage: Usage) -> bytes:
        return encoded({**self._head, "object": self._shape.whole, "choices": choices, "usage": usage.json()})

    def event(self, delta: dict, usage: Usage | None = None) -> bytes:
        """One server-sent event with what is new of one choice, perhaps with the usage so far."""
        return self._event([delta], usage and usage.json())

    def usage_event(self, usage: Usage) -> bytes:
        """The last event of a stream with usage; nothing if it was not asked for."""
        return self._event([], usage.json()) if self._include_usage else b""

    def _event(self, choices: list[dict], usage: dict | None) -> bytes:
        chunk = {**self._head, "object": self._shape.chunk, "choices": choices}
        if self._include_usage:
            chunk["usage"] = usage
        return b"data: " + encoded(chunk) + b"\n\n"


def error_event(body: bytes) -> bytes:
    """An error in a stream that has begun."""
    return b"data: " + body + b"\n\n"


def encoded(value: object) -> bytes:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(LINE_ENDS).encode()


# ---------------------------------------------------------------------------------------------------------------- chat


def chat_choice(choice: Choice, part: ChoicePart) -> dict:
    return {
        "index": choice.index,
        "message": {"role": "assistant", "content": part.text},
        "logprobs": None if part.logprobs is None else chat_logprobs(choice.tokens, part.logprobs),
        "finish_reason": part.finish_reason,
    }


def chat_deltas(choice: Choice, part: ChoicePart) -> list[dict]:
    """The first piece of a choice comes after one that names the role."""
    logprobs = chat_logprobs(choice.tokens, part.logprobs) if part.logprobs else None
    content = {"content": part.text} if part.text or logprobs else {}
    delta = {"index": choice.index, "delta": content, "logprobs": logprobs, "finish_reason": part.finish_reason}
    first = {"index": choice.index, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
    return [first | {"finish_reason": None}, delta] if part.first else [delta]


# ---------------------------------------------------------------------------------------------------------------- text


def text_choice(choice: Choice, part: ChoicePart) -> dict:
    logprobs = None if part.logprobs is None else text_logprobs(choice, part)
    return {"index": choice.index, "text": part.text, "logprobs": logprobs, "finish_reason": part.finish_reason}


def text_deltas(choice: Choice, part: ChoicePart) -> list[dict]:
    return [text_choice(choice, part)]


CHAT = Shape("chatcmpl-", "chat.completion", "chat.completion.chunk", chat_choice, chat_deltas)
TEXT = Shape("cmpl-", "text_completion", "text_completion", text_choice, text_deltas)
