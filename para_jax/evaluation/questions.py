"""Questions that evaluation asks a model, as token ids. They name no adapter, so all adapters are asked the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable
from typing import Any, NamedTuple

from ..adapters.bank import Entry
from ..inference.content import ANSWERS_VERSION

#: The seeds of lm-eval's command line, by which its tasks draw few-shot examples.
SEEDS = {"random_seed": 0, "numpy_seed": 1234, "fewshot_seed": 1234}


class Likelihood(NamedTuple):
    """Asks for the log-likelihood of a continuation given a context. The adapter sees the context only."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    reads: tuple[int, ...] | None = None
    """the tokens that the adapter makes its factors from; None: the context"""


class Generation(NamedTuple):
    """Asks for the text after a context, up to an end token or a stop text."""

    context: tuple[int, ...]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    """0: greedy"""
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    """tokens that end this answer, in addition to the tokenizer's and the model's: the end of a turn in a chat"""
    reads: tuple[int, ...] | None = None
    """as in Likelihood"""


Question = Likelihood | Generation


class Scored(NamedTuple):
    """The answer to a Likelihood."""

    logprob: float
    """nats, summed over the continuation's tokens"""
    greedy: bool
    """whether greedy decoding would write the continuation"""


class Written(NamedTuple):
    """The answer to a Generation."""

    text: str
    """with the white space at its ends; `score_answers` strips"""
    tokens: int
    """how many were written"""
    finite: bool = True
    """False: the logits were not finite, so the text is empty"""


Answer = Scored | Written


class Pending(NamedTuple):
    """A question that waits for its answer."""

    key: Hashable
    """equal for questions with the same answer only"""
    tenant: Any
    entry: Any
    """the tenant's entry in the bank; None: the base model"""
    question: Any
    """a Question; in a list of one kind, a Likelihood or a Generation"""


def key(question: Question, entry: Entry | None, backbone: str, writing: str, dtype: str = "float32") -> str:
    """A hash of everything that an answer depends on: the question, the adapter's content (never its name) and the
    dtype of its bank, the backbone's content and ANSWERS_VERSION; for a Generation also `writing_content`."""
    adapter = entry and f"{entry.content} {dtype}"
    parts = [ANSWERS_VERSION, type(question).__name__, question, adapter, backbone]
    parts += [writing] if isinstance(question, Generation) else []
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
