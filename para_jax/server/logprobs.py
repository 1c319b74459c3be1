"""Log-probabilities as the two endpoints write them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..inference.logprobs import TokenLogprob
from .errors import ApiError
from .token_text import TokenTexts

if TYPE_CHECKING:
    from .choices import Choice, ChoicePart

#: JSON has no minus infinity; OpenAI writes this for a token that is very unlikely.
LEAST = -9999.0


def chat_logprobs(tokens: TokenTexts, logprobs: list[TokenLogprob | None]) -> dict:
    """The `logprobs` of a chat's choice."""
    return {"content": [chat_token(tokens, one) for one in logprobs if one is not None]}


def chat_token(tokens: TokenTexts, one: TokenLogprob) -> dict:
    return token_fields(tokens, one.token, one.logprob) | {
        "top_logprobs": [token_fields(tokens, *top) for top in one.top]
    }


def token_fields(tokens: TokenTexts, token: int, logprob: float) -> dict:
    return {"token": tokens.text(token), "logprob": finite(logprob), "bytes": list(tokens.bytes(token))}


def text_logprobs(choice: Choice, part: ChoicePart) -> dict:
    """The `logprobs` of a text's choice: four parallel lists. The first token of an echoed prompt has null."""
    found, tokens = part.logprobs or [], choice.tokens
    return {
        "tokens": [tokens.key(id) for id in part.ids],
        "token_logprobs": [None if one is None else finite(one.logprob) for one in found],
        "top_logprobs": [None if one is None else alternatives(tokens, one) for one in found],
        "text_offset": part.offsets,
    }


def alternatives(tokens: TokenTexts, one: TokenLogprob) -> dict[str, float]:
    """The likeliest tokens, and the token itself. Of tokens with one text, the likeliest counts."""
    found: dict[str, float] = {}
    for token, logprob in [*one.top, (one.token, one.logprob)]:
        found.setdefault(tokens.key(token), finite(logprob))
    return found


def finite(logprob: float) -> float:
    """The number as JSON has it. Raises ApiError for NaN: the adapter or the backbone overflows."""
    if math.isnan(logprob):
        message = "the model's log-probabilities are not numbers (NaN): its adapter or its precision overflows"
        raise ApiError(500, message, code="engine_error")
    return max(logprob, LEAST)
