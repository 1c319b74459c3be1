"""Accepted answers: an answer is also right in the form in which a model that has learnt the completion writes it."""

from __future__ import annotations

from collections.abc import Sequence

from ..data.examples import Example, stop_token_ids
from ..data.records import Record
from ..inference.answer_text import special_ids, text_of
from ..inference.generate import before_stop
from .metrics import single_spaced


def with_learnt_forms(
    tokenizer, records: Sequence[Record], examples: Sequence[Example], openings: Sequence[str]
) -> list[Record]:
    """The records. Each also accepts its completion as it is learnt and written: the tokenizer may normalise a text,
    the chat template may leave out a part, no text has special tokens, and an end token ends it.

    A form does not count where the tokenizer lacks a part of the completion, or where completions with other special
    tokens have the same one: it would be right for another answer too.
    """
    special, forms, marks = special_ids(tokenizer, len(tokenizer)), list[str](), dict[str, set]()
    for (_, completion), opening in zip(examples, openings, strict=True):
        ids = before_stop(completion, (*stop_token_ids(tokenizer), completion[-1]))
        form = text_of(tokenizer, ids).strip().removeprefix(opening).lstrip()
        forms.append("" if tokenizer.unk_token_id in ids else form)
        marks.setdefault(single_spaced(form), set()).add(tuple(i for i in ids if i in special))
    return [
        with_form(record, form) if form and len(marks[single_spaced(form)]) == 1 else record
        for record, form in zip(records, forms, strict=True)
    ]


def with_form(record: Record, form: str) -> Record:
    """The record with this form before its completion: label metrics take the first reference as the label."""
    own = record.completion
    if single_spaced(form) == single_spaced(own):
        return record
    return record._replace(references=tuple(x for one in record.references for x in ((form,) * (one == own) + (one,))))
