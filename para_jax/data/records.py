"""Rows of a file or a data set as records, by templates or a task."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator
from datetime import date, datetime
from decimal import Decimal
from functools import cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from ..config import DataSection, expanded, printable, shorten
from ..messages import warn
from ..storage.bucket import BucketPath
from .chat_messages import CALLS, checked_messages, prompt_messages, split_conversation
from .examples import Prompt
from .given import is_nan
from .held_out import part_of
from .row_files import read_rows
from .sources import FORMS, DatasetSplit, Source, class_labels_of, is_held_out, own_source, task_of
from .tasks import TASKS, field, names_of

#: Keys of an answer that chat templates read next to its content. Only the content is learnt and scored.
NOT_LEARNT = (*CALLS, "reasoning_content", "reasoning", "reasoning_details", "thinking")
#: What an error adds for rows with `conversations`.
SHAREGPT = (
    ". ShareGPT's conversations: rename them to messages, their from to role, and their value to content. As roles, "
    "human becomes user and gpt becomes assistant"
)
PLAIN_TEXT = ". Text without a prompt can't be learnt: split it into prompt and completion"

#: What an error advises for a row without a prompt or completion, where other rows have one.
REMEDY = "fill it in, or leave the row out"

#: A run reads its data several times.
warn_once = cache(warn)
#: How a chat begins that was written as text, as pandas' to_csv does.
MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"]role['"]\s*:\s*['"](system|developer|user|assistant)['"]""")


class Record(NamedTuple):
    """One prompt with the completion to learn."""

    prompt: Prompt
    completion: str
    references: tuple[str, ...]
    """every accepted answer"""
    label: str | None
    place: str
    """where errors say it is: "file:line", "tfds:NAME:SPLIT[index]" and the same for hf:, or 'data["train"] row 7'"""


class MissingColumn(ValueError):
    """A row lacks the column `prompt` or `completion`, and no template makes it from the others."""

    def __init__(self, said: str, advice: str):
        super().__init__(f"{said}; {advice}")
        self.said, self.advice = said, advice


def load_records(section: DataSection, split: str) -> list[Record] | None:
    """The records of a split. None if the run has no such data, also because there are too few training rows to hold
    any out (data.validation_split); training data is required."""
    found = split_records(section, split)
    return None if found is None else list(found)


def split_records(section: DataSection, split: str, seen=None) -> Iterator[Record] | None:
    """`load_records`, one record at a time. A wrong row raises its error when the iterator reaches it.

    Args:
        seen: a hash that is updated with a file's bytes as they are read.
    """
    held_out = split != "test" and is_held_out(section)
    source = own_source(section, "train" if held_out else split)
    if source is None and split == "train":
        raise ValueError(f"data.train is not set; name {FORMS.format(split=split)}")
    form = dict(prompt=section.prompt, completion=section.completion, task=task_of(section))
    if source is None:
        return None
    warn_of_numbers(source, section)
    if isinstance(source, DatasetSplit):
        rows, name = source.rows(), source.label
    else:
        rows, name = read_rows(source, seen), str(source)
    if held_out and section.validation_split:
        rows = part_of(rows, section.validation_split, held_out=split == "validation")
        if split == "validation":
            first = next(rows, None)
            return None if first is None else records_of(chain([first], rows), name, **form)
    return records_of(rows, name, **form)


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
    form = dict(prompt=prompt, completion=completion, task=task)
    return list(records_of(read_rows(expanded(path)), str(path), **form))


def read_prompts(path: Path | BucketPath | str) -> list[Prompt]:
    """The prompts of a data file: its column `prompt`, or the prompts in its column `messages`."""
    prompts: list[Prompt] = []
    for place, row in read_rows(expanded(path)):
        try:
            ready = "prompt" in row or "messages" not in row
            prompts += [column(row, "prompt")] if ready else [found[0] for found in row_fields(row, {})]
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: {error}") from None
    if not prompts:
        raise ValueError(f"{path} has no rows; add one for each prompt")
    return prompts


# ---------------------------------------------------------------------------------------------------------------- rows


def records_of(
    rows: Iterator[tuple[str, dict]], source: str, *, prompt: str | None, completion: str | None, task: str | None
) -> Iterator[Record]:
    """The records of (place, row) pairs, by a task's function or by templates, as in `read_records`."""
    if task is not None and task not in TASKS:
        raise ValueError(f"data.task {shorten(task)} is unknown; choose one of {', '.join(TASKS)}")
    templates = {"prompt": prompt, "completion": completion}
    for name, template in templates.items():
        template_fields(f"data.{name}", template or "")
    empty, columns = True, set()
    for place, row in rows:
        try:
            ready = has_both(row)
            if task is not None and prompt is None and completion is None and not ready:
                parts = [(*TASKS[task].record(row), row.get("label"))]
            else:
                parts = row_fields(row, templates)
            records = [Record(p, c, refs, label_text(label), place) for p, c, refs, label in parts]
        except MissingColumn as error:
            if row.keys() < columns:  # rows before this one have the column
                raise ValueError(
                    f"{place}: {error.said}, or it is null (the row has {names_of(row)}); {REMEDY}"
                ) from None
            raise MissingColumn(f"{place}: {error.said}", error.advice) from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: {error}") from None
        yield from records
        empty = empty and not records
        columns |= row.keys()
    if empty:
        raise ValueError(f"{source} has no rows; add one for each example")


def has_both(row: dict) -> bool:
    """Whether the row has the columns `prompt` and `completion`. Rows of another kind in the same file may have them
    as nulls."""
    wanted = "prompt", "completion"
    return all(name in row for name in wanted) and any(row[name] is not None for name in wanted)


def row_fields(row: dict, templates: dict[str, str | None]) -> list[tuple[Prompt, str, tuple[str, ...], object]]:
    """A row's (prompt, completion, references, label). A row of `messages` gives one for each assistant turn."""
    if row.get("messages") is not None and not any(templates.values()) and not has_both(row):
        require_plain_chat(row)
        turns = split_conversation(checked_messages("messages", row["messages"]))
        if not turns:
            raise ValueError("messages has no turn with the role assistant; add the answer to learn")
        found: list[tuple[Prompt, str, tuple[str, ...], object]] = []
        for before, turn in turns:
            if is_learnt(turn):
                if not before:
                    raise ValueError(
                        "prompt is empty: messages begins with an assistant turn; give that turn weight 0, or remove it"
                    )
                answer, is_last = answer_text("messages", turn), turn is turns[-1][1]
                accepted, label = (references(row, answer), row.get("label")) if is_last else ((answer,), None)
                found.append((prompt_messages(before), answer, accepted, label))
        if not found:
            raise ValueError("each assistant turn has weight 0; leave the row out, or give one of them weight 1")
        return found
    for name, template in templates.items():
        require_braces(name, template or "", row)
    prompt = fill(templates["prompt"], row) if templates["prompt"] else column(row, "prompt")
    if isinstance(prompt, list):
        require_plain_chat(row)
    completion = fill(templates["completion"], row) if templates["completion"] else column(row, "completion")
    if isinstance(completion, list):
        if len(completion) != 1 or completion[0]["role"] != "assistant":
            raise ValueError(
                "completion must be text, or a list of one assistant message; a conversation with more turns to learn "
                "is written as `messages`, with weight 0 in the assistant turns that are not"
            )
        if isinstance(prompt, str):
            raise ValueError("completion is a message and prompt is text; give both as messages, or both as text")
        if not is_learnt(completion[0]):
            raise ValueError("completion has weight 0; leave the row out, or give it weight 1")
        completion = answer_text("completion", completion[0])
    for name, value in (("prompt", prompt), ("completion", completion)):
        if isinstance(value, str) and not value.strip():
            raise ValueError(f"{name} is empty")
    return [(prompt, completion, references(row, completion), row.get("label"))]


def is_learnt(turn: dict) -> bool:
    """Whether an assistant turn's `weight`, as in OpenAI's format for fine-tuning, is 1 or missing, and not 0."""
    weight = turn.get("weight")
    if weight is None or is_nan(weight):
        return True
    if weight not in (0, 1):
        raise ValueError(f"an assistant turn has weight {shorten(weight)}; give 1, or 0 for a turn that is not learnt")
    return bool(weight)


#: What a column of JSON texts holds in rows without tools.
EMPTY = ("[]", "{}", "null")


def require_plain_chat(row: dict) -> None:
    """Raises ValueError for a row with tools or variables of its own. Chat templates can write them into the prompt; we
    don't pass them on."""
    variables = row.get("chat_template_kwargs")
    if isinstance(variables, dict) and any(value not in (None, "", []) for value in variables.values()):
        raise ValueError(
            "chat_template_kwargs of a row are not given to the template; set data.chat_template_kwargs for all rows, "
            "and remove the column"
        )
    for name in ("tools", "functions"):
        if row.get(name) and str(row[name]).strip() not in EMPTY:
            raise ValueError(
                f"{name} are not written into the prompt; put them into the system message, or remove them"
            )


def answer_text(name: str, turn: dict) -> str:
    """What is learnt of an assistant turn: its content."""
    if lost := [name for name in NOT_LEARNT if turn.get(name)]:
        raise ValueError(
            f"an assistant turn has {lost[0]}, and only its content is learnt\nwrite {lost[0]} into the content, as "
            "the model is to answer; or give the turn weight 0, so that it is not learnt"
        )
    if not turn["content"].strip():
        raise ValueError(f"{name} has an empty assistant message")  # nothing to learn
    return turn["content"]


def label_text(label: object) -> str | None:
    return None if label is None or is_nan(label) else str(label)


def column(row: dict, name: str) -> Prompt:
    """The column `prompt` or `completion`: text or messages."""
    if name not in row and row.get("messages") is None:
        raise MissingColumn(
            f"no field {name!r}",
            f"set data.{name} to a template over the fields {names_of(row)}, or rename a field to {name!r}"
            + SHAREGPT * ("conversations" in row)
            + PLAIN_TEXT * (row.keys() == {"text"}),
        )
    value = field(row, name)
    if value is None:
        raise ValueError(f"{name} must be text or messages, not NoneType; {REMEDY}")
    if isinstance(value, int | float) and not is_nan(value):
        kind = type(value).__name__
        raise ValueError(f"{name} must be text or messages, not {kind}; 'data.{name}={{{name}}}' writes it as text")
    if isinstance(value, str) and MESSAGES.match(value):
        raise ValueError(
            f"{name} holds messages as a text: {shorten(value)}\nwrite them as lists into a .jsonl file; "
            f"'data.{name}={{{name}}}' takes the text as it is"
        )
    return value if isinstance(value, str) else checked_messages(name, value)


def references(row: dict, completion: str) -> tuple[str, ...]:
    """The column `references`, a list of accepted answers. Default: the completion."""
    given = row.get("references") or [completion]
    if not isinstance(given, list) or not all(isinstance(answer, str) for answer in given):
        raise ValueError(f"references must be a list of texts, not {shorten(given)}")
    if not all(answer.strip() for answer in given):
        raise ValueError(f"references has an empty text: {shorten(given)}; remove it")
    return tuple(given)


# ----------------------------------------------------------------------------------------------------------- templates


#: What the columns of a template may hold.
TEMPLATE_VALUES = "text, numbers and dates without a time of day; make other columns text"


def fill(template: str, row: dict) -> str:
    """The template with each {column} replaced by the row's text, number or date. {{ and }} give braces."""
    parts = []
    for literal, name in template_fields("template", template):
        parts.append(literal)
        if name is not None:
            if name in row and row[name] is None:
                raise ValueError(f"{name} is null; write an empty text (in pandas: frame.fillna(''))")
            value = field(row, name)
            if isinstance(value, Decimal | date) and not isinstance(value, datetime):
                value = str(value)  # a date as in 2026-07-25
            if not isinstance(value, str | int | float):
                raise ValueError(f"{name} is a {type(value).__name__}; a template takes {TEMPLATE_VALUES}")
            if is_nan(value):
                raise ValueError(f"{name} is NaN, a missing value; a template takes {TEMPLATE_VALUES}")
            parts.append(str(value))
    return "".join(parts)


def warn_of_numbers(source: Source, section: DataSection) -> None:
    """Warns of templates over ClassLabel columns: their rows hold numbers, not the names of the classes."""
    templates = {f"data.{name}": getattr(section, name) for name in ("prompt", "completion") if getattr(section, name)}
    labels = class_labels_of(source) if templates else {}
    for field_name, template in templates.items():
        for _, name in template_fields(field_name, template):
            if name in labels:
                names = ", ".join(map(str, labels[name][:5])) + ", ..." * (len(labels[name]) > 5)
                warn_once(printable(f"{name} is a ClassLabel ({names}): {{{name}}} writes its number", 300))


def require_braces(name: str, template: str, row: dict) -> None:
    """Raises ValueError for a template without columns that was to have one: a column's name without braces or, as in
    other libraries, with two pairs of them; and null. Every row would have this text."""
    parts = template_fields(f"data.{name}", template)
    if "\\n" in template:
        warn_once(
            f"data.{name} is {shorten(template)}: it has a backslash and an n where you may mean a new line; in YAML, "
            "write the template in double quotes"
        )
    text = "".join(literal for literal, _ in parts).strip()
    if not text or any(column is not None for _, column in parts):
        return
    close = text.replace("{ ", "{").replace(" }", "}")
    if text == "null" or text in row or any(f"{{{column}}}" in close for column in row):
        raise ValueError(
            f"data.{name} is {shorten(template)}, so every {name} would be {shorten(text)}\nput the name of a column "
            f"into one pair of braces, as {{column}}, or write 'data.{name}=' for the column {name}"
        )


def template_fields(where: str, template: str) -> list[tuple[str, str | None]]:
    """A template's parts: literal text, and the name of the column that follows it."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{where}: {shorten(template)}: {error}; write {{{{ or }}}} for a brace") from None
    for _, name, spec, conversion in parsed:
        if name is not None and (not name or spec or conversion or set(name) & set(".[]")):
            wrong = printable(f"{{{name}}}", 80)
            raise ValueError(
                f"{where}: {shorten(template)}: {wrong} is not a plain {{column}}; write {{{{ and }}}} for braces"
            )
    return [(literal, name) for literal, name, _, _ in parsed]
