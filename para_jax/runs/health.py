"""Notices a run that goes wrong: a training loss that rises, or a loss on held-out data above the base model's.

A tenant's `Health` gets the values of every step, logged or not. It warns once, as soon as something is wrong.
`warning` says what is wrong at the end; the last lines of the command and tenants.json repeat it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..config import RunConfig
from ..io.messages import warn

#: The number of steps after which a run is first looked at. It is looked at again whenever that number has doubled.
FIRST_LOOK = 10
#: The most steps at each end of a run whose mean losses are compared. In short runs it is a quarter of the steps.
WINDOW = 20
#: A loss has risen by at least this share of what it was, and by this many standard errors.
RISE, ERRORS = 0.05, 3.0
#: The share by which a loss on held-out data is above the base model's before that is said.
ABOVE_BASE = 0.02


@dataclass
class Seen:
    """What is kept of one tenant's values."""

    losses: list[float] = field(default_factory=list)
    """of the first and of the last WINDOW steps"""
    steps: int = 0
    squares: float = 0.0
    """the sum of the squared differences of neighbouring losses"""
    scores: dict[str, float] = field(default_factory=dict)
    """the losses on held-out data that are compared: validation_base, validation (the best one), test_before,
    test_after"""


class Health:
    """What the steps and scores of one tenant say."""

    def __init__(self, name: str, config: RunConfig, held: Mapping[str, Any]):
        """
        Args:
            name: of the tenant; "" in a run of one adapter.
            config: its own.
            held: what `to_json` gave; empty at the start.
        """
        self.name, self.config, self.said = name, config, False
        self.seen = Seen(**held)

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint holds: a log lacks steps (logging.every)."""
        return asdict(self.seen)

    def watch(self, step: int, values: Mapping[str, float]) -> None:
        """Takes values that are logged of the tenant's own step, and says once what is wrong with them."""
        if take(self.seen, step, values) and not self.said and (found := self.warning()):
            self.said = True
            warn(f"{self.name}: {found}" if self.name else found)

    def warning(self) -> str | None:
        """What is wrong with the tenant so far, and what to do about it; None if nothing is."""
        scores = self.seen.scores
        found = (
            risen_loss(self.seen)
            or above_base("validation", scores.get("validation"), scores.get("validation_base"))
            or above_base("test", scores.get("test_after"), scores.get("test_before"))
        )
        return found and f"{found}; lower train.learning_rate ({self.config.train.peak_learning_rate:g})"


def take(seen: Seen, step: int, values: Mapping[str, float]) -> bool:
    """Adds logged values. The result says whether it is time to look at them."""
    looks = False
    if "grad_norm" in values:  # of a training step
        if seen.losses:
            seen.squares += (values["loss"] - seen.losses[-1]) ** 2
        seen.steps += 1
        seen.losses.append(values["loss"])
        del seen.losses[WINDOW:-WINDOW]
        rounds, left = divmod(seen.steps, FIRST_LOOK)
        looks = left == 0 and rounds & (rounds - 1) == 0  # at 10, 20, 40, ... steps
    for split in ("validation", "test_before", "test_after"):
        loss = values.get(f"{split}_loss")
        if loss is None:
            continue
        if split == "validation" and step == 0:
            seen.scores["validation_base"] = loss
        else:
            seen.scores[split] = min(loss, seen.scores.get(split, loss)) if split == "validation" else loss
            looks = looks or (split == "validation" and step >= FIRST_LOOK) or split == "test_after"
    return looks


def risen_loss(seen: Seen) -> str | None:
    """Compares the mean of the last losses with that of the first. The noise of one step is estimated from the
    differences of neighbours, which a trend hardly changes (von Neumann 1941)."""
    if seen.steps < FIRST_LOOK:
        return None
    size = min(WINDOW, max(3, seen.steps // 4))
    first, last = (float(np.mean(part)) for part in (seen.losses[:size], seen.losses[-size:]))
    noise = np.sqrt(seen.squares / (seen.steps - 1) / 2)
    least = max(RISE * abs(first), ERRORS * noise * np.sqrt(2 / size))
    return f"loss rose from {first:.3g} to {last:.3g}" if last - first > least else None


def above_base(split: str, loss: float | None, base: float | None) -> str | None:
    """Compares losses on held-out data, as far as they are known."""
    if loss is None or base is None or loss <= base + ABOVE_BASE * abs(base):
        return None
    return f"{split} loss {loss:.3g} is above the base model's {base:.3g}"
