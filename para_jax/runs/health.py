"""Notices a run that goes wrong: a loss that rises, gradient norms that explode, scores worse than the base model's.

A tenant's `Health` gets the values of every step, logged or not. It warns once, as soon as something is wrong.
`warning` says what is wrong at the end; the last lines of the command and tenants.json repeat it.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..config import RunConfig
from ..io.messages import warn

#: The number of steps after which a run is first looked at. It is looked at again whenever that number has doubled.
FIRST_LOOK = 10
#: The most steps at each end of a run whose mean losses are compared. In short runs it is a quarter of the steps.
WINDOW = 20
#: A loss has risen by at least this share of what it was, and by this many standard errors.
RISE, ERRORS = 0.05, 3.0
#: Gradient norms have exploded when they are this many times those at the start, and this many times the limit that
#: they are clipped to, while the loss has not fallen by a tenth.
TIMES_START, TIMES_LIMIT = 30.0, 10.0
#: The share by which a loss on held-out data is above the base model's before that is said.
ABOVE_BASE = 0.02


class LoggedValues(NamedTuple):
    """What is kept of one tenant's values, in the order of its steps."""

    losses: array
    norms: array
    """of the first and of the last WINDOW steps"""
    totals: array
    """the number of steps, and the sum of the squared differences of neighbouring losses"""
    scores: dict[str, float]
    """the losses on held-out data that are compared: validation_base, validation (the best one), test_before,
    test_after"""


class Health:
    """What the steps and scores of one tenant say."""

    def __init__(self, name: str, config: RunConfig, held: Mapping[str, Any] | None = None):
        """
        Args:
            name: of the tenant; "" in a run of one adapter.
            config: its own.
            held: what `to_json` gave.
        """
        self.name, self.config, self.said = name, config, False
        self.seen = LoggedValues(array("d"), array("d"), array("d", [0, 0]), {})
        if held:
            losses, norms, totals = (array("d", held[part]) for part in LoggedValues._fields[:3])
            self.seen = LoggedValues(losses, norms, totals, dict(held["scores"]))

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint holds: a log lacks steps (logging.every)."""
        return {name: list(part) for name, part in zip(LoggedValues._fields[:3], self.seen[:3], strict=True)} | {
            "scores": dict(self.seen.scores)
        }

    def watch(self, step: int, values: Mapping[str, float]) -> None:
        """Takes values that are logged of the tenant's own step, and says once what is wrong with them."""
        if take(self.seen, step, values) and not self.said and (found := self.warning()):
            self.said = True
            warn(f"{self.name}: {found}" if self.name else found)

    def warning(self) -> str | None:
        """What is wrong with the tenant so far, and what to do about it; None if nothing is."""
        found = problem(self.seen, self.config.train.max_grad_norm)
        return found and f"{found}; lower train.learning_rate ({self.config.train.peak_learning_rate:g})"


def take(seen: LoggedValues, step: int, values: Mapping[str, float]) -> bool:
    """Adds logged values. The result says whether it is time to look at them."""
    looks = False
    if "loss" in values and "grad_norm" in values:
        if seen.losses:
            seen.totals[1] += (values["loss"] - seen.losses[-1]) ** 2
        seen.totals[0] += 1
        for part, name in ((seen.losses, "loss"), (seen.norms, "grad_norm")):
            part.append(values[name])
            del part[WINDOW:-WINDOW]
        rounds, left = divmod(int(seen.totals[0]), FIRST_LOOK)
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


def problem(seen: LoggedValues, max_grad_norm: float) -> str | None:
    """What is wrong with a tenant, in words."""
    scores = seen.scores
    return (
        risen_loss(seen)
        or above_base("validation", scores.get("validation"), scores.get("validation_base"))
        or above_base("test", scores.get("test_after"), scores.get("test_before"))
        or exploded_norms(seen, max_grad_norm)
    )


def ends(values: Sequence[float], steps: float) -> tuple[np.ndarray, np.ndarray] | None:
    """The first and the last values, equally many; None if there are too few to compare."""
    if steps < FIRST_LOOK:
        return None
    held, size = np.asarray(values, float), min(WINDOW, max(3, int(steps) // 4))
    return held[:size], held[-size:]


def risen_loss(seen: LoggedValues) -> str | None:
    """Compares the mean of the last losses with that of the first. The noise of one step is estimated from the
    differences of neighbours, which a trend hardly changes (von Neumann 1941)."""
    steps, squares = seen.totals
    if (found := ends(seen.losses, steps)) is None:
        return None
    first, last = (float(one.mean()) for one in found)
    noise = np.sqrt(squares / (steps - 1) / 2)
    least = max(RISE * abs(first), ERRORS * noise * np.sqrt(2 / len(found[0])))
    return f"loss rose from {first:.3g} to {last:.3g}" if last - first > least else None


def exploded_norms(seen: LoggedValues, limit: float) -> str | None:
    """Norms grow in a sound run too, because adapters start at zero. So the loss must not have fallen either."""
    found, of_loss = (ends(part, seen.totals[0]) for part in (seen.norms, seen.losses))
    if found is None or of_loss is None:
        return None
    first, last = (float(np.median(one)) for one in found)
    exploded = last > TIMES_START * first and last > TIMES_LIMIT * limit
    fell = of_loss[1].mean() < 0.9 * of_loss[0].mean()
    return f"gradient norms rose from {first:.3g} to {last:.3g}" if exploded and not fell else None


def above_base(split: str, loss: float | None, base: float | None) -> str | None:
    """Compares losses on held-out data, as far as they are known."""
    if loss is None or base is None or loss <= base + ABOVE_BASE * abs(base):
        return None
    return f"{split} loss {loss:.3g} is above the base model's {base:.3g}"
