"""Public tasks: a published data row in, the prompt, the completion and the accepted answers out.

The templates are those of the sibling paper ALoRA (same group as PARA), but for RTE's, which is ours; PARA's own are
not known. Rows have the field names under which the data sets are published.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

Fields = tuple[str, str, tuple[str, ...]]
"""prompt, completion, references (every accepted answer)"""


class Task(NamedTuple):
    """How a data set's rows become records, and how answers are scored (a metric of evaluation/metrics.py)."""

    name: str
    record: Callable[[dict], Fields]
    metric: str
    choices: tuple[str, ...] = ()
    """the answers that `accuracy` ranks"""


def boolq(row: dict) -> Fields:
    """BoolQ (arXiv:1905.10044), fields passage, question and `answer` (true, false) or `label` (1, 0)."""
    yes = choice(row, "answer" if "answer" in row else "label", ("no", "yes"))
    prompt = f"Reference document:\n{text(row, 'passage')}\nQuestion:\n{text(row, 'question')}"
    return prompt, yes, (yes,)


def copa(row: dict) -> Fields:
    """COPA (Roemmele et al. 2011), fields premise, choice1, choice2, question (cause or effect), label (0 or 1)."""
    better = choice(row, "label", ("1", "2"))
    prompt = (
        f"Premise:\n{text(row, 'premise')}\nChoice 1: {text(row, 'choice1')}\nChoice 2: {text(row, 'choice2')}\n"
        f"Question:\n{text(row, 'question')}"
    )
    return prompt, better, (better,)


def squad(row: dict) -> Fields:
    """SQuAD (arXiv:1606.05250), fields context, question and answers: {"text": [...]} or a list of texts."""
    answers = field(row, "answers")
    answers = field(answers, "text") if isinstance(answers, dict) else answers
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise ValueError(f'answers: {answers!r} is not possible; expected a list of texts, or {{"text": it}}')
    return f"Context:\n{text(row, 'context')}\nQuestion:\n{text(row, 'question')}", answers[0], tuple(answers)


def sst2(row: dict) -> Fields:
    """SST-2 (Socher et al. 2013, as in GLUE), fields sentence, label (0 negative, 1 positive)."""
    sentiment = choice(row, "label", ("negative", "positive"))
    return f"{text(row, 'sentence')}\nThe sentiment of the given sentence is:", sentiment, (sentiment,)


def rte(row: dict) -> Fields:
    """RTE as in GLUE (sentence1, sentence2) and SuperGLUE (premise, hypothesis), label 0 entailment, 1 not."""
    premise, hypothesis = ("sentence1", "sentence2") if "sentence1" in row else ("premise", "hypothesis")
    entailed = choice(row, "label", ("yes", "no"))
    prompt = (
        f"Premise: {text(row, premise)}\nHypothesis: {text(row, hypothesis)}\n"
        "Does the premise entail the hypothesis? Answer yes or no.\nAnswer:"
    )
    return prompt, entailed, (entailed,)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("boolq", boolq, "accuracy", ("yes", "no")),
        Task("copa", copa, "accuracy", ("1", "2")),
        Task("squad", squad, "squad"),
        Task("sst2", sst2, "accuracy", ("negative", "positive")),
        Task("rte", rte, "accuracy", ("yes", "no")),
    )
}
#: The tasks of tensorflow_datasets' names; other names are read by templates.
TFDS_TASKS = {
    "bool_q": "boolq",
    "super_glue/boolq": "boolq",
    "super_glue/copa": "copa",
    "squad": "squad",
    "squad/v1.1": "squad",
    "glue/sst2": "sst2",
    "glue/rte": "rte",
    "super_glue/rte": "rte",
}


def field(row: dict, name: str) -> object:
    """A row's field; the error of a missing one lists those there are."""
    if name not in row:
        raise ValueError(f"no field {name!r}; the fields there are: {', '.join(map(str, row)) or 'none'}")
    return row[name]


def text(row: dict, name: str) -> str:
    value = field(row, name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name}: {value!r} is not possible; expected text")
    return value.strip()


def choice(row: dict, name: str, names: tuple[str, str]) -> str:
    """The name of a label 0 or 1, or of false or true."""
    value = field(row, name)
    if not isinstance(value, int) or value not in (0, 1):
        raise ValueError(f"{name}: {value!r} is not possible; expected 0 or 1, or false or true")
    return names[value]
