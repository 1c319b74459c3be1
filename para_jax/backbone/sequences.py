"""What users pass to the model: a batch of token sequences, padded on the right, and their lengths."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


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
    tokens = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
    if tokens.ndim != 2:
        raise ValueError(f"tokens of shape {tokens.shape}: pass [batch, length], padded on the right")
    batch, total = tokens.shape
    lengths = [total if value is None else value for value in (prompt_length, length)]
    # JAX clips an index that is too large, and says nothing.
    if not any(isinstance(value, Tracer) for value in lengths):
        prompt, row = np.broadcast_arrays(*map(np.asarray, lengths))
        most = min(total, positions)
        if (prompt < 1).any() or (prompt > row).any() or (row > most).any():
            raise ValueError(
                f"prompt_length {prompt.tolist()}, length {row.tolist()}: need 1 <= prompt_length <= length <= {most}, "
                "the tokens per row or the model's positions"
            )
    if tokens.size and not isinstance(tokens, Tracer) and getattr(tokens, "is_fully_addressable", True):
        require_in_vocabulary(np.asarray(tokens), vocab_size)
    prompt_length, length = (jnp.broadcast_to(jnp.asarray(n, jnp.int32), (batch,)) for n in lengths)
    return jnp.asarray(tokens, jnp.int32), prompt_length, length


def require_in_vocabulary(ids: np.ndarray, vocab_size: int) -> None:
    """Raises ValueError for ids that the vocabulary lacks: JAX would take the nearest one that there is."""
    lowest, highest = ids.min(), ids.max()
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"token ids {lowest} to {highest}: the vocabulary has ids 0 to {vocab_size - 1}; use its tokenizer"
        )
