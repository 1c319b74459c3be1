"""How an answer is sampled: the settings that a user gives, checked. draw.py draws by them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real

import numpy as np

from ..config.bounds import in_python_types
from ..io.checks import shorten


def is_whole(value: object) -> bool:
    """Whether a value is a whole number, of Python or NumPy. A bool is not."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is a real number, of Python or NumPy. A bool is not."""
    return isinstance(value, Real) and not isinstance(value, bool)


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
    num_beams: int = 1
    """beams of a beam search (beams.py); 1: none"""
    length_penalty: float = 1.0
    """a beam's score is the sum of its log-probabilities / length**length_penalty: above 0 favors long answers"""

    def __post_init__(self):
        ranges = {"max_new_tokens": (1, 2**31), "top_k": (0, 2**31), "seed": (0, 2**32), "num_beams": (1, 129)}
        for name, (least, end) in ranges.items():
            value = getattr(self, name)
            if not is_whole(value) or not least <= value < end:
                raise ValueError(f"{name} is {shorten(value)}; give a whole number from {least} to {end - 1}")
        if not is_number(self.temperature) or not 0 <= self.temperature < 1e38:  # the limit of float32; not NaN
            raise ValueError(f"temperature is {shorten(self.temperature)}; give a number of at least 0 (0: greedy)")
        if self.temperature < np.finfo(np.float32).tiny:  # zero in float32, or zero to some devices
            object.__setattr__(self, "temperature", 0.0)  # the dataclass is frozen
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {shorten(self.top_p)}; give a probability above 0 and at most 1")
        texts = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(texts, Sequence) or not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f"stop is {shorten(self.stop)}; give texts that are not empty")
        object.__setattr__(self, "stop", tuple(texts))
        if not is_number(self.length_penalty) or not abs(self.length_penalty) <= 10:
            raise ValueError(f"length_penalty is {shorten(self.length_penalty)}; give a number from -10 to 10")
        if self.num_beams > 1 and (self.temperature > 0 or self.stop):
            name = "stop" if self.stop else "temperature"
            raise ValueError(f"num_beams is {self.num_beams}, and beam search takes no {name}; leave it out")
        for name in (*ranges, "temperature", "top_p", "length_penalty"):  # NumPy's small integers overflow
            object.__setattr__(self, name, in_python_types(getattr(self, name)))

    def for_index(self, index: int) -> Sampling:
        """The settings of prompt or sample `index` of several: each has its own seed."""
        return replace(self, seed=(self.seed + index) % 2**32)


GREEDY = Sampling()


def derived_seed(seed: int, *path: int | str) -> int:
    """A seed in [0, 2**32) for one of many draws under a common seed: equal for the same path, unrelated otherwise."""
    return int.from_bytes(hashlib.sha256(repr((seed, *path)).encode()).digest()[:4], "big")
