"""Samples: what was answered to each example of a task, and how it scored. `evaluate --log-samples` writes them as
JSON lines."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..io import atomic
from ..io.storage.bucket import Place
from .metrics import METRICS, labels, score_one
from .questions import Answer
from .score import likeliest, likelihoods_of, written_texts
from .tasks import EncodedTask


def logged_samples(encoded: EncodedTask, answers: Sequence[Answer]) -> list[dict]:
    """One record per example of a task, in its order: the prompt, the expected answers, the given one, and its scores.

    Args:
        answers: to the task's `questions`, in their order.
    """
    task, count = encoded.task, len(encoded.task.records)
    nats, tokens = likelihoods_of(encoded, answers)
    given = likeliest(task, nats) if task.ranks else written_texts(encoded, answers)
    samples = []
    for i, record in enumerate(task.records):
        sample = {"index": i, "place": record.place, "prompt": record.prompt, "expected": list(record.references)}
        if task.writes or task.ranks:
            sample["given"] = given[i]
            for metric in (task.metric, *task.also):
                sample |= example_score(metric, given[i], record.references) if metric != "loss" else {}
        if task.ranks:
            own = nats[count:].reshape(count, -1)[i]  # after the completions come the choices of each
            sample["choices"] = {choice: finite(-value) for choice, value in zip(task.choices, own, strict=True)}
        samples.append(sample | {"loss": finite(nats[i] / tokens[i]), "tokens": int(tokens[i])})
    return samples


def example_score(metric: str, given: str | None, references: Sequence[str]) -> dict[str, float]:
    """What an answer scores by a metric of METRICS. The metrics over all labels score no single answer: `correct` says
    whether its label is the expected one."""
    if metric in METRICS:
        return {metric: score_one(metric, given, references)}
    predicted, expected = labels(given, references)
    return {"correct": float(predicted == expected)}


def finite(value: float) -> float | None:
    """The number, or None for what JSON cannot write."""
    return float(value) if math.isfinite(value) else None


def write_samples(file: Place, adapter: str, task: str, samples: Iterable[dict]) -> None:
    """Replaces the file with a line for each sample, which also names the adapter and the task."""
    with atomic.replacing(file) as stream:  # pyright: ignore[reportArgumentType]
        stream.writelines(json_line({"adapter": adapter, "task": task} | sample) for sample in samples)


def json_line(value: dict) -> bytes:
    """A line of JSON in UTF-8."""
    return json.dumps(value, ensure_ascii=False, default=plain).encode("utf-8", "backslashreplace") + b"\n"


def plain(value: Any) -> Any:
    """What JSON lacks, as in lm-eval's files: numpy's numbers as numbers, sets as lists, other values as text."""
    if isinstance(value, set | frozenset):
        return list(value)
    return value.item() if isinstance(value, np.generic) else str(value)
