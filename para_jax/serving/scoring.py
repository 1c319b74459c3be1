"""The log-probabilities of a prompt's own tokens: one teacher-forced pass over it."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax

from ..inference.draw import RowSampling
from ..inference.logprobs import Logprobs, logprobs_of
from ..model.adapted import token_of
from ..model.residual import residual_stream
from ..training.loss import of_logits
from .slots import drawn


class ScoredPrompt(NamedTuple):
    """What the pass over a prompt gives."""

    prompt: Logprobs
    """of all its tokens but the first, and of padding: [1, T - 1]"""
    token: jax.Array
    """int32 [1]: the token that follows it"""
    of_token: Logprobs
    """[1]"""


@partial(jax.jit, static_argnums=(0, 7))
def score_prompt(
    treedef, leaves, adapters, tokens, context_length, length, sampling: RowSampling, top: int
) -> ScoredPrompt:
    """Scores a prompt and draws the token after it. The model is passed flat. The logits come in chunks, so those of a
    long prompt are never there at once.

    Args:
        adapters: None or Rows, for one row.
        tokens: int32 [1, T], padded on the right.
        context_length: int32 [1]: the tokens that the adapter reads as its prompt.
        length: int32 [1]: the tokens without padding.
        top: alternatives per token.
    """
    model = jax.tree.unflatten(treedef, leaves)
    hidden = model.final_norm(residual_stream(model, adapters, tokens, context_length)[0])
    of_prompt = of_logits(partial(logprobs_of, top=top), model, hidden[:, :-1], tokens[:, 1:])
    last = model.logits(token_of(hidden, length - 1))
    token = drawn(last, sampling, 0)
    return ScoredPrompt(of_prompt, token, logprobs_of(last, token, top))
