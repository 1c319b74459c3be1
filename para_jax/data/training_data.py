"""Records as token ids; those that are too long are cut or skipped. Training data is read and tokenised a part at a
time, so that only ids stay in memory. Reading and tokenising overlap. The ids are cached for the next start
(token_cache.py).
"""

from __future__ import annotations

import re
import sys
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from ..config import ASSUMED_LENGTH, DataSection
from ..io.messages import say
from ..io.progress import Progress
from . import token_cache
from .batches import rounded_up
from .example_arrays import ExampleArrays, arrays_of
from .examples import Example, encode_example, encode_examples
from .records import Record, split_records
from .rows import Split, place_of
from .sources import is_held_out, open_split, task_of
from .token_cache import TokenisedExamples

#: Examples per call of the tokenizer.
ENCODED_AT_ONCE = 1024
#: An example with this many times the tokens of 99 % of the others is reported.
FAR_LONGER = 2
#: Tokenising that takes longer than this is reported.
REPORTED_SECONDS = 5.0


class EncodedRecords(NamedTuple):
    """Examples, the record of each, and how many were longer than `max_seq_length` and so cut or skipped."""

    examples: list[Example]
    records: list[Record]
    cut: int = 0
    skipped: int = 0


class Places(Sequence[str]):
    """The place of each example, such as "file:line" or "tfds:NAME:SPLIT[index]", stored as a number."""

    def __init__(self, prefix: str, numbers: Sequence[int] | np.ndarray):
        """
        Args:
            prefix: the text before the number, including the bracket.
            numbers: each example's line or index.
        """
        self.prefix, self.numbers = prefix, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return place_of(self.prefix, int(self.numbers[index]))


class TrainingData(NamedTuple):
    """Examples, the place of each, and how many were longer than `max_seq_length` and so cut or skipped."""

    examples: ExampleArrays
    places: Places
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
    """How long the examples are, and the length that follows from them. A second line names an example that is far
    longer than the rest, what it costs, and the fields that leave it out. Packed rows all have one length, so there it
    costs no more than others.

    Args:
        lengths: tokens of each example.
        packing: data.packing.
    """
    half, most, almost_all = (int(np.quantile(lengths, share, method="lower")) for share in (0.5, 0.95, 0.99))
    longest = int(lengths.max())
    said = (
        f"lengths: half of the examples have up to {half} tokens, 95 % up to {most}, the longest {longest}; "
        f"data.max_seq_length={chosen_length(lengths, packing)}"
    )
    if packing or longest <= FAR_LONGER * almost_all:
        return said
    times, limit = f"{longest / almost_all:.0f} times", rounded_up(almost_all)
    return (
        f"{said}\n99 % of the examples have up to {almost_all} tokens. The longest has {times} as many. A batch with "
        f"it costs at least {times} as much. data.max_seq_length={limit} with data.truncate=skip leaves such "
        "examples out; with data.truncate=left it cuts the start of their prompts"
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


class TooLong(ValueError):
    """Examples have more than data.max_seq_length tokens."""

    advice = "raise data.max_seq_length, or set data.truncate to skip (drop them) or left (cut the start of the prompt)"

    def __init__(self, said: str, long: int, count: int, limit: int | None):
        super().__init__(f"{said}\n{self.advice}")
        self.long, self.count, self.limit = long, count, limit


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
            of_model = self.positions <= limit
            where = (
                f"the model's {self.positions} positions;" if of_model else f"data.max_seq_length {limit}; raise it,"
            )
            raise ValueError(
                f"{place}: an answer of {longest} tokens leaves no room for a prompt in {where} shorten the answers "
                "(eval.max_new_tokens), or set data.truncate to skip"
            )
        start = 1 if room > 1 and prompt[0] == self.bos else 0  # some models fail without BOS
        return Example(prompt[:start] + prompt[len(prompt) - room + start :], completion)

    def check(self) -> None:
        """Raises TooLong where data.truncate is error, and ValueError where no example is left."""
        limit, (place, tokens) = self.section.max_seq_length, self.first
        if self.skipped and self.section.truncate == "error":
            many = f"{self.skipped} of {self.count} examples are too long"
            said = f"{place}: {tokens} tokens exceed data.max_seq_length {limit} ({many})"
            raise TooLong(said, self.skipped, self.count, limit)
        if self.skipped and self.skipped == self.count:
            raise ValueError(f"{place}: every example is longer than data.max_seq_length {limit}; raise it")


# ------------------------------------------------------------------------------------------------------- training data


def load_training_data(section: DataSection, tokenizer) -> TrainingData:
    """The training data of a run, from the cache of token ids if it holds this data (data.cache).

    Raises ValueError as `load_records` and `encode_records` do, naming the place.
    """
    source, file = open_split(section, "train"), None
    if source and source.files and section.cache:
        file = token_cache.cache_file(source.files, tokenizer, fields_of(source, section))
    tokens = token_cache.load_tokens(file) if file else None
    if tokens is not None:
        say(f"using cached token ids from {token_cache.folder()}")
    else:
        begun = time.monotonic()
        tokens = tokenised(split_records(section, "train") or [], tokenizer, section)
        if time.monotonic() - begun > REPORTED_SECONDS:
            say(f"tokenised {len(tokens.sizes)} examples in {time.monotonic() - begun:.0f} s")
        if file:
            token_cache.store_tokens(file, tokens)
    places = Places(source.prefix if source else "", tokens.numbers)
    return TrainingData(ExampleArrays(tokens.ids, tokens.sizes), places, tokens.cut, tokens.skipped)


def fields_of(source: Split, section: DataSection) -> dict[str, Any]:
    """Everything that the ids depend on besides the data's content and the tokenizer."""
    fields = {name: getattr(section, name) for name in ("prompt", "completion", "max_seq_length", "truncate")}
    if is_held_out(section):
        fields["validation_split"] = section.validation_split
    return fields | dict(task=task_of(section), split=source.name, form=source.files[0].suffix)


def tokenised(records: Iterable[Record], tokenizer, section: DataSection) -> TokenisedExamples:
    """The records as token ids. Long ones are treated as in `encode_records`."""
    numbers, fit = array("q"), Fit(section, tokenizer.bos_token_id)

    def fitted(bar: Progress) -> Iterator[Example]:
        for part, examples in encoded_parts(records, tokenizer):
            for example, record in zip(examples, part, strict=True):
                if (example := fit(example, record.place)) is not None:
                    numbers.append(number_of(record.place))
                    yield example
            bar.advance(len(part))

    with Progress("tokenising", unit="example") as bar:
        arrays = arrays_of(fitted(bar))
    fit.check()
    return TokenisedExamples(arrays.sizes, np.frombuffer(numbers, np.int64), arrays.ids, fit.cut, fit.skipped)


def encoded_parts(records: Iterable[Record], tokenizer) -> Iterator[tuple[list[Record], list[Example]]]:
    """The records in parts, with their examples. One part is tokenised, outside Python, while the next is read."""
    rows = iter(records)
    with ThreadPoolExecutor(1) as pool:
        waiting: tuple[list[Record], Future] | None = None
        while True:
            part = list(islice(rows, ENCODED_AT_ONCE))
            coming = (part, pool.submit(encode_all, tokenizer, part)) if part else None
            if waiting:
                yield waiting[0], waiting[1].result()
            if coming is None:
                return
            waiting = coming


def number_of(place: str) -> int:
    """The number at the end of a place: the line in "file:line", or the index in "tfds:NAME:SPLIT[index]"."""
    return int(re.findall(r"\d+", place[-21:])[-1])
