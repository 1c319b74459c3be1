"""What evaluation asks of a model, as token ids and so without an adapter: the same question goes to many of them."""

from __future__ import annotations

import hashlib
import json
from typing import NamedTuple

from ..adapters.bank import Entry
from ..inference.content import ANSWERS_VERSION
from ..inference.content import backbone_content as backbone_content
from ..inference.content import writing_content as writing_content


class Likelihood(NamedTuple):
    """How likely a continuation is after a context, from whose tokens alone an adapter makes its factors."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Generation(NamedTuple):
    """What is written after a context, up to an end token or a stop text."""

    context: tuple[int, ...]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    """0: greedy"""
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    """that end it too, next to the tokenizer's and the model's: a chat's end of a turn"""


Asked = Likelihood | Generation


class Scored(NamedTuple):
    """The answer to a Likelihood."""

    logprob: float
    """nats, summed over the continuation's tokens"""
    greedy: bool
    """whether greedy decoding would write the continuation"""


class Written(NamedTuple):
    """The answer to a Generation."""

    text: str
    tokens: int
    """that were made"""


Answer = Scored | Written


def key(asked: Asked, entry: Entry | None, backbone: str, writing: str) -> str:
    """What an answer depends on, hashed: the question, the adapter's content (never its name), the backbone's and the
    version of our answers; for a Generation also `writing_content`."""
    parts = [ANSWERS_VERSION, type(asked).__name__, asked, entry.content if entry else None, backbone]
    parts += [writing] if isinstance(asked, Generation) else []
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
