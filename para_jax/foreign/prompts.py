"""Where each row's prompt ends: from the call, from a rule, or from the cache. Never a guess."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


@dataclass(frozen=True)
class LeftPadded:
    """Prompts are padded on the left to `width` tokens, and completions follow them: Tunix's DPO batches.

    >>> LeftPadded(3).ends(np.zeros((2, 8), int)).tolist()
    [2, 2]
    """

    width: int

    def ends(self, tokens: Int[Array, "batch T"]) -> Int[Array, " batch"]:
        if not 1 <= self.width <= tokens.shape[1]:
            raise ValueError(f"LeftPadded({self.width}) does not fit rows of {tokens.shape[1]} tokens")
        return jnp.full(len(tokens), self.width - 1, jnp.int32)


@dataclass(frozen=True)
class EndsWith:
    """A prompt ends where these token ids occur last, such as the start of the assistant's turn. A row without them
    gets NaN, because a compiled program can raise no error.

    >>> EndsWith((7, 8)).ends(np.array([[1, 7, 8, 5], [7, 8, 7, 8]])).tolist()
    [2, 3]
    """

    tokens: tuple[int, ...]

    def ends(self, tokens: Int[Array, "batch T"]) -> Int[Array, " batch"]:
        index = jnp.arange(tokens.shape[1])
        found = index >= len(self.tokens) - 1
        for back, token in enumerate(reversed(self.tokens)):
            found &= jnp.roll(tokens, back, axis=1) == token
        return jnp.max(jnp.where(found, index, -1), axis=1).astype(jnp.int32)


WIDTH: ContextVar[int | None] = ContextVar("prompt width", default=None)


@contextmanager
def prompt_width(width: int) -> Iterator[None]:
    """Within it, every call's prompts are padded on the left to `width` tokens. Set it inside the function that is
    compiled, from a shape, as `para_grpo` does: JAX does not see that it has changed."""
    token = WIDTH.set(width)
    try:
        yield
    finally:
        WIDTH.reset(token)


def prompt_ends(prompt_end: Any, rule: Any, tokens: jax.Array, prefills: bool) -> Int[Array, " batch"]:
    """The index of each prompt's last token, from the first source that there is. Raises ValueError without one.

    Args:
        prompt_end: as the call gives it.
        prefills: whether the call fills a cache. Its rows are prompts, padded on the left.
    """
    if prompt_end is not None:
        return jnp.asarray(prompt_end, jnp.int32)
    if prefills:
        return jnp.full(len(tokens), tokens.shape[1] - 1, jnp.int32)
    if (width := WIDTH.get()) is not None:
        return LeftPadded(width).ends(tokens)
    if rule is not None:
        return rule.ends(tokens)
    raise ValueError(
        "prompt_end is missing: the adapter reads each row's prompt. Call the model with prompt_end=int32[batch], the "
        "index of each prompt's last token, or attach(..., prompts=LeftPadded(width) or EndsWith(token_ids))"
    )
