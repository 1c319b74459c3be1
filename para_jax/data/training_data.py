"""A run's training data as token ids. Rows are read and tokenised a part at a time, so that only ids stay in memory.

Reading and tokenising overlap. The ids are cached for the next start (token_cache.py).
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
from .encode_records import ENCODED_AT_ONCE, all_too_long, cut_left, encode_all, report, too_long
from .example_arrays import ExampleArrays, ExampleBuilder
from .examples import Example
from .records import Record, split_records
from .sources import is_held_out, open_split, task_of
from .split import Split, place_of
from .token_cache import TokenisedExamples

#: An example with this many times the tokens of 99 % of the others is reported.
FAR_LONGER = 2
#: Tokenising that takes longer than this is reported.
REPORTED_SECONDS = 5.0


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


def load_training_data(section: DataSection, tokenizer) -> TrainingData:
    """The training data of a run, from the cache of token ids if it holds this data (data.cache).

    Raises ValueError as `load_records` and `encode_records` do, naming the place.
    """
    source, key, content = open_split(section, "train"), None, ""
    if source and section.cache and sum(file.stat().st_size for file in source.files) >= token_cache.MIN_BYTES:
        key = token_cache.tokenizer_key(tokenizer, fields_of(source, section))
        content = token_cache.files_digest(source.files)
    tokens = token_cache.load_tokens(key, content) if key else None
    if tokens is not None:
        say(f"using cached token ids from {token_cache.folder()}")
    else:
        begun = time.monotonic()
        tokens = tokenised(split_records(section, "train") or [], tokenizer, section)
        if time.monotonic() - begun > REPORTED_SECONDS:
            say(f"tokenised {len(tokens.sizes)} examples in {time.monotonic() - begun:.0f} s")
        if key:
            token_cache.store_tokens(key, content, tokens)
    places = Places(source.prefix if source else "", tokens.numbers)
    return TrainingData(ExampleArrays(tokens.ids, tokens.sizes), places, tokens.cut, tokens.skipped)


def tokenised(records: Iterable[Record], tokenizer, section: DataSection) -> TokenisedExamples:
    """The records as token ids. Long ones are treated as in `encode_records`."""
    builder, numbers = ExampleBuilder(), array("q")
    cut = skipped = total = 0
    too_long_first: tuple[Example, str] | None = None
    most = section.max_seq_length or sys.maxsize
    with Progress("tokenising", unit="example") as bar:
        for part, examples in encoded_parts(records, tokenizer):
            total += len(part)
            for example, record in zip(examples, part, strict=True):
                if len(example.prompt_ids) + len(example.completion_ids) > most:
                    if section.truncate == "left":
                        example = cut_left(example, most, tokenizer.bos_token_id, record.place)
                        cut += 1
                    else:
                        too_long_first = too_long_first or (example, record.place)
                        skipped += 1
                        continue
                builder.add([example])
                numbers.append(number_of(record.place))
            bar.advance(len(part))
    if too_long_first and section.truncate == "error":
        raise too_long(*too_long_first, skipped, total, section)
    if too_long_first and not len(builder):
        raise all_too_long(too_long_first[1], section)
    arrays = builder.arrays()
    return TokenisedExamples(arrays.sizes, np.frombuffer(numbers, np.int64), arrays.ids, cut, skipped)


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


# ---------------------------------------------------------------------------------------------------------------- cache


def fields_of(source: Split, section: DataSection) -> dict[str, Any]:
    """Everything that the ids depend on besides the data's content and the tokenizer."""
    fields = {name: getattr(section, name) for name in ("prompt", "completion", "max_seq_length", "truncate")}
    if is_held_out(section):
        fields["validation_split"] = section.validation_split
    return fields | dict(task=task_of(section), split=source.name, form=source.files[0].suffix)
