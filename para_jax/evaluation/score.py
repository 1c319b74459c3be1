"""Score: what a task's answers are worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .metrics import measure
from .questions import Answer, Scored, Written
from .tasks import EncodedTask, EvalTask


class Measured(NamedTuple):
    """One metric of a task's answers; the fields are those of Score."""

    metric: str
    score: float
    stderr: float | None

    def __str__(self) -> str:
        return f"{self.metric} {self.score:.4f}" + ("" if self.stderr is None else f" ± {self.stderr:.4f}")


@dataclass(frozen=True)
class Score:
    """A task's score. Standard errors and further metrics do not count when scores are compared."""

    name: str
    metric: str
    score: float
    """0 to 1 (matthews: -1 to 1), higher is better; for the metric "loss", the negated loss"""
    loss: float
    """nats per completion token, including the end token"""
    count: int
    """examples"""
    stderr: float | None = field(default=None, compare=False)
    """the standard error of `score` over the draw of the examples; None for one example"""
    also: tuple[Measured, ...] = field(default=(), compare=False)

    def values(self) -> dict[str, float]:
        """Every metric and its standard error by name: accuracy, accuracy_stderr. The loss has a standard error only if
        it is the score."""
        if self.metric == "loss" and self.stderr is not None:
            return {"loss": self.loss, "loss_stderr": self.stderr}
        measured = [] if self.metric == "loss" else [Measured(self.metric, self.score, self.stderr)]
        found = {"loss": self.loss}
        for metric, value, stderr in [*measured, *self.also]:
            found |= {metric: value} | ({} if stderr is None else {f"{metric}_stderr": stderr})
        return found

    def record(self) -> dict:
        """The score for a JSON file."""
        return {
            "name": self.name,
            "metric": self.metric,
            "score": self.score,
            "loss": self.loss,
            "count": self.count,
            "stderr": self.stderr,
            "also": {one.metric: {"score": one.score, "stderr": one.stderr} for one in self.also},
        }

    def __str__(self) -> str:
        measured = [Measured(self.metric, self.score, self.stderr), *self.also]
        return f"{self.name}: {', '.join(map(str, measured))}, loss {self.loss:.4f} on {self.count} examples"


def score_answers(encoded: EncodedTask, answers: Sequence[Answer]) -> Score:
    """A task's score from the answers to its `questions`, in their order."""
    nats, tokens = likelihoods_of(encoded, answers)
    texts = [answer.text.strip() for answer in answers if isinstance(answer, Written)]
    return score_of(encoded.task, nats, tokens, texts)


def likelihoods_of(encoded: EncodedTask, answers: Sequence[Answer]) -> tuple[np.ndarray, np.ndarray]:
    """The summed negative log-likelihood, in nats, and the tokens of each completion and then of each choice."""
    nats = np.array([-answer.logprob for answer in answers if isinstance(answer, Scored)])
    return nats, np.array([float(len(end)) for _, end in [*encoded.examples, *encoded.ranked]])


def score_of(task: EvalTask, nats: np.ndarray, tokens: np.ndarray, texts: list[str]) -> Score:
    """A task's score.

    Args:
        nats, tokens: of each record's own completion; then, if choices are ranked, of each record's choices.
        texts: what was written, if choices are not ranked.
    """
    count = len(task.records)
    own = nats[:count], tokens[:count]
    loss = float(own[0].sum() / own[1].sum())
    if task.metric == "loss":
        return Score(task.name, "loss", -loss, loss, count, stderr=error_of_ratio(*own))
    if task.ranks:
        choices = np.where(np.isnan(nats), np.inf, nats)[count:]  # argmin would take a NaN
        texts = [task.choices[i] for i in choices.reshape(count, -1).argmin(axis=1)]
    references = [record.references for record in task.records]
    (value, stderr), *more = [measure(metric, texts, references) for metric in (task.metric, *task.also)]
    also = tuple(Measured(name, *found) for name, found in zip(task.also, more, strict=True))
    return Score(task.name, task.metric, value, loss, count, stderr=stderr, also=also)


def error_of_ratio(nats: np.ndarray, tokens: np.ndarray) -> float | None:
    """The standard error of sum(nats) / sum(tokens) over the draw of the examples: the deviation of what each one adds
    to the ratio (Cochran 1977, 6.3); None for one example."""
    count = len(nats)
    rest = nats - nats.sum() / tokens.sum() * tokens
    return None if count == 1 else float(math.sqrt(count / (count - 1) * (rest**2).sum()) / tokens.sum())
