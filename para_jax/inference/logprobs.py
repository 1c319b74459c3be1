"""Log-probabilities of tokens: log_softmax of the raw logits in float32, natural logarithms. Temperature, top_k and
top_p change what is drawn, and not these."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class TokenLogprob(NamedTuple):
    """The log-probability of one token."""

    token: int
    logprob: float
    """NaN or infinite where the logits are"""
    top: list[tuple[int, float]]
    """the likeliest tokens at its position, the likeliest first; of equal ones the lower id"""


class Logprobs(NamedTuple):
    """The same for an array of tokens."""

    of_token: Any
    """float32 [...]"""
    top_ids: Any
    """int32 [..., top]"""
    of_top: Any
    """float32 [..., top]"""

    def records(self, tokens: list[int], top: int) -> list[TokenLogprob]:
        """The records of tokens, from arrays with one axis on the host.

        Args:
            top: alternatives per record, at most those that are there.
        """
        ids, values = self.top_ids[:, :top].tolist(), self.of_top[:, :top].tolist()
        each = zip(tokens, self.of_token.tolist(), ids, values, strict=False)
        return [TokenLogprob(token, own, list(zip(*tops, strict=True))) for token, own, *tops in each]


def logprobs_of(logits: jax.Array, tokens: jax.Array, top: int) -> Logprobs:
    """The log-probabilities of tokens int32 [...] and of the `top` likeliest, under logits [..., vocab]."""
    logits = logits.astype(jnp.float32)
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    own = jnp.take_along_axis(logits, tokens[..., None], axis=-1) - total
    values, ids = jax.lax.top_k(logits, top)
    return Logprobs(own[..., 0], ids, values - total)
