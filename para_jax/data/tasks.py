"""Public tasks: a published data row in, the prompt, the completion and the accepted answers out.

The templates of BoolQ, COPA, SQuAD and SST-2 are those of the sibling paper ALoRA (same group as PARA), the others are
ours; PARA's own are not known. Rows have the field names under which the data sets are published. Rows that hold
`prompt` and `completion` are taken as they are (sources.py): a task then only says how they are scored.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from ..config import printable, shorten

Fields = tuple[str, str, tuple[str, ...]]
"""prompt, completion, references (every accepted answer)"""


class Task(NamedTuple):
    """How a data set's rows become records, and how answers are scored (a metric of evaluation/metrics.py)."""

    name: str
    record: Callable[[dict], Fields]
    metric: str
    choices: tuple[str, ...] = ()
    """the answers that `accuracy` ranks"""
    also: tuple[str, ...] = ()
    """more metrics of the same answers"""
    max_new_tokens: int = 32
    """the most tokens of an answer that is written"""


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
        raise ValueError(f'answers: {shorten(answers)} is not possible; expected a list of texts, or {{"text": it}}')
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
    """GSM8K (arXiv:2110.14168), fields question and answer: the steps, with calculations in <<...>> that are left out,
    then "#### " and the number."""
    steps, mark, number = text(row, "answer").rpartition("####")
    if not mark or not number.strip():
        raise ValueError(
            f"answer: {shorten(row['answer'])} is not possible; expected the steps, then #### and the number"
        )
    solution = re.sub(r"<<[^<>]*>>", "", steps).strip()
    prompt = (
        f"Question: {text(row, 'question')}\n"
        "Solve the problem step by step and end with 'The answer is' and a number.\nSolution:"
    )
    answer = f"{solution}\nThe answer is {number.strip()}.".strip()
    return prompt, answer, (answer,)


def wikisql(row: dict) -> Fields:
    """WikiSQL (arXiv:1709.00103), fields question, table (header) and sql (sel, agg, conds), the conditions as triples
    or as three lists; columns are written in lower case, with _ for spaces."""
    header = part(row, "table", "header")
    chosen, how, conditions = (part(row, "sql", name) for name in ("sel", "agg", "conds"))
    try:
        header = ["_".join(name.lower().split()) for name in header]
        if isinstance(conditions, dict):
            names = ("column_index", "operator_index", "condition")
            conditions = list(zip(*(conditions[name] for name in names), strict=True))
        if min([chosen, how, *(index for condition in conditions for index in condition[:2])]) < 0:
            raise IndexError("a negative index would count from the end")
        wanted = f"{WIKISQL_AGGREGATES[how]}({header[chosen]})" if how else header[chosen]
        tests = [f"{header[c]} {WIKISQL_OPERATORS[o]} '{str(value).lower()}'" for c, o, value in conditions]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise ValueError(
            f"sql: {shorten(row['sql'])} is not possible; expected indices into the table's header"
        ) from None
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
        Task("banking77", banking77, "exact_match", also=("macro_f1",)),  # 77 labels: written, not ranked
        Task("sms_spam", sms_spam, "accuracy", ("yes", "no"), also=("macro_f1", "matthews")),
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
    "gsm8k": "gsm8k",
}


def field(row: dict, name: str) -> object:
    """A row's field; the error of a missing one lists those there are."""
    if name not in row:
        raise ValueError(f"no field {shorten(name)}; the fields there are: {names_of(row)}")
    return row[name]


def names_of(row: dict) -> str:
    """A row's fields as an error lists them: the first twenty."""
    more = f" ... ({len(row)} in all)" if len(row) > 20 else ""
    return ", ".join(printable(str(name), 80) for name in list(row)[:20]) + more or "none"


def part(row: dict, name: str, inner: str) -> Any:
    """A field of a row's field."""
    held = field(row, name)
    if not isinstance(held, dict) or inner not in held:
        raise ValueError(f"{name}: {shorten(held)} is not possible; expected an object with {inner}")
    return held[inner]


def text(row: dict, name: str) -> str:
    value = field(row, name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name}: {shorten(value)} is not possible; expected text")
    return value.strip()


def choice(row: dict, name: str, names: tuple[str, str]) -> str:
    """The name of a label 0 or 1, or of false or true."""
    value = field(row, name)
    if not isinstance(value, int) or value not in (0, 1):
        raise ValueError(f"{name}: {shorten(value)} is not possible; expected 0 or 1, or false or true")
    return names[value]
