"""Public tasks: how a row of a published data set becomes a prompt, a completion and the accepted answers.

Rows have the data set's published field names. BoolQ, COPA, SQuAD and SST-2 use the templates of ALoRA, a paper by the
same group; the other templates are ours, since PARA's own are not published. Rows with `prompt` and `completion` are
used unchanged (records.py), and the task only decides how answers are scored.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from ..io.checks import printable, shorten

Fields = tuple[str, str, tuple[str, ...]]
"""prompt, completion, every accepted answer"""


class Task(NamedTuple):
    """How a data set's rows become records, and how answers are scored (a metric of evaluation/metrics.py)."""

    name: str
    record: Callable[[dict], Fields]
    metric: str
    choices: tuple[str, ...] = ()
    """the answers that `accuracy` ranks"""
    also: tuple[str, ...] = ()
    """further metrics of the same answers"""
    max_new_tokens: int = 32
    """maximum tokens of a generated answer"""


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


def gsm8k(row: dict) -> Fields:
    """GSM8K (arXiv:2110.14168), fields question and answer: the steps, "#### " and the number. Calculations in <<...>>
    are removed."""
    steps, _, number = text(row, "answer").rpartition("####")
    solution = re.sub(r"<<[^<>]*>>", "", steps).strip()
    prompt = (
        f"Question: {text(row, 'question')}\n"
        "Solve the problem step by step and end with 'The answer is' and a number.\nSolution:"
    )
    answer = f"{solution}\nThe answer is {number.strip()}.".strip()
    return prompt, answer, (answer,)


def wikisql(row: dict) -> Fields:
    """WikiSQL (arXiv:1709.00103), fields question, table (header) and sql (sel, agg, conds). The conditions are triples
    or three lists. Column names become lower case, with _ for spaces."""
    header = ["_".join(name.lower().split()) for name in field(row, "table")["header"]]
    chosen, how, conditions = (field(row, "sql")[name] for name in ("sel", "agg", "conds"))
    if isinstance(conditions, dict):
        names = ("column_index", "operator_index", "condition")
        conditions = zip(*(conditions[name] for name in names), strict=True)
    wanted = f"{WIKISQL_AGGREGATES[how]}({header[chosen]})" if how else header[chosen]
    tests = [f"{header[c]} {WIKISQL_OPERATORS[o]} '{str(value).lower()}'" for c, o, value in conditions]
    query = f"SELECT {wanted} FROM table" + (f" WHERE {' AND '.join(tests)}" if tests else "")
    columns = ", ".join(sorted(header))
    return f"Columns: {columns}\nQuestion: {text(row, 'question')}\nSQL:", query, (query,)


WIKISQL_AGGREGATES = ("", "MAX", "MIN", "COUNT", "SUM", "AVG")
WIKISQL_OPERATORS = ("=", ">", "<")


def banking77(row: dict) -> Fields:
    """BANKING77 (arXiv:2003.04807), fields text and category, such as card_arrival."""
    intent = " ".join(text(row, "category").split("_"))
    return f"Customer: {text(row, 'text')}\nBanking intent:", intent, (intent,)


def sms_spam(row: dict) -> Fields:
    """SMS Spam Collection (Almeida et al. 2011), fields sms and label (0 ham, 1 spam)."""
    spam = choice(row, "label", ("no", "yes"))
    return f"Message: {text(row, 'sms')}\nIs the message spam? Answer yes or no.\nAnswer:", spam, (spam,)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("boolq", boolq, "accuracy", ("yes", "no")),
        Task("copa", copa, "accuracy", ("1", "2")),
        Task("squad", squad, "squad", also=("squad_exact", "f1")),
        Task("sst2", sst2, "accuracy", ("negative", "positive")),
        Task("rte", rte, "accuracy", ("yes", "no")),
        Task("gsm8k", gsm8k, "final_number", max_new_tokens=320),
        Task("wikisql", wikisql, "sql_match", max_new_tokens=96),
        Task("banking77", banking77, "exact_match", also=("macro_f1",)),  # generated, not ranked: there are 77 labels
        Task("sms_spam", sms_spam, "accuracy", ("yes", "no"), also=("macro_f1", "matthews")),
    )
}
#: The task of each known tfds: data set. Others need templates.
TFDS_TASKS = {
    "bool_q": "boolq",
    "super_glue/boolq": "boolq",
    "super_glue/copa": "copa",
    "squad": "squad",
    "squad/v1.1": "squad",
    "glue/sst2": "sst2",
    "glue/rte": "rte",
    "super_glue/rte": "rte",
    "gsm8k": "gsm8k",
}


def field(row: dict, name: str) -> Any:
    """A field of a row. The error for a missing field lists the others."""
    if name not in row:
        raise ValueError(f"no field {shorten(name)}; the row has {names_of(row)}. A null counts as missing")
    if isinstance(row[name], bytes):
        raise ValueError(f"{name} is not UTF-8 text: {shorten(row[name])}")
    return row[name]


def names_of(row: dict) -> str:
    """The names of a row's first twenty fields, for an error."""
    more = f" ... ({len(row)} in all)" if len(row) > 20 else ""
    return ", ".join(printable(str(name), 80) for name in list(row)[:20]) + more or "none"


def text(row: dict, name: str) -> str:
    value = field(row, name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be text, not {shorten(value)}")
    return value.strip()


def choice(row: dict, name: str, names: tuple[str, str]) -> str:
    """The name of a label: 0 or 1, or false or true."""
    value = field(row, name)
    if isinstance(value, str):  # a cell of a CSV file, in which pandas writes True
        value = {"0": 0, "1": 1, "false": 0, "true": 1}.get(value.lower(), value)
    if not isinstance(value, int) or value not in (0, 1):
        raise ValueError(f"{name} must be 0 or 1, or false or true, not {shorten(value)}")
    return names[value]
