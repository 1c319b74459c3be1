"""Records as token ids; those that are too long are cut or skipped."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

from ..config import DataSection
from .encode_batch import encode_examples
from .examples import Example, encode_example
from .records import Record

#: Examples per call of the tokenizer.
ENCODED_AT_ONCE = 1024


class EncodedRecords(NamedTuple):
    """Examples, the record of each, and how many were longer than `max_seq_length` and so cut or skipped."""

    examples: list[Example]
    records: list[Record]
    cut: int = 0
    skipped: int = 0


def report(count: int, cut: int, skipped: int) -> str:
    """One line for the user: the number of examples, and how many were cut or skipped."""
    also_cut = f", {cut} of them too long and cut from the left" if cut else ""
    also_skipped = f", {skipped} too long and skipped" if skipped else ""
    return f"{count} examples{also_cut}{also_skipped}"


def encode_records(
    records: list[Record], tokenizer, section: DataSection, *, answer: int = 0, positions: int = sys.maxsize
) -> EncodedRecords:
    """The records as token ids. data.truncate says whether those longer than `max_seq_length` raise, are skipped or are
    cut.

    A cut removes the prompt's first tokens after BOS. The prompt's last token and the completion always stay.

    Args:
        answer: the most tokens of another answer to each prompt.
        positions: of the model. A cut leaves room for the longer of completion and answer.
    """
    examples = encode_all(tokenizer, records)
    lengths = [len(prompt) + len(completion) for prompt, completion in examples]
    most = [
        min(section.max_seq_length or sys.maxsize, positions - max(0, answer - len(completion)))
        for _, completion in examples
    ]
    long = [i for i, length in enumerate(lengths) if length > most[i]]
    if not long:
        return EncodedRecords(examples, list(records))
    if section.truncate == "error":
        raise too_long(examples[long[0]], records[long[0]].place, len(long), len(examples), section)
    if section.truncate == "left":
        for i in long:
            longest = max(answer, len(examples[i].completion_ids))
            if longest >= positions:
                raise ValueError(
                    f"{records[i].place}: an answer of {longest} tokens leaves no room for a prompt in the model's "
                    f"{positions} positions; shorten the answers (eval.max_new_tokens), or leave the row out"
                )
            examples[i] = cut_left(examples[i], most[i], tokenizer.bos_token_id, records[i].place)
        return EncodedRecords(examples, list(records), cut=len(long))
    dropped = set(long)
    kept = [i for i in range(len(examples)) if i not in dropped]
    if not kept:
        raise all_too_long(records[0].place, section)
    return EncodedRecords([examples[i] for i in kept], [records[i] for i in kept], skipped=len(long))


def encode_all(tokenizer, records: Sequence[Record]) -> list[Example]:
    """The records' examples. ValueError names the place of the first that cannot be encoded."""
    examples: list[Example] = []
    for start in range(0, len(records), ENCODED_AT_ONCE):
        part = records[start : start + ENCODED_AT_ONCE]
        try:
            examples += encode_examples(tokenizer, [(record.prompt, record.completion) for record in part])
        except ValueError:  # one by one, to name the record
            examples += [encode_at_place(tokenizer, record) for record in part]
    return examples


def encode_at_place(tokenizer, record: Record) -> Example:
    try:
        return encode_example(tokenizer, record.prompt, record.completion)
    except ValueError as error:
        raise ValueError(f"{record.place}: {error}") from None


class TooLong(ValueError):
    """Examples have more than data.max_seq_length tokens."""

    advice = "raise data.max_seq_length, or set data.truncate to skip (drop them) or left (cut the start of the prompt)"

    def __init__(self, said: str, long: int, count: int, limit: int | None):
        super().__init__(f"{said}\n{self.advice}")
        self.long, self.count, self.limit = long, count, limit


def too_long(first: Example, place: str, long: int, count: int, section: DataSection) -> TooLong:
    limit, tokens = section.max_seq_length, len(first.prompt_ids) + len(first.completion_ids)
    said = f"{place}: {tokens} tokens exceed data.max_seq_length {limit} ({long} of {count} examples are too long)"
    return TooLong(said, long, count, limit)


def all_too_long(place: str, section: DataSection) -> ValueError:
    """The error where no example is left."""
    return ValueError(f"{place}: every example is longer than data.max_seq_length {section.max_seq_length}; raise it")


def cut_left(example: Example, length: int, bos: int | None, place: str) -> Example:
    prompt, room = example.prompt_ids, length - len(example.completion_ids)
    start = 1 if room > 1 and prompt[0] == bos else 0  # some models fail without BOS
    if room < 1:
        raise ValueError(
            f"{place}: the completion has {len(example.completion_ids)} tokens, which leaves no room for a prompt in "
            f"data.max_seq_length {length}; raise it, or set data.truncate to skip"
        )
    return Example(prompt[:start] + prompt[len(prompt) - room + start :], example.completion_ids)
