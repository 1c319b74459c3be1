"""A run's training data as token ids. Rows are read and tokenised a part at a time, so that only ids stay in memory.

Reading and tokenising overlap. The ids are cached for the next start (token_cache.py).
"""

from __future__ import annotations

import hashlib
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from ..config import DataSection
from ..messages import say
from ..progress import Progress
from . import token_cache
from .example_arrays import ExampleArrays, ExampleBuilder
from .examples import Example
from .hf import HfSplit
from .records import ENCODED_AT_ONCE, Record, cut_left, encode_all, report, split_records, too_long
from .sources import Source, files_of, source_of, task_of
from .tfds import TfdsSplit
from .token_cache import Tokens

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
        return f"{self.prefix}{self.numbers[index]}{']' if self.prefix.endswith('[') else ''}"


class TrainingData(NamedTuple):
    """Examples, the place of each, and how many were longer than `max_seq_length` and so cut or skipped."""

    examples: ExampleArrays
    places: Places
    cut: int = 0
    skipped: int = 0

    def report(self) -> str:
        """One line for the user: the number of examples, and how many were cut or skipped."""
        return report(len(self.examples), self.cut, self.skipped)


def load_training_data(section: DataSection, tokenizer) -> TrainingData:
    """The training data of a run, from the cache of token ids if it holds this data (data.cache).

    Raises ValueError as `load_records` and `encode_records` do, naming the place.
    """
    source, key = source_of(section, "train"), None
    if section.cache and is_large(source):
        key = token_cache.tokenizer_key(tokenizer, fields_of(source, section))
    if key and (found := token_cache.load_tokens(key, content_of(source))):
        say(f"using cached token ids from {token_cache.folder()}")
        return training_data(source, found)
    begun, seen = time.monotonic(), hashlib.sha256() if key else None
    tokens = tokenised(split_records(section, "train", seen) or [], tokenizer, section)
    if time.monotonic() - begun > REPORTED_SECONDS:
        say(f"tokenised {len(tokens.sizes)} examples in {time.monotonic() - begun:.0f} s")
    if key and seen:  # a file may have changed since it was looked up, so its digest is of the bytes that were read
        content = content_of(source) if isinstance(source, TfdsSplit | HfSplit) else seen.hexdigest()
        token_cache.store_tokens(key, content, tokens)
    return training_data(source, tokens)


def training_data(source: Source | None, tokens: Tokens) -> TrainingData:
    prefix = f"{source.label}[" if isinstance(source, TfdsSplit | HfSplit) else f"{source}:"
    examples = ExampleArrays(tokens.ids, tokens.sizes)
    return TrainingData(examples, Places(prefix, tokens.numbers), tokens.cut, tokens.skipped)


def tokenised(records: Iterable[Record], tokenizer, section: DataSection) -> Tokens:
    """The records as token ids. Long ones are treated as in `encode_records`."""
    builder, numbers = ExampleBuilder(), array("q")
    cut = skipped = total = 0
    too_long_first: tuple[Example, str] | None = None
    with Progress("tokenising", unit="example") as bar:
        for part, examples in encoded_parts(records, tokenizer):
            total += len(part)
            for example, record in zip(examples, part, strict=True):
                if len(example.prompt_ids) + len(example.completion_ids) > section.max_seq_length:
                    if section.truncate == "left":
                        example = cut_left(example, section.max_seq_length, tokenizer.bos_token_id, record.place)
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
    if not len(builder):
        raise ValueError(f"every example is longer than data.max_seq_length {section.max_seq_length}; raise it")
    arrays = builder.arrays()
    return Tokens(arrays.sizes, np.frombuffer(numbers, np.int64), arrays.ids, cut, skipped)


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
    """The line in "file:line", or the index in "tfds:NAME:SPLIT[index]"."""
    return int(place[max(place.rfind(":"), place.rfind("[")) + 1 :].removesuffix("]"))


# ---------------------------------------------------------------------------------------------------------------- cache


def fields_of(source: Source | None, section: DataSection) -> dict[str, Any]:
    """Everything that the ids depend on besides the data's content and the tokenizer."""
    fields = {name: getattr(section, name) for name in ("prompt", "completion", "max_seq_length", "truncate")}
    split = source.split if isinstance(source, TfdsSplit | HfSplit) else None
    return fields | dict(task=task_of(section), split=split)


def is_large(source: Source | None) -> bool:
    return sum(file.stat().st_size for file in files_of(source)) >= token_cache.MIN_BYTES


def content_of(source: Source | None) -> str:
    return token_cache.files_digest(files_of(source))
