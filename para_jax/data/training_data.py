"""Records as token ids; those that are too long are cut or skipped. Training data is read and tokenised a part at a
time, so that only ids stay in memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from ..config import ASSUMED_LENGTH, DataSection
from ..io.progress import Progress
from .batches import rounded_up
from .example_arrays import ExampleArrays, arrays_of
from .examples import Example, encode_example, encode_examples
from .records import Record, split_records

#: Examples per call of the tokenizer.
ENCODED_AT_ONCE = 1024


class EncodedRecords(NamedTuple):
    """Examples, the record of each, and how many were longer than `max_seq_length` and so cut or skipped."""

    examples: list[Example]
    records: list[Record]
    cut: int = 0
    skipped: int = 0


class TrainingData(NamedTuple):
    """Examples, the place of each, and how many were longer than `max_seq_length` and so cut or skipped."""

    examples: ExampleArrays
    places: list[str]
    cut: int = 0
    skipped: int = 0

    def report(self) -> str:
        """One line for the user: the number of examples, and how many were cut or skipped."""
        return report(len(self.examples), self.cut, self.skipped)


def report(count: int, cut: int, skipped: int) -> str:
    """One line for the user: the number of examples, and how many were cut or skipped."""
    also_cut = f", {cut} of them too long and cut from the left" if cut else ""
    also_skipped = f", {skipped} too long and skipped" if skipped else ""
    return f"{count} examples{also_cut}{also_skipped}"


def describe_lengths(lengths: np.ndarray, packing: bool = False) -> str:
    """How long the examples are, and the length of rows that follows from them.

    Args:
        lengths: tokens of each example.
        packing: data.packing.
    """
    half, most = (int(np.quantile(lengths, share, method="lower")) for share in (0.5, 0.95))
    return (
        f"lengths: half of the examples have up to {half} tokens, 95 % up to {most}, the longest {lengths.max()}; "
        f"data.max_seq_length={chosen_length(lengths, packing)}"
    )


def chosen_length(lengths: np.ndarray, packing: bool) -> int:
    """The data.max_seq_length that holds every example. A packed row has room for several short ones."""
    longest = rounded_up(int(lengths.max()))
    return max(ASSUMED_LENGTH, longest) if packing else longest


# ------------------------------------------------------------------------------------------------------------ encoding


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
    fit = Fit(section, tokenizer.bos_token_id, answer, positions)
    fitted = [
        fit(example, record.place) for example, record in zip(encode_all(tokenizer, records), records, strict=True)
    ]
    fit.check()
    kept = [i for i, example in enumerate(fitted) if example is not None]
    examples = [example for example in fitted if example is not None]
    return EncodedRecords(examples, [records[i] for i in kept], fit.cut, fit.skipped)


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


class Fit:
    """Cuts examples that are too long, or leaves them out, as data.truncate says, and counts them."""

    def __init__(self, section: DataSection, bos: int | None, answer: int = 0, positions: int = sys.maxsize):
        """
        Args:
            answer, positions: as of `encode_records`.
        """
        self.section, self.bos, self.answer, self.positions = section, bos, answer, positions
        self.count = self.cut = self.skipped = 0
        self.first = "", 0  # the place and the tokens of the first one that is left out

    def __call__(self, example: Example, place: str) -> Example | None:
        """The example, perhaps cut; None if it is left out."""
        self.count += 1
        prompt, completion = example
        limit, longest = self.section.max_seq_length or sys.maxsize, max(self.answer, len(completion))
        most = min(limit, self.positions - longest + len(completion))
        if len(prompt) + len(completion) <= most:
            return example
        if self.section.truncate != "left":
            if not self.skipped:
                self.first = place, len(prompt) + len(completion)
            self.skipped += 1
            return None
        self.cut += 1
        room = most - len(completion)
        if room < 1:
            most = min(limit, self.positions)
            raise ValueError(
                f"{place}: an answer of {longest} tokens leaves no room for a prompt in {most} tokens; "
                "raise data.max_seq_length, shorten the answers (eval.max_new_tokens), or set data.truncate to skip"
            )
        start = 1 if room > 1 and prompt[0] == self.bos else 0  # some models fail without BOS
        return Example(prompt[:start] + prompt[len(prompt) - room + start :], completion)

    def check(self) -> None:
        """Raises ValueError for long examples where data.truncate is error, and where no example is left."""
        limit, (place, tokens) = self.section.max_seq_length, self.first
        if self.skipped and self.section.truncate == "error":
            raise ValueError(
                f"{place}: {tokens} tokens exceed data.max_seq_length {limit} ({self.skipped} of {self.count} examples "
                "are too long)\nraise data.max_seq_length, or set data.truncate to skip (drop them) or left (cut the "
                "start of the prompt)"
            )
        if self.skipped and self.skipped == self.count:
            raise ValueError(f"{place}: every example is longer than data.max_seq_length {limit}; raise it")


# ------------------------------------------------------------------------------------------------------- training data


def load_training_data(section: DataSection, tokenizer) -> TrainingData:
    """The training data of a run. Raises ValueError as `load_records` and `encode_records` do, naming the place."""
    records, fit = split_records(section, "train") or iter(()), Fit(section, tokenizer.bos_token_id)
    places: list[str] = []

    def fitted(bar: Progress) -> Iterator[Example]:
        while part := list(islice(records, ENCODED_AT_ONCE)):
            for example, record in zip(encode_all(tokenizer, part), part, strict=True):
                if (example := fit(example, record.place)) is not None:
                    places.append(record.place)
                    yield example
            bar.advance(len(part))

    with Progress("tokenising", unit="example") as bar:
        arrays = arrays_of(fitted(bar))
    fit.check()
    return TrainingData(arrays, places, fit.cut, fit.skipped)
