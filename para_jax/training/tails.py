"""Training batches cut for scope `response`: the prompts, and the tails on which the loss is."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ..adapters.segments import Segments
from ..data.batches import Batch
from ..data.packing import Packed
from ..model.tail import Tokens, tail_start


class Cut(NamedTuple):
    """A batch, cut in two."""

    prompts: Tokens
    tails: Tokens
    predicting: jax.Array
    """int32 [rows, C]: the place in its row's tails of the token that predicts each completion token"""


def cut_batch(batch: Batch, window: int, prompt: int, completion: int) -> Cut:
    """A padded batch, cut at each prompt's last `window` tokens.

    Args:
        prompt, completion: the largest number of tokens of a prompt and of a completion.
    """
    window = min(window, prompt)
    tokens, prompt_length = jnp.asarray(batch.tokens), jnp.asarray(batch.prompt_length)
    start = tail_start(prompt_length, window)
    position = start[:, None] + jnp.arange(window + completion - 1)
    tails = jnp.take_along_axis(tokens, jnp.minimum(position, tokens.shape[1] - 1), axis=1)
    predicting = (prompt_length - start)[:, None] + jnp.arange(completion) - 1
    return Cut(Tokens(tokens[:, :prompt], jnp.arange(prompt)), Tokens(tails, position), predicting)


def cut_packed(batch: Packed, window: int, prompt: int, completion: int) -> Cut:
    """Packed rows, cut the same way. The prompts of a row are packed in one row again, and so are its tails.

    Args:
        prompt, completion: the largest number of tokens of all prompts, and of all completions, in a row.
    """
    segments, window = batch.start.shape[1], min(window, prompt)
    is_example = batch.length > batch.prompt_length  # padding segments have no completion
    first = tail_start(jnp.asarray(batch.prompt_length), window)
    prompts = packed_part(batch, jnp.where(is_example, batch.prompt_length, 0), 0 * first, prompt)
    lengths = jnp.where(is_example, batch.length - first - 1, 0)
    tails = packed_part(batch, lengths, first, completion + min(segments * (window - 1), prompt))
    assert tails.segments is not None
    segment = jnp.take_along_axis(jnp.asarray(batch.segment), jnp.asarray(batch.predicted), axis=1)
    shift = tails.segments.start - batch.start - first - 1
    predicting = batch.predicted + jnp.take_along_axis(shift, jnp.maximum(segment, 0), axis=1)
    return Cut(prompts, tails, jnp.clip(predicting, 0, tails.tokens.shape[1] - 1))


def packed_part(
    batch: Packed, lengths: Int[Array, "rows segments"], first: Int[Array, "rows segments"], size: int
) -> Tokens:
    """The tokens first .. first + length - 1 of every segment, one after another in rows of `size` tokens."""
    stop = jnp.cumsum(lengths, axis=1)
    start = jnp.where(lengths > 0, stop - lengths, 0)  # an empty one reads the first token; none may be at its place
    place = jnp.arange(size)
    segment = jnp.sum(place[:, None] >= stop[:, None], axis=2)  # [rows, size]: how many segments end before
    inside = segment < lengths.shape[1]
    segment = jnp.minimum(segment, lengths.shape[1] - 1)
    of_token = lambda values: jnp.take_along_axis(jnp.asarray(values), segment, axis=1)  # noqa: E731
    position = jnp.where(inside, of_token(first) + place - of_token(start), 0)
    chosen = jnp.where(inside, of_token(batch.start) + position, 0)
    tokens = jnp.take_along_axis(jnp.asarray(batch.tokens), chosen, axis=1)
    return Tokens(tokens, position, Segments(jnp.where(inside, segment, -1).astype(jnp.int32), start))
