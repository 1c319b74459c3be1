"""Rows of a file or a data set as records, by templates or a task."""

from __future__ import annotations

import string
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..config import DataSection
from ..io.checks import expanded, shorten
from ..io.storage.bucket import BucketPath
from .chats import CALLS, checked_messages
from .examples import Prompt
from .rows import Split, open_file
from .sources import FORMS, open_split, task_of
from .tasks import TASKS, field, names_of

#: Keys of an answer that chat templates read next to its content. Only the content is learnt and scored.
NOT_LEARNT = (*CALLS, "reasoning_content", "reasoning", "reasoning_details", "thinking")
#: Columns of a row that chat templates could write into the prompt. We don't pass them on.
NOT_PASSED = ("tools", "functions", "chat_template_kwargs")


class Record(NamedTuple):
    """One prompt with the completion to learn."""

    prompt: Prompt
    completion: str
    references: tuple[str, ...]
    """every accepted answer"""
    label: str | None
    place: str
    """where errors say it is: "file:line", "tfds:NAME:SPLIT[index]" and the same for hf:, or 'data["train"] row 7'"""


class Form(NamedTuple):
    """How rows become records: by templates over their columns or by a task, else by `prompt`, `completion` and
    `messages`."""

    prompt: str | None = None
    completion: str | None = None
    task: str | None = None


def load_records(section: DataSection, split: str) -> list[Record] | None:
    """The records of a split. None if the run has no such data, also because there are too few training rows to hold
    any out (data.validation_split); training data is required."""
    records = split_records(section, split)
    return None if records is None else list(records)


def split_records(section: DataSection, split: str) -> Iterator[Record] | None:
    """`load_records`, one record at a time. A wrong row raises its error when the iterator reaches it."""
    found = open_split(section, split)
    if found is None and split == "train":
        raise ValueError(f"data.train is not set; name {FORMS.format(split=split)}")
    return found and records_of(found, Form(section.prompt, section.completion, task_of(section)))


def read_records(
    path: Path | BucketPath | str, *, prompt: str | None = None, completion: str | None = None, task: str | None = None
) -> list[Record]:
    """The records of one data file. ValueError names the file and line of the first wrong row.

    Args:
        prompt, completion: templates over the columns, such as "{instruction}\\n{input}". Default: the columns `prompt`
            and `completion` (text or messages), or, if the row lacks one of them, `messages`, where each assistant turn
            becomes a record, unless it has the weight 0. The row's `references` and `label` are those of the last turn.
        task: a name from TASKS. Its record function reads the rows, unless there is a template, or the rows have
            `prompt` and `completion`.
    """
    return list(records_of(open_file(expanded(path)), Form(prompt, completion, task)))


# ---------------------------------------------------------------------------------------------------------------- rows


def records_of(split: Split, form: Form) -> Iterator[Record]:
    """The records of a split. A conversation has one for each answer."""
    if form.task is not None and form.task not in TASKS:
        raise ValueError(f"data.task {shorten(form.task)} is unknown; choose one of {', '.join(TASKS)}")
    count = 0
    for place, row in split.rows():
        try:
            if not count:
                check_templates(form, row)
            records = record_of(row, form, place)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        yield from records
        count += len(records)
    if not count:
        raise ValueError(f"{split.label} has no rows; add one for each example")


def record_of(row: dict, form: Form, place: str) -> list[Record]:
    """A row's record. A row of `messages` gives one for each assistant turn."""
    # Templates win over a task, and so do rows that are written as prompt and completion already.
    own = form.prompt or form.completion or ("prompt" in row and "completion" in row)
    if form.task is not None and not own:
        prompt, completion, accepted = TASKS[form.task].record(row)
        return [Record(prompt, completion, accepted, label_of(row), place)]
    if "messages" in row and not own:
        return turns_of(row, place)
    prompt = fill(form.prompt, row) if form.prompt else column(row, "prompt")
    completion = fill(form.completion, row) if form.completion else column(row, "completion")
    if isinstance(prompt, list):
        require_plain_chat(row)
    if isinstance(completion, list):
        if isinstance(prompt, str) or list(map(is_learnt, completion)) != [True]:
            raise ValueError(
                "completion must be text, or one assistant message to learn after a prompt of messages; a conversation "
                "with more turns is written as `messages`"
            )
        completion = answer_text(completion[0])
    for name, value in (("prompt", prompt), ("completion", completion)):
        if isinstance(value, str) and not value.strip():
            raise ValueError(f"{name} is empty")
    return [Record(prompt, completion, references(row, completion), label_of(row), place)]


def turns_of(row: dict, place: str) -> list[Record]:
    """A record for each assistant turn of `messages` that is learnt."""
    require_plain_chat(row)
    messages = checked_messages("messages", row["messages"])
    last = max((i for i, turn in enumerate(messages) if turn["role"] == "assistant"), default=0)
    records = []
    for i, turn in enumerate(messages):
        if i and is_learnt(turn):  # an answer to nothing can't be learnt
            answer = answer_text(turn)
            accepted, label = (references(row, answer), label_of(row)) if i == last else ((answer,), None)
            records.append(Record(messages[:i], answer, accepted, label, place))
    if not records:
        raise ValueError("messages has no turn with the role assistant to learn (weight 0 leaves a turn out)")
    return records


def is_learnt(turn: dict) -> bool:
    """Whether this is an assistant turn without `"weight": 0`, OpenAI's mark."""
    return turn["role"] == "assistant" and turn.get("weight") != 0


def require_plain_chat(row: dict) -> None:
    """Raises ValueError for a row with tools or variables of its own. Chat templates can write them into the prompt; we
    don't pass them on."""
    for name in NOT_PASSED:
        if row.get(name) not in (None, "", [], {}, "[]", "{}", "null"):
            raise ValueError(
                f"{name} of a row are not given to the chat template; put tools into the system message, set "
                "data.chat_template_kwargs for all rows, or remove the column"
            )


def answer_text(turn: dict) -> str:
    """What is learnt of an assistant turn: its content."""
    if lost := [name for name in NOT_LEARNT if turn.get(name)]:
        raise ValueError(
            f"an assistant turn has {lost[0]}, and only its content is learnt\nwrite {lost[0]} into the content, as "
            "the model is to answer; or give the turn weight 0, so that it is not learnt"
        )
    return turn["content"]


def label_of(row: dict) -> str | None:
    return str(row["label"]) if "label" in row else None


def column(row: dict, name: str) -> Prompt:
    """The column `prompt` or `completion`: text or messages."""
    if name not in row:
        raise ValueError(
            f"no field {name!r}, or it is null; set data.{name} to a template over the fields {names_of(row)}, or "
            f"rename a field to {name!r}"
        )
    value = field(row, name)
    return value if isinstance(value, str) else checked_messages(name, value)


def references(row: dict, completion: str) -> tuple[str, ...]:
    """The column `references`, a list of accepted answers. Default: the completion."""
    answers = row.get("references") or [completion]
    if not isinstance(answers, list) or not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise ValueError(f"references must be a list of texts that are not empty, not {shorten(answers)}")
    return tuple(answers)


# ----------------------------------------------------------------------------------------------------------- templates


def fill(template: str, row: dict) -> str:
    """The template with each {column} replaced by the row's text, number or date. {{ and }} give braces."""
    text = ""
    for literal, name, spec, _ in string.Formatter().parse(template):
        text += literal + ("" if name is None else format(field(row, name), spec or ""))
    return text


def check_templates(form: Form, row: dict) -> None:
    """Raises ValueError for a template that is a column's name without braces: every row would have this text."""
    for name, template in (("prompt", form.prompt), ("completion", form.completion)):
        if template and template.strip() in row:
            raise ValueError(
                f"data.{name} is {shorten(template)}, which every {name} would be; write {{{template.strip()}}} for "
                "the column of this name"
            )
