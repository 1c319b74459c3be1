"""Scores of answers given as text: 0 to 1 for one prediction against its accepted answers, and their mean."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the prediction is one of the references but for the amount of white space; case and marks count."""
    return float(any(prediction.split() == reference.split() for reference in references))


def f1(prediction: str, references: Sequence[str]) -> float:
    """SQuAD's F1 (arXiv:1606.05250): overlap of normalised words, the best over the references."""
    return max(word_f1(squad_words(prediction), squad_words(reference)) for reference in references)


def squad(prediction: str, references: Sequence[str]) -> float:
    """The mean of exact match and F1, both after SQuAD's normalisation: how the PARA papers score SQuAD."""
    exact = any(squad_words(prediction) == squad_words(reference) for reference in references)
    return (float(exact) + f1(prediction, references)) / 2


#: Metrics over texts. `accuracy` gets the choice that the model ranks first as its prediction.
METRICS = {"exact_match": exact_match, "accuracy": exact_match, "f1": f1, "squad": squad}


def score(metric: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The metric's mean over the predictions, 0 to 1; `references` holds each one's accepted answers."""
    if metric not in METRICS:
        raise ValueError(f"metric: {metric!r} is not possible; expected one of {', '.join(METRICS)}")
    if not predictions:
        raise ValueError(f"{metric}: there are no predictions to score")
    return sum(METRICS[metric](p, r) for p, r in zip(predictions, references, strict=True)) / len(predictions)


def squad_words(text: str) -> list[str]:
    """The words after the normalisation of SQuAD's official evaluation: lower case, no punctuation, no articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def word_f1(predicted: list[str], reference: list[str]) -> float:
    if not predicted or not reference:  # SQuAD 2.0's rule: two answers without words agree
        return float(predicted == reference)
    same = (Counter(predicted) & Counter(reference)).total()
    return 2 * same / (len(predicted) + len(reference))
