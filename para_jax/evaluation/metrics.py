"""Scores of answers given as text, each with its standard error.

Some metrics score one answer against its accepted ones and are averaged. Others score all answers at once, from the
predicted and the expected labels. Nothing is random: the standard errors are in closed form or jackknifed.
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal

# ------------------------------------------------------------------------------------------------------ of one answer


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the prediction is one of the references, up to the amount of white space; case and punctuation count."""
    return float(single_spaced(prediction) in map(single_spaced, references))


def squad_exact(prediction: str, references: Sequence[str]) -> float:
    """SQuAD's exact match (arXiv:1606.05250): one of the references after SQuAD's normalisation."""
    return float(any(squad_words(prediction) == squad_words(reference) for reference in references))


def f1(prediction: str, references: Sequence[str]) -> float:
    """SQuAD's F1 (arXiv:1606.05250): overlap of normalised words, the best over the references."""
    return max(word_f1(squad_words(prediction), squad_words(reference)) for reference in references)


def squad(prediction: str, references: Sequence[str]) -> float:
    """The mean of exact match and F1, both after SQuAD's normalisation: how the PARA papers score SQuAD."""
    return (squad_exact(prediction, references) + f1(prediction, references)) / 2


def final_number(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the answer's last number is that of a reference, as GSM8K is scored (arXiv:2110.14168). Text before the
    last "####" does not count. A reference without a number is compared as a text."""
    found = last_number(prediction)
    expected = [(last_number(reference), reference) for reference in references]
    return float(any(exact_match(prediction, [text]) if n is None else found == n for n, text in expected))


def sql_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 if a reference is the same query, as WikiSQL's logical form is compared (arXiv:1709.00103): ignoring case,
    the amount of white space and the order of the conditions, if their values are in quotes."""
    return float(any(sql_parts(prediction) == sql_parts(reference) for reference in references))


# -------------------------------------------------------------------------------------------------- of all the answers


def macro_f1(predicted: Sequence[str | None], expected: Sequence[str]) -> float:
    """The mean of 2 hits / (times predicted + times expected) over the labels that are expected somewhere. Any other
    prediction is a miss, and not a label of its own."""
    hits = Counter(p for p, e in zip(predicted, expected, strict=True) if p == e)
    times_predicted, times_expected = Counter(predicted), Counter(expected)
    return sum(2 * hits[e] / (times_predicted[e] + n) for e, n in times_expected.items()) / len(times_expected)


def matthews(predicted: Sequence[str | None], expected: Sequence[str]) -> float:
    """Matthews' correlation, -1 to 1, for any number of labels (Gorodkin 2004, R_K); 0 if one side never varies."""
    n = len(expected)
    hits = sum(p == e for p, e in zip(predicted, expected, strict=True))
    times_predicted, times_expected = Counter(predicted), Counter(expected)
    by_chance = sum(times_predicted[e] * times for e, times in times_expected.items())
    varies = [n * n - sum(times * times for times in side.values()) for side in (times_predicted, times_expected)]
    return (hits * n - by_chance) / math.sqrt(varies[0] * varies[1]) if all(varies) else 0.0


#: Metrics over texts. `accuracy` gets the choice that the model ranks first as its prediction.
METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match,
    "accuracy": exact_match,
    "squad_exact": squad_exact,
    "f1": f1,
    "squad": squad,
    "final_number": final_number,
    "sql_match": sql_match,
}
#: Metrics over the labels of all answers, predicted and expected.
LABEL_METRICS: dict[str, Callable[[Sequence[str | None], Sequence[str]], float]] = {
    "macro_f1": macro_f1,
    "matthews": matthews,
}


def measure(
    metric: str, predictions: Sequence[str | None], references: Sequence[Sequence[str]]
) -> tuple[float, float | None]:
    """The metric over the predictions, `references` holding each one's accepted answers: of METRICS the mean, 0 to 1,
    of LABEL_METRICS what they say. Also its standard error over the draw of the examples; None for one example. A
    prediction that is None, because the model gave no answer, is wrong."""
    value, rows = measure_rows(metric, predictions, references)
    return value, error_of_mean(rows)


def measure_rows(
    metric: str, predictions: Sequence[str | None], references: Sequence[Sequence[str]]
) -> tuple[float, list[float]]:
    """The metric as in `measure`, and what each example contributes: of METRICS its own value, of LABEL_METRICS its
    pseudo-value of the jackknife. The standard error of their mean is that of the metric."""
    if metric in METRICS:
        values = [score_one(metric, p, r) for p, r in zip(predictions, references, strict=True)]
        return sum(values) / len(values), values
    pairs = [labels(p, r) for p, r in zip(predictions, references, strict=True)]
    return LABEL_METRICS[metric](*zip(*pairs, strict=True)), jackknife(LABEL_METRICS[metric], pairs)


def score_one(metric: str, prediction: str | None, references: Sequence[str]) -> float:
    """One answer's score by a metric of METRICS."""
    return 0.0 if prediction is None else METRICS[metric](prediction, references)


# ------------------------------------------------------------------------------------------------------ standard errors


def error_of_mean(values: Sequence[float]) -> float | None:
    """s / sqrt(n), with the sample's deviation s; None for one value."""
    n, mean = len(values), sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n) if n > 1 else None


def jackknife(metric: Callable, pairs: Sequence[tuple[str | None, str]]) -> list[float]:
    """The pseudo-value of each example: n times the score less n - 1 times the score without the example (Tukey 1958).
    One example has the score itself.

    Examples with the same pair of labels share their score. Of predictions that no example expects, such as free texts,
    the metrics know only how often each one comes, so those share it too.
    """
    n, score = len(pairs), metric(*zip(*pairs, strict=True))
    if n == 1:
        return [score]
    expected, often = {e for _, e in pairs}, Counter(p for p, _ in pairs)
    kinds = [(p if p in expected else often[p], e) for p, e in pairs]
    without = {}
    for kind, pair in dict(zip(kinds, pairs, strict=True)).items():
        left = list(pairs)
        left.remove(pair)
        without[kind] = metric(*zip(*left, strict=True))
    return [n * score - (n - 1) * without[kind] for kind in kinds]


# ---------------------------------------------------------------------------------------------------------- parts of it


def single_spaced(text: str) -> str:
    """The text with one space for each run of white space, none at its ends, and accents in one form (NFC, which some
    tokenizers write). Answers that differ in nothing else are the same answer."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def squad_words(text: str) -> list[str]:
    """The words after the normalisation of SQuAD's official evaluation: lower case, no punctuation, no articles. Before
    that, accents get one form, as in `single_spaced`."""
    text = "".join(c for c in unicodedata.normalize("NFC", text).lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def word_f1(predicted: list[str], reference: list[str]) -> float:
    if not predicted or not reference:  # SQuAD 2.0's rule: two answers without words agree
        return float(predicted == reference)
    same = (Counter(predicted) & Counter(reference)).total()
    return 2 * same / (len(predicted) + len(reference))


def last_number(text: str) -> Decimal | None:
    """The last number after the last "####" (of the whole text if there is none), ignoring commas and dollar signs. A
    minus between two operands does not count."""
    answer = text.rpartition("####")[2].replace("$", "").replace(",", "").replace("\N{MINUS SIGN}", "-")
    found = re.findall(r"(?:(?<![\w)])-)?(?:\d+(?:\.\d+)?|\.\d+)", answer, re.ASCII)
    return Decimal(found[-1]) if found else None


def sql_parts(query: str) -> tuple[str, list[str]]:
    """The text before WHERE, and the sorted conditions; each ends with its quoted value, as WikiSQL's do."""
    head, _, conditions = " ".join(query.lower().split()).partition(" where ")
    return head, sorted(re.split(r"(?<=') and ", conditions))


def labels(prediction: str | None, references: Sequence[str]) -> tuple[str | None, str]:
    """The predicted and the expected label: the reference that equals the prediction, else the first one."""
    predicted = None if prediction is None else single_spaced(prediction)
    accepted = [single_spaced(reference) for reference in references]
    return predicted, predicted if predicted in accepted else accepted[0]
