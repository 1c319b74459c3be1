"""Finds the data of a split: a file, a data set of a library or a folder of one, or rows that a program gave. A part of
the training data may be held out as validation data (data.validation_split)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from fractions import Fraction
from itertools import count
from math import ceil
from pathlib import Path
from typing import TypeVar

from ..config import DataSection, is_tfds
from ..io.checks import expanded, nearest
from ..io.storage.bucket import Place
from . import hf, tfds
from .given import given_split, is_given
from .rows import DataSet, Split, open_file, split_file
from .tasks import TFDS_TASKS

FORMS = "a .jsonl, .csv or .parquet file, a folder with {split}.jsonl (or .csv, .parquet), tfds:NAME or hf:NAME"

Row = TypeVar("Row")


def open_split(section: DataSection, split: str) -> Split | None:
    """The rows of a split; None if there are none. Where data.validation_split holds validation data out of the
    training data, each has its part of the rows."""
    if split == "test" or not is_held_out(section):
        return whole_split(section, split)
    train, share = whole_split(section, "train"), section.validation_split
    if train is None or share is None:
        return None
    part = train._replace(read=lambda: part_of(train.read(), share, held_out=split == "validation"))
    return None if split == "validation" and not any(True for _ in part.read()) else part


def whole_split(section: DataSection, split: str) -> Split | None:
    """The data that a split's field names, else that next to data.train: the other files of a folder, the other splits
    of a data set."""
    source, train = getattr(section, split), section.train
    if is_given(source) or (source is None and is_given(train)):
        return given_split(section, split)
    if (named := source or train) is None:
        return None
    found = data_set_of(section, named)
    if isinstance(found, DataSet):
        return found.sibling(split) if source is None else found.of_field(split)
    file = split_file(found, split) if found.is_dir() else found
    # Next to data.train: a file for data.train alone has no siblings, a folder may.
    if source is None:
        return open_file(file) if file and file != found else None
    if file is None or not file.is_file():
        missing = file or found / f"{split}.jsonl"
        advice = (nearest(missing) or f" in {Path.cwd()}") if isinstance(missing, Path) else ""
        raise ValueError(f"data.{split}: {missing} does not exist{advice}\nname {FORMS.format(split=split)}")
    return open_file(file)


def data_set_of(section: DataSection, source: str) -> DataSet | Place:
    """The data set that a field names, or its file or folder of files."""
    if is_tfds(source):
        return tfds.open_data_set(source, section.data_dir)
    if hf.is_hf(source):
        return hf.open_data_set(source)
    path = expanded(source)
    return hf.saved_data_set(path) if hf.is_saved(path) else path


def task_of(section: DataSection) -> str | None:
    """The public task of the data: data.task, else the one that belongs to data.train's tfds: name, unless templates
    read its columns."""
    if section.task is None and is_tfds(section.train) and section.prompt is None and section.completion is None:
        return TFDS_TASKS.get(tfds.parse_tfds(str(section.train))[0])
    return section.task


# ------------------------------------------------------------------------------------------------------- held-out rows


def is_held_out(section: DataSection) -> bool:
    """Whether a part of the training data is the validation data (data.validation_split)."""
    return section.validation_split is not None and whole_split(section, "validation") is None


def part_of(rows: Iterator[Row], share: float, *, held_out: bool) -> Iterator[Row]:
    """The rows that are held out, or the others. A row's number alone decides. So sorted data is held out evenly, and
    rows that are added at the end change nothing before them."""
    chosen = validation_rows(Fraction(str(share)))  # 0.1 is a tenth
    following = next(chosen)
    for number, row in enumerate(rows):
        is_chosen = number == following
        if is_chosen:
            following = next(chosen)
        if is_chosen == held_out:
            yield row


def validation_rows(share: Fraction) -> Iterator[int]:
    """The numbers of the rows that are held out, from 0: one of each block of 1 / share rows. Its place in the block
    changes from block to block, because data may repeat a pattern. In the first block it is the last row, so that a few
    rows are all trained on."""
    for block in count():
        start, end = ceil(block / share), ceil((block + 1) / share)
        drawn = int.from_bytes(hashlib.sha256(str(block).encode()).digest()[:8], "big")
        yield start + drawn % (end - start) if block else end - 1
