"""Finds the data of a split: a JSON-lines file, or a split of a tfds: or hf: data set."""

from __future__ import annotations

from pathlib import Path

from ..config import DataSection, expanded
from ..storage.bucket import BucketPath, Place
from . import hf, tfds
from .hf import HfSplit, is_hf
from .tasks import TFDS_TASKS
from .tfds import TfdsSplit, is_tfds, parse_tfds

#: A JSON-lines file, or one split of a data set that a library keeps on disk.
Source = Place | TfdsSplit | HfSplit


def source_of(section: DataSection, split: str) -> Source | None:
    """Where the rows of a split are: in the file or data set that the split's own field names, else next to data.train
    (the other files of a folder, the other splits of a data set). None if there are none."""
    own, train = getattr(section, split), section.train
    if is_tfds(own):
        return tfds.find_split(own, split, section.data_dir)
    if is_hf(own):
        return hf.find_split(own, split)
    if own is not None:
        return existing_file(split, expanded(own))
    if is_tfds(train):
        return tfds.sibling_split(str(train), split, section.data_dir)
    if is_hf(train):
        return hf.sibling_split(str(train), split)
    if train is not None and expanded(train).is_dir():
        file = expanded(train) / f"{split}.jsonl"
        return file if file.is_file() else None
    return None


def existing_file(split: str, path: Path | BucketPath) -> Place:
    file = path / f"{split}.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"data.{split}: {file} does not exist; name a .jsonl file, or a folder with {split}.jsonl")
    return file


def files_of(source: Source | None) -> list[Place]:
    """The files that hold a source's rows."""
    if source is None:
        return []
    return [*source.files()] if isinstance(source, TfdsSplit | HfSplit) else [source]


def task_of(section: DataSection) -> str | None:
    """The public task of the data: data.task, else the one that belongs to data.train's tfds: name, unless templates
    read its columns."""
    if section.task is None and is_tfds(section.train) and section.prompt is None and section.completion is None:
        return TFDS_TASKS.get(parse_tfds(str(section.train))[0])
    return section.task
