"""Rounds in which the compared sides take turns, and the record of what they measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def milliseconds(call: Callable[[], Any]) -> Callable[[], float]:
    """A side that measures one call, up to the end of its work on the device."""

    def measure() -> float:
        begun = time.perf_counter()
        jax.block_until_ready(call())
        return (time.perf_counter() - begun) * 1e3

    return measure


def interleaved(sides: dict[str, Callable[[], float]], rounds: int) -> list[dict[str, float]]:
    """What each side measures, round by round. First each side runs once to compile."""
    in_turns(sides, 1)
    return in_turns(sides, rounds)


def in_turns(sides: dict[str, Callable[[], float]], rounds: int) -> list[dict[str, float]]:
    """What each side measures, round by round."""
    return [{name: measure() for name, measure in sides.items()} for _ in range(rounds)]


def measurement(unit: str, rounds: list[dict[str, float]]) -> dict:
    return {"unit": unit, "medians": medians(rounds), "rounds": rounds}


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(measured[name] for measured in rounds) for name in rounds[0]}


def paired(rounds: list[dict[str, float]], side: str, base: str) -> float:
    """The median over the rounds of the ratio of two sides; the machine's speed may change between rounds."""
    return statistics.median(measured[side] / measured[base] for measured in rounds)


def single(rows: tuple[int, ...]) -> int:
    """The number of rows, for a benchmark that takes one. Raises ValueError for a list of numbers."""
    if len(rows) != 1:
        raise ValueError(f"--rows is {','.join(map(str, rows))}; give one number, and run the benchmark once for each")
    return rows[0]


def random_tokens(model, rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, model.config.vocab_size, (rows, length)).astype(np.int32)
