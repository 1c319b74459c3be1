"""Score: what a task's answers are worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..data.examples import Prompt
from .metrics import error_of_mean, measure, measure_rows
from .questions import Answer, Scored, Written
from .tasks import EncodedTask, EvalTask

#: Examples of a task that are kept with their answers, to be shown.
SAMPLES = 5


class Measured(NamedTuple):
    """One metric of a task's answers; the fields are those of Score."""

    metric: str
    score: float
    stderr: float | None

    def __str__(self) -> str:
        return f"{self.metric} {with_error(self.score, self.stderr)}"


class AnsweredExample(NamedTuple):
    """An example with the answer that was given, whole."""

    prompt: str
    """of a chat its messages, each on a line after its role"""
    expected: str
    given: str


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
    samples: tuple[AnsweredExample, ...] = field(default=(), compare=False, repr=False)
    """some examples with the answers, spread over the task; none if there are no answers"""
    rows: tuple[float, ...] = field(default=(), compare=False, repr=False)
    """what each example contributes (metrics.measure_rows); of the metric "loss" to the loss"""

    def values(self) -> dict[str, float]:
        """Every metric and its standard error by name: accuracy, accuracy_stderr. The loss has a standard error only if
        it is the score."""
        own = Measured(self.metric, shown_score(self.metric, self.score), self.stderr)
        found = {"loss": self.loss}
        for metric, value, stderr in [own, *self.also]:
            found |= {metric: value} | ({} if stderr is None else {f"{metric}_stderr": stderr})
        return found

    def record(self) -> dict:
        """The score for a JSON file. `score` is negated for the metric "loss", as in the field; `loss` never is."""
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
        is_loss = self.metric == "loss"
        measured = [*([] if is_loss else [Measured(self.metric, self.score, self.stderr)]), *self.also]
        loss = f"loss {with_error(self.loss, self.stderr if is_loss else None)}"
        return f"{self.name}: {', '.join([*map(str, measured), loss])} on {self.count} examples"


def shown_score(metric: str | None, score: float) -> float:
    """A score as people read it: for the metric "loss" the loss itself. (`Score.score` is negated, so that higher is
    better.)"""
    return 0.0 - score if metric == "loss" else score


def with_error(value: float | None, stderr: float | None = None) -> str:
    """ "0.8833 ± 0.0402"; "-" for None. An error of 0, where all examples score alike, says nothing and is left out."""
    return "-" if value is None else f"{value:.4f}" + (f" ± {stderr:.4f}" if stderr else "")


def describe_best(metric: str | None, score: float | None, step: int) -> str:
    """ "best validation accuracy 0.5833 at step 60"; "no validation data" for None."""
    if score is None:
        return "no validation data"
    return f"best validation {metric or 'score'} {shown_score(metric, score):.4f} at step {step}"


def score_answers(encoded: EncodedTask, answers: Sequence[Answer]) -> Score:
    """A task's score from the answers to its `questions`, in their order."""
    nats, tokens = likelihoods_of(encoded, answers)
    return score_of(encoded.task, nats, tokens, written_texts(encoded, answers))


def written_texts(encoded: EncodedTask, answers: Sequence[Answer]) -> list[str | None]:
    """The texts of the written answers as they are scored, without the white space at their ends, and without what the
    chat template begins every answer with. None where the logits were not finite."""
    pairs = zip((answer for answer in answers if isinstance(answer, Written)), encoded.openings, strict=True)
    return [one.text.strip().removeprefix(start).lstrip() if one.finite else None for one, start in pairs]


def likelihoods_of(encoded: EncodedTask, answers: Sequence[Answer]) -> tuple[np.ndarray, np.ndarray]:
    """The summed negative log-likelihood, in nats, and the tokens of each completion and then of each choice."""
    nats = np.array([-answer.logprob for answer in answers if isinstance(answer, Scored)])
    return nats, np.array([float(len(end)) for _, end in [*encoded.examples, *encoded.ranked]])


def score_of(task: EvalTask, nats: np.ndarray, tokens: np.ndarray, texts: list[str | None]) -> Score:
    """A task's score.

    Args:
        nats, tokens: of each record's own completion; then, if choices are ranked, of each record's choices.
        texts: what was written, if choices are not ranked; None: nothing.
    """
    count = len(task.records)
    nats_of_own, tokens_of_own = nats[:count], tokens[:count]
    loss = float(nats_of_own.sum() / tokens_of_own.sum())
    if task.ranks:
        texts = likeliest(task, nats)
    references = [record.references for record in task.records]
    if task.metric == "loss":
        value, rows = -loss, rows_of_ratio(nats_of_own, tokens_of_own)
    else:
        value, rows = measure_rows(task.metric, texts, references)
    also = tuple(Measured(name, *measure(name, texts, references)) for name in task.also)
    samples, stderr = samples_of(task, texts), error_of_mean(rows)
    return Score(task.name, task.metric, value, loss, count, stderr, also, samples, tuple(rows))


def samples_of(task: EvalTask, texts: Sequence[str | None]) -> tuple[AnsweredExample, ...]:
    """Examples that are spread evenly over the task, because data is often sorted."""
    count = min(SAMPLES, len(texts))
    chosen = [i * len(texts) // count for i in range(count)]
    records = task.records
    return tuple(AnsweredExample(prompt_text(records[i].prompt), records[i].completion, texts[i] or "") for i in chosen)


def prompt_text(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def likeliest(task: EvalTask, nats: np.ndarray) -> list[str | None]:
    """The choice that each record's ranked choices make its answer; `nats` as for `score_of`. None where none of them
    has a likelihood: the first one might be right by chance."""
    choices = np.where(np.isnan(nats), np.inf, nats)[len(task.records) :]  # argmin would take a NaN
    of_record = choices.reshape(len(task.records), -1)
    return [
        task.choices[i] if row[i] < np.inf else None for row, i in zip(of_record, of_record.argmin(axis=1), strict=True)
    ]


def rows_of_ratio(nats: np.ndarray, tokens: np.ndarray) -> list[float]:
    """What each example contributes to sum(nats) / sum(tokens): the ratio, and the example's deviation from it (Cochran
    1977, 6.3). The standard error of their mean is that of the ratio."""
    ratio = nats.sum() / tokens.sum()
    return (ratio + (nats - ratio * tokens) * len(nats) / tokens.sum()).tolist()
