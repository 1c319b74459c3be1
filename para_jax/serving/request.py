"""What the engine is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

from ..config import require
from ..data.examples import Ids, Prompt, checked_messages
from ..inference.generate import whole

#: Limits of a request: samples, stop texts, and characters of a stop text.
MAX_SAMPLES, MAX_STOPS, MAX_STOP_LENGTH = 128, 16, 1024


@dataclass(frozen=True)
class Request:
    """One prompt for one tenant. Nothing is checked here: the engine answers a bad request with an error."""

    prompt: Prompt | Ids
    """a text, chat messages, or a tuple of token ids"""
    tenant: str | None = None
    """a name of the bank; None: the base model"""
    max_new_tokens: int = 64
    temperature: float = 0.0
    """0: greedy"""
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    """sample i is drawn with seed + i, whatever else runs. None: the engine draws a seed from its own and the request's
    number"""
    stop: str | tuple[str, ...] = ()
    """texts that end an answer, at most 16; special tokens too"""
    n: int = 1
    """samples, at most 128; the prompt is prefilled once for all of them"""
    id: Hashable = None
    """default: a number that the engine gives"""
    stop_token_ids: tuple[int, ...] = ()
    """ids that end an answer, next to the end tokens of tokenizer and model"""
    ignore_eos: bool = False
    """decode past end tokens, up to max_new_tokens: for benchmarks"""


class Completion(NamedTuple):
    """One answer: of sample `index` of request `id`."""

    id: Hashable
    index: int
    text: str
    tokens: list[int]
    """without the one that ended it"""
    finish_reason: str
    """stop | length | error"""
    error: str | None = None


class Piece(NamedTuple):
    """A part of an answer that `Engine.stream` gives: of sample `index`, what has become certain since the last one.
    The texts of a sample's pieces joined are its Completion's text, and so are the tokens."""

    index: int
    text: str
    """perhaps empty: half a character, and what may be the beginning of a stop text, come with a later piece"""
    tokens: list[int]
    finish_reason: str | None = None
    """of the sample's last piece: stop | length | error"""
    error: str | None = None


def check_request(request: Request) -> None:
    """Raises ValueError that names the field of a bad request, and says what was expected."""
    if isinstance(request.prompt, tuple):
        ids = bool(request.prompt) and all(whole(token) and token >= 0 for token in request.prompt)
        require(ids, "prompt", request.prompt[:8], "token ids, at least one")
    elif not isinstance(request.prompt, str):
        checked_messages("prompt", request.prompt)
    named = request.tenant is None or isinstance(request.tenant, str)
    require(named, "tenant", request.tenant, "a name of the bank, or None: the base model")
    new = request.max_new_tokens
    require(whole(new) and new >= 1, "max_new_tokens", new, "a whole number of at least 1")
    heat = request.temperature
    good = isinstance(heat, Real) and 0 <= heat < 1e38
    require(good, "temperature", heat, "a number of at least 0, within float32")
    k, p, seed, n = request.top_k, request.top_p, request.seed, request.n
    require(whole(k) and 0 <= k < 2**31, "top_k", k, "a whole number of at least 1, or 0: all tokens")
    require(isinstance(p, Real) and 0 < p <= 1, "top_p", p, "a probability above 0, at most 1")
    known = seed is None or (whole(seed) and 0 <= seed < 2**32)
    require(known, "seed", seed, "a whole number from 0 to 2**32 - 1, or None: one is drawn")
    require(whole(n) and 1 <= n <= MAX_SAMPLES, "n", n, f"a whole number from 1 to {MAX_SAMPLES}")
    ids = request.stop_token_ids
    require(isinstance(ids, tuple | list) and all(map(whole, ids)), "stop_token_ids", ids, "a list of token ids")
    stop = stop_texts(request)
    texts = isinstance(stop, (tuple, list)) and all(isinstance(text, str) and text for text in stop)
    require(texts, "stop", request.stop, "a text that is not empty, or a list of them")
    require(len(stop) <= MAX_STOPS, "stop: number of texts", len(stop), f"at most {MAX_STOPS}")
    longest = max(map(len, stop), default=0)
    require(longest <= MAX_STOP_LENGTH, "stop: characters of a text", longest, f"at most {MAX_STOP_LENGTH}")


def stop_texts(request: Request) -> tuple[str, ...]:
    """The request's stop texts, also where it gives one as it is."""
    return (request.stop,) if isinstance(request.stop, str) else request.stop
