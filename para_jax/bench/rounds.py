"""Rounds in which the compared sides take turns, and the record and the table of what they measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import numpy as np

from ..config import require


def interleaved(sides: dict[str, Callable[[], float]], rounds: int) -> list[dict[str, float]]:
    """What each side measures, round by round, after one run each that compiles."""
    for measure in sides.values():
        measure()
    return [{name: measure() for name, measure in sides.items()} for _ in range(rounds)]


def summary(unit: str, rounds: list[dict[str, float]]) -> dict:
    return {"unit": unit, "medians": medians(rounds), "rounds": rounds}


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(measured[name] for measured in rounds) for name in rounds[0]}


def paired(rounds: list[dict[str, float]], side: str, base: str) -> float:
    """The median of the rounds' ratios of one side to another: the machine's speed may change between rounds."""
    return statistics.median(measured[side] / measured[base] for measured in rounds)


def single(rows: tuple[int, ...]) -> int:
    """The one number of rows that a benchmark takes. Raises ValueError for a list of them."""
    shown = ",".join(map(str, rows))
    require(len(rows) == 1, "--rows", shown, "one number. Run the benchmark once for each of them")
    return rows[0]


def random_tokens(model, rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, model.config.vocab_size, (rows, length)).astype(np.int32)
