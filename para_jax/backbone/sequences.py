"""Checks what users pass to the model: a batch of token sequences, padded on the right, and their lengths."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ..io.checks import shorten


def checked_sequences(
    tokens, prompt_length, length, *, vocab_size: int, positions: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(tokens [batch, T], prompt_length [batch], length [batch]), all int32.

    Raises ValueError unless 1 <= prompt_length <= length <= T, length <= positions, and every id is in the vocabulary.
    Values that are traced, or in part on other hosts, cannot be checked.

    Args:
        tokens: an array, or a list of lists.
        prompt_length, length: None means T.
        positions: those of the model.
    """
    tokens = as_array(tokens)
    if tokens.ndim != 2 or not are_integers(tokens):
        raise ValueError(f"tokens of shape {tokens.shape}: pass integers [batch, length], padded on the right")
    batch, total = tokens.shape
    given = {"prompt_length": prompt_length, "length": length}
    lengths = {name: total if value is None else value for name, value in given.items()}
    for name, value in lengths.items():
        if np.shape(value) not in ((), (batch,)) or not are_integers(value):
            raise ValueError(f"{name} {shorten(value)}: pass one integer, or one for each of the {batch} rows")
    if not any(isinstance(value, Tracer) for value in lengths.values()):
        prompt, row = np.broadcast_arrays(*map(np.asarray, lengths.values()))
        if (prompt < 1).any() or (prompt > row).any() or (row > total).any():
            named = ", ".join(f"{name} {np.asarray(value).tolist()}" for name, value in lengths.items())
            raise ValueError(f"{named}: need 1 <= prompt_length <= length <= {total}, the tokens per row")
        if (row > positions).any():
            raise ValueError(f"length {row.max()}: the model has {positions} positions; pass fewer tokens")
    if not isinstance(tokens, Tracer) and getattr(tokens, "is_fully_addressable", True):
        check_vocabulary(np.asarray(tokens), vocab_size)
    prompt_length, length = (jnp.broadcast_to(jnp.asarray(n, jnp.int32), (batch,)) for n in lengths.values())
    return jnp.asarray(tokens, jnp.int32), prompt_length, length


def checked_next_tokens(tokens, batch: int, vocab_size: int) -> jax.Array:
    """The next token of each row, int32 [batch]. Raises ValueError for others. Ids on a device are not looked at: every
    step would wait for them."""
    tokens = as_array(tokens)
    if tokens.shape != (batch,) or not are_integers(tokens):
        given = f"tokens of shape {tokens.shape} and type {tokens.dtype}"
        raise ValueError(f"{given}: pass one integer for each of the {batch} rows")
    if isinstance(tokens, np.ndarray):
        check_vocabulary(tokens, vocab_size)
    return jnp.asarray(tokens, jnp.int32)


def check_vocabulary(ids: np.ndarray, vocab_size: int) -> None:
    """Raises ValueError for ids that the vocabulary lacks."""
    lowest, highest = (ids.min(), ids.max()) if ids.size else (0, 0)
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"token ids {lowest} to {highest}: the vocabulary has ids 0 to {vocab_size - 1}; use its tokenizer"
        )


def are_integers(values) -> bool:
    return np.issubdtype((values if isinstance(values, jax.Array) else np.asarray(values)).dtype, np.integer)


def as_array(rows, name: str = "tokens") -> jax.Array | np.ndarray:
    """Tokens, or their mask, as an array. Raises ValueError for rows of different lengths."""
    if isinstance(rows, jax.Array):
        return rows
    try:
        return np.asarray(rows)
    except ValueError:
        raise ValueError(f"{name}: the rows have different lengths; pad them on the right to one length") from None
