"""JSON-lines files and tfds: sources to records, and records to token ids: what is done with long rows."""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..config import DataSection, expanded, printable, shorten
from ..storage.bucket import BucketPath
from .encode_batch import encode_examples
from .examples import (
    Example,
    Prompt,
    checked_messages,
    encode_example,
    prompt_messages,
    require_unicode,
    split_conversation,
)
from .tasks import TASKS, TFDS_TASKS, field, names_of
from .tfds import Prepared, find, find_beside, is_tfds, parse

#: Bytes of a line of JSON.
MAX_LINE = 2**26
#: Examples that are tokenised together.
ENCODED_AT_ONCE = 1024
SPLITS = ("train", "validation", "test")


class Record(NamedTuple):
    """One prompt with the completion to learn, every accepted answer, and the "file:line" (or
    "tfds:NAME:split[index]") that errors name."""

    prompt: Prompt
    completion: str
    references: tuple[str, ...]
    label: str | None
    place: str


class Encoded(NamedTuple):
    """Examples with their records, in step, and how many were too long for `max_seq_length` and cut or skipped."""

    examples: list[Example]
    records: list[Record]
    cut: int = 0
    skipped: int = 0

    def report(self) -> str:
        """One line for the user: the number of examples, and what became of those too long."""
        return report(len(self.examples), self.cut, self.skipped)


def report(count: int, cut: int, skipped: int) -> str:
    also_cut = f", {cut} of them too long and cut from the left" if cut else ""
    also_skipped = f", {skipped} too long and skipped" if skipped else ""
    return f"{count} examples{also_cut}{also_skipped}"


def source_of(section: DataSection, split: str) -> Path | BucketPath | Prepared | None:
    """Where a split's rows lie: the file or prepared data of its own field, else those that belong to data.train (the
    folder's other files, the tfds: source's other splits). None where there are none."""
    own, train = getattr(section, split), section.train
    if is_tfds(own):
        return find(own, split, section.data_dir)
    if own is not None:
        return existing(split, expanded(own))
    if is_tfds(train):
        return find_beside(str(train), split, section.data_dir)
    if train is not None and expanded(train).is_dir():
        file = expanded(train) / f"{split}.jsonl"
        return file if file.is_file() else None
    return None


def task_of(section: DataSection) -> str | None:
    """The public task of the data: data.task, else the one that data.train's tfds: name stands for, unless templates
    read its columns."""
    if section.task is None and is_tfds(section.train) and section.prompt is None and section.completion is None:
        return TFDS_TASKS.get(parse(str(section.train))[0])
    return section.task


def load_records(section: DataSection, split: str) -> list[Record] | None:
    """A split's records; None where the run has no such data. Training data must be there."""
    found = split_records(section, split)
    return None if found is None else list(found)


def split_records(section: DataSection, split: str, seen=None) -> Iterator[Record] | None:
    """As `load_records`, but a record at a time; what is wrong with one is raised when it is reached.

    Args:
        seen: a hash to which a file's bytes are added as they are read.
    """
    source = source_of(section, split)
    if source is None and split == "train":
        raise ValueError("data.train is not set; expected a .jsonl file, a folder with train.jsonl, or tfds:NAME")
    form = dict(prompt=section.prompt, completion=section.completion, task=task_of(section))
    if isinstance(source, Prepared):
        return records_of(source.rows(), f"{source.folder}: split {source.split}", **form)
    return source and records_of(read_rows(source, seen), str(source), **form)


def read_records(
    path: Path | BucketPath | str, *, prompt: str | None = None, completion: str | None = None, task: str | None = None
) -> list[Record]:
    """The records of one JSON-lines file; ValueError names the file and line of the first row that is wrong.

    Args:
        prompt, completion: templates over the columns, such as "{instruction}\\n{input}". Default: the columns `prompt`
            and `completion` (text or messages), or `messages`, each assistant turn of which is one record.
        task: a name from TASKS, whose record function reads the rows, unless a template is given or they hold `prompt`
            and `completion` already.
    """
    form = dict(prompt=prompt, completion=completion, task=task)
    return list(records_of(read_rows(expanded(path)), str(path), **form))


def read_prompts(path: Path | BucketPath | str) -> list[Prompt]:
    """The prompts of a JSON-lines file: its column `prompt`, beside which nothing is needed, or those of `messages`."""
    prompts: list[Prompt] = []
    for place, row in read_rows(expanded(path)):
        try:
            ready = "prompt" in row or "messages" not in row
            prompts += [column(row, "prompt")] if ready else [found[0] for found in row_fields(row, {})]
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: {error}") from None
    if not prompts:
        raise ValueError(f"{path}: the data set is empty")
    return prompts


def encode_records(records: list[Record], tokenizer, section: DataSection) -> Encoded:
    """The records as token ids; those longer than `max_seq_length` raise, are skipped or are cut (data.truncate).

    A cut takes the prompt's leftmost tokens after its BOS, never its last one and never any of the completion.
    """
    made = encode_all(tokenizer, records)
    long = [i for i, (prompt, completion) in enumerate(made) if len(prompt) + len(completion) > section.max_seq_length]
    if not long:
        return Encoded(made, list(records))
    if section.truncate == "error":
        raise too_long(made[long[0]], records[long[0]].place, len(long), len(made), section)
    if section.truncate == "left":
        for i in long:
            made[i] = cut_left(made[i], section.max_seq_length, tokenizer.bos_token_id, records[i].place)
        return Encoded(made, list(records), cut=len(long))
    dropped = set(long)
    kept = [i for i in range(len(made)) if i not in dropped]
    if not kept:
        raise ValueError(f"every example is longer than data.max_seq_length {section.max_seq_length}, so none is left")
    return Encoded([made[i] for i in kept], [records[i] for i in kept], skipped=len(long))


# ---------------------------------------------------------------------------------------------------------------- rows


def records_of(
    rows: Iterator[tuple[str, dict]], source: str, *, prompt: str | None, completion: str | None, task: str | None
) -> Iterator[Record]:
    """The records of rows with their places, by a task's function or by templates, as in `read_records`."""
    if task is not None and task not in TASKS:
        raise ValueError(f"data.task: {shorten(task)} is not possible; expected one of {', '.join(TASKS)}")
    templates = {"prompt": prompt, "completion": completion}
    for name, template in templates.items():
        template_fields(f"data.{name}", template or "")
    empty = True
    for place, row in rows:
        try:
            ready = {"prompt", "completion"} <= row.keys()
            if task is not None and prompt is None and completion is None and not ready:
                found = [(*TASKS[task].record(row), row.get("label"))]
            else:
                found = row_fields(row, templates)
            made = [Record(p, c, refs, None if label is None else str(label), place) for p, c, refs, label in found]
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: {error}") from None
        yield from made
        empty = empty and not made
    if empty:
        raise ValueError(f"{source}: the data set is empty")


def existing(split: str, path: Any) -> Any:
    file = path / f"{split}.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"data.{split}: {file}: no such file; expected a .jsonl file, or a folder with {split}.jsonl")
    return file


def read_rows(path: Any, seen=None) -> Iterator[tuple[str, dict]]:
    """Each line's "file:line" and object; empty lines are passed over.

    Args:
        seen: a hash to which the lines are added as they are read.
    """
    if not path.is_file():
        raise ValueError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}; expected a .jsonl file")
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
            place = f"{path}:{number}"
            if seen is not None:
                seen.update(line)
            if len(line) > MAX_LINE:
                raise ValueError(f"{place}: the line is longer than {MAX_LINE} bytes")
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                require_unicode("a text", row)  # half a surrogate pair is JSON
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{place}: the line is not JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{place}: expected a JSON object, found {type(row).__name__}")
            yield place, row


def row_fields(row: dict, templates: dict[str, str | None]) -> list[tuple[Prompt, str, tuple[str, ...], object]]:
    """A row's (prompt, completion, references, label): one, or as many as its `messages` have assistant turns."""
    if "messages" in row and not any(templates.values()) and "prompt" not in row:
        turns = split_conversation(checked_messages("messages", row["messages"]))
        if not turns:
            raise ValueError("messages: no turn has the role assistant, so there is nothing to learn")
        return [(prompt_messages(before), turn["content"], (turn["content"],), None) for before, turn in turns]
    prompt = fill(templates["prompt"], row) if templates["prompt"] else column(row, "prompt")
    completion = fill(templates["completion"], row) if templates["completion"] else column(row, "completion")
    if isinstance(completion, list):
        if len(completion) != 1 or completion[0]["role"] != "assistant":
            raise ValueError("completion: expected text or a list of one assistant message")
        completion = completion[0]["content"]
    for name, value in (("prompt", prompt), ("completion", completion)):
        if isinstance(value, str) and not value.strip():
            raise ValueError(f"{name} is empty")
    return [(prompt, completion, references(row, completion), row.get("label"))]


def column(row: dict, name: str) -> Prompt:
    """The column `prompt` or `completion`: text, or messages."""
    if name not in row and "messages" not in row:
        raise ValueError(
            f"no field {name!r}; set data.{name} to a template over the fields there are: {names_of(row)}; or, where "
            "no config is given, rename the field"
        )
    value = field(row, name)
    return value if isinstance(value, str) else checked_messages(name, value)


def references(row: dict, completion: str) -> tuple[str, ...]:
    """The column `references`, a list of accepted answers; without one, the completion."""
    given = row.get("references") or [completion]
    if not isinstance(given, list) or not all(isinstance(answer, str) for answer in given):
        raise ValueError(f"references: {shorten(given)} is not possible; expected a list of texts")
    return tuple(given)


# ----------------------------------------------------------------------------------------------------------- templates


def fill(template: str, row: dict) -> str:
    """The template with each {column} replaced by the row's text or number; {{ and }} stand for braces."""
    parts = []
    for literal, name in template_fields("template", template):
        parts.append(literal)
        if name is not None:
            value = field(row, name)
            if not isinstance(value, str | int | float):
                raise ValueError(f"{name}: expected text or a number, found {type(value).__name__}")
            parts.append(str(value))
    return "".join(parts)


def template_fields(where: str, template: str) -> list[tuple[str, str | None]]:
    """A template's pieces: literal text and the column after it. Only plain {column} is allowed."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{where}: {shorten(template)}: {error}; a brace itself is written {{{{ or }}}}") from None
    for _, name, spec, conversion in parsed:
        if name is not None and (not name or spec or conversion or set(name) & set(".[]")):
            wrong = printable(f"{{{name}}}", 80)
            raise ValueError(f"{where}: {shorten(template)}: only plain {{column}} is possible, found {wrong}")
    return [(literal, name) for literal, name, _, _ in parsed]


# -------------------------------------------------------------------------------------------------------------- length


def encode_all(tokenizer, records: Sequence[Record]) -> list[Example]:
    """The records' examples; ValueError names the place of the first that can't be encoded."""
    made: list[Example] = []
    for start in range(0, len(records), ENCODED_AT_ONCE):
        part = records[start : start + ENCODED_AT_ONCE]
        try:
            made += encode_examples(tokenizer, [(record.prompt, record.completion) for record in part])
        except ValueError:  # which of them, and why
            made += [encode_at_place(tokenizer, record) for record in part]
    return made


def encode_at_place(tokenizer, record: Record) -> Example:
    try:
        return encode_example(tokenizer, record.prompt, record.completion)
    except ValueError as error:
        raise ValueError(f"{record.place}: {error}") from None


def too_long(first: Example, place: str, long: int, count: int, section: DataSection) -> ValueError:
    return ValueError(
        f"{place}: {len(first.prompt_ids) + len(first.completion_ids)} tokens are more than "
        f"data.max_seq_length {section.max_seq_length} ({long} of {count} examples are too long)\n"
        "raise data.max_seq_length, or set data.truncate to skip (leave them out) or left (cut the prompt's start)"
    )


def cut_left(example: Example, length: int, bos: int | None, place: str) -> Example:
    prompt, room = example.prompt_ids, length - len(example.completion_ids)
    start = 1 if room > 1 and prompt[0] == bos else 0  # BOS stays: some models fail without it
    if room < 1:
        raise ValueError(
            f"{place}: the completion alone has {len(example.completion_ids)} tokens and leaves no room for a prompt "
            f"in data.max_seq_length {length}; raise it, or set data.truncate to skip"
        )
    return Example(prompt[:start] + prompt[len(prompt) - room + start :], example.completion_ids)
