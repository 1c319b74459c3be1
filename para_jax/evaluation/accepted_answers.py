"""Accepted answers: the forms in which a model that has learnt a record's completion writes it, or ranks it first."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import lru_cache

from ..data.examples import Example, answer_opening, encode_completion, special_tokens, stop_token_ids
from ..data.records import Record
from ..inference.answer_text import text_of
from ..inference.generate import before_stop
from .metrics import single_spaced


def as_learnt(tokenizer, record: Record, example: Example, opening: str, same: Collection[str]) -> Record:
    """The record, which also accepts its completion as a model that has learnt it writes it. This form comes first,
    because label metrics take the first reference as the label."""
    text = learnt_text(tokenizer, record, example, opening, same)
    return with_reference(record, text) if text and differ(text, record.completion) else record


def learnt_text(tokenizer, record: Record, example: Example, opening: str, same: Collection[str] = ()) -> str:
    """A record's completion as a model that has learnt it writes it: the tokenizer may normalise a text, the chat
    template may leave out a part, no text has special tokens, and an end token ends it. Empty if the tokenizer lacks a
    part of the completion: the rest is another answer.

    Args:
        same: texts that several completions have, as `shown_alike` finds them.
    """
    ends = (*stop_token_ids(tokenizer), example.completion_ids[-1])
    learnt = before_stop(example.completion_ids, ends)
    written = text_of(tokenizer, learnt)
    text = written.strip().removeprefix(opening).lstrip()
    if not text or not differ(text, record.completion):
        return text
    with suppress(ValueError):  # from a template that refuses the text
        for one in (text, written):
            if before_stop(encode_completion(tokenizer, record.prompt, one), ends) == learnt:
                return text
    shown = without_specials(tokenizer, record.completion)
    return text if not differ(text, shown) and single_spaced(shown) not in same else ""


def shown_alike(tokenizer, records: Sequence[Record]) -> list[str]:
    """The texts of completions that differ in nothing but special tokens. Those that end an answer do not count."""
    names, ends = special_names(tokenizer, len(tokenizer)), tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer))
    found: dict[str, set[tuple[str, ...]]] = {}
    for record in records:
        marks = tuple(name for name in names.findall(record.completion) if name not in ends)
        found.setdefault(single_spaced(without_specials(tokenizer, record.completion)), set()).add(marks)
    return [text for text, of in found.items() if len(of) > 1]


def as_ranked(tokenizer, choices: Sequence[str], record: Record, example: Example, ranked: Sequence[Example]) -> Record:
    """The record, which also accepts the first choice that becomes the same tokens as its completion: such choices tie,
    and the first of them is then the answer. An end token or how an accent is written may be all that they differ
    in."""
    same = (c for c, one in zip(choices, ranked, strict=True) if one.completion_ids == example.completion_ids)
    first = next(same, record.completion)
    if differ(first, record.completion):
        opening = answer_opening(tokenizer, record.prompt)
        if learnt_text(tokenizer, record, example, opening):
            return with_reference(record, first)
    return record


def without_specials(tokenizer, text: str) -> str:
    """A completion as text shows it: without the names of special tokens."""
    return special_names(tokenizer, len(tokenizer)).sub("", text)


@lru_cache(8)
def special_names(tokenizer, length: int) -> re.Pattern:
    """Matches the name of a special token. `length` is as in `special_tokens`."""
    names = sorted(special_tokens(tokenizer, length), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or "(?!)")


def differ(text: str, other: str) -> bool:
    return single_spaced(text) != single_spaced(other)


def with_reference(record: Record, text: str) -> Record:
    """The record with this text before its completion among the accepted answers."""
    own = record.completion
    accepted = (both for one in record.references for both in ((text, own) if one == own else (one,)))
    return record._replace(references=tuple(accepted))
