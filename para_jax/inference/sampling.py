"""How an answer is sampled: the settings that a user gives, the same settings as arrays with one entry per row, and the
random keys that make a row's draws independent of the other rows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..config import shorten


def is_whole(value: object) -> bool:
    """Whether a value is a whole number, of Python or NumPy. A bool is not."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


@dataclass(frozen=True)
class Sampling:
    """Settings of one answer. Raises ValueError for a setting out of its range, so every Sampling is valid."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    """0: greedy"""
    top_k: int = 0
    """draw from the k likeliest tokens; 0: from all"""
    top_p: float = 1.0
    """draw from the likeliest tokens that together have this probability"""
    seed: int = 0
    stop: str | Sequence[str] = ()
    """texts that end the answer, special tokens too; held as a tuple"""

    def __post_init__(self):
        if not is_whole(self.max_new_tokens) or self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {shorten(self.max_new_tokens)}; give a whole number of at least 1")
        if not isinstance(self.temperature, Real) or not 0 <= self.temperature < 1e38:  # the limit of float32; not NaN
            raise ValueError(f"temperature is {shorten(self.temperature)}; give a number of at least 0 (0: greedy)")
        if not is_whole(self.top_k) or not 0 <= self.top_k < 2**31:
            raise ValueError(f"top_k is {shorten(self.top_k)}; give a whole number of at least 0 (0: all tokens)")
        if not isinstance(self.top_p, Real) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {shorten(self.top_p)}; give a probability above 0 and at most 1")
        if not is_whole(self.seed) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {shorten(self.seed)}; give a whole number from 0 to 2**32 - 1")
        texts = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(texts, Sequence) or not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f"stop is {shorten(self.stop)}; give texts that are not empty")
        object.__setattr__(self, "stop", tuple(texts))  # the dataclass is frozen

    def for_index(self, index: int) -> Sampling:
        """The settings of prompt or sample `index` of several: each has its own seed."""
        return replace(self, seed=(self.seed + index) % 2**32)


class RowSampling(NamedTuple):
    """Settings of a batch, one entry per row."""

    seeds: jax.Array | np.ndarray
    """uint32 [batch]"""
    temperature: jax.Array | np.ndarray
    """float32 [batch]"""
    top_k: jax.Array | np.ndarray
    """int32 [batch]"""
    top_p: jax.Array | np.ndarray
    """float32 [batch]"""


GREEDY = Sampling()


def row_sampling(rows: Sequence[Sampling | None]) -> RowSampling:
    """The settings of a batch. A row of None is greedy: an empty row costs no sampling."""
    held = [row or GREEDY for row in rows]
    return RowSampling(
        np.array([row.seed for row in held]).astype(np.uint32),
        np.array([row.temperature for row in held], np.float32),
        np.array([row.top_k for row in held], np.int32),
        np.array([row.top_p for row in held], np.float32),
    )


def row_keys(seeds, position) -> jax.Array:
    """Each row's key for the token at `position` (int or [batch]; 0: the first new one), of seeds uint32 [batch]."""
    return jax.vmap(jax.random.fold_in)(jax.vmap(jax.random.key)(seeds), jnp.broadcast_to(position, seeds.shape))


def derived_seed(seed: int, *path: int | str) -> int:
    """A seed in [0, 2**32) for one of many draws under a common seed: equal for the same path, unrelated otherwise."""
    return int.from_bytes(hashlib.sha256(repr((seed, *path)).encode()).digest()[:4], "big")
