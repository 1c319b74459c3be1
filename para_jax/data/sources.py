"""Finds the data of a split: a file, a data set of a library or a folder of one, or rows that a program gave."""

from __future__ import annotations

from pathlib import Path

from ..config import DataSection, is_tfds
from ..io.checks import expanded, nearest
from ..io.storage.bucket import Place
from . import hf, tfds
from .given import given_split, is_given
from .held_out import part_of
from .hf import SCHEME, is_hf, parse_hf
from .row_files import ENDINGS, OTHER_NAMES, is_saved, open_file, saved_data_set, split_file, splits_of_saved
from .split import DataSet, Split
from .tasks import TFDS_TASKS
from .tfds import parse_tfds

FORMS = "a .jsonl, .csv or .parquet file, a folder with {split}.jsonl (or .csv, .parquet), tfds:NAME or hf:NAME"


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


def is_held_out(section: DataSection) -> bool:
    """Whether a part of the training data is the validation data (data.validation_split)."""
    return section.validation_split is not None and whole_split(section, "validation") is None


def whole_split(section: DataSection, split: str) -> Split | None:
    """The data that a split's field names, else that next to data.train: the other files of a folder, the other splits
    of a data set."""
    source, train = getattr(section, split), section.train
    if is_given(source) or (source is None and is_given(train)):
        return given_split(section, split)
    if source is not None:
        return named_split(section, source, split)
    if train is None or not (found := data_set_of(section, train)):
        return None
    if isinstance(found, DataSet):
        return found.sibling(split)
    file = split_file(found, split) if found.is_dir() else None
    return open_file(file, split) if file else None


def named_split(section: DataSection, source: str, split: str) -> Split:
    """The data that a field names."""
    found = data_set_of(section, source)
    if isinstance(found, DataSet):
        return found.of_field(split)
    file = split_file(found, split) if found.is_dir() else found
    if file is None or not file.is_file():
        missing = file or found / f"{split}.jsonl"
        advice = (nearest(missing) or f" in {Path.cwd()}") if isinstance(missing, Path) else ""
        raise ValueError(f"data.{split}: {missing} does not exist{advice}\nname {FORMS.format(split=split)}")
    return open_file(file, split)


def data_set_of(section: DataSection, source: str) -> DataSet | Place:
    """The data set that a field names, or its file or folder of files."""
    if is_tfds(source):
        return tfds.open_data_set(source, section.data_dir)
    if is_hf(source):
        name, _, named = parse_hf(source)
        folder = expanded(name)
        return saved_data_set(folder, named) if is_saved(folder) else hf.open_data_set(source)
    path = expanded(source)
    if isinstance(path, Path) and is_saved(path):
        return saved_data_set(path)
    return hf.open_data_set(f"{SCHEME}{path}") if is_hub_folder(path) else path


def is_hub_folder(folder: Place) -> bool:
    """Whether a folder has the layout of a data set on the hub: files such as data/train-00000-of-00001.parquet."""
    if not isinstance(folder, Path) or split_file(folder, "train") is not None:
        return False
    return any(any(folder.glob(pattern)) for pattern in ("train-*", "data/train*", "*/train-*.parquet"))


def unread(section: DataSection, split: str) -> Path | None:
    """A file next to the training data, or another split that `save_to_disk` wrote, that was probably meant as this
    split, such as dev.jsonl, but is not read: it is named otherwise, or data.train is a file. None if the config names
    data of this split, or that file."""
    train = local_place(section.train)
    if getattr(section, split) is not None or not (train and (train.is_dir() or train.stem == "train")):
        return None
    folder = train if train.is_dir() else train.parent
    there = splits_of_saved(folder)
    if split in there or (train.is_dir() and split_file(folder, split) is not None):
        return None
    names = (split, *OTHER_NAMES) if split == "validation" else (split,)
    meant = {*(set(names) & set(there)), *(f"{name}{ending}" for name in names for ending in ENDINGS)}
    named = [local_place(source) for source in (section.validation, section.test)]
    found = (file for file in sorted(folder.iterdir()) if file.name.lower() in meant and file not in named)
    return next((file for file in found if file.is_file() or is_saved(file)), None)


def local_place(source: str | None) -> Path | None:
    """The file or folder that a field names on this machine; None for other data."""
    if source is None or is_given(source) or is_tfds(source) or is_hf(source):
        return None
    place = expanded(source)
    return place if isinstance(place, Path) else None


def is_folder(train: str | None) -> bool:
    """Whether data.train is a folder on this machine."""
    place = local_place(train)
    return place is not None and place.is_dir()


def task_of(section: DataSection) -> str | None:
    """The public task of the data: data.task, else the one that belongs to data.train's tfds: name, unless templates
    read its columns."""
    if section.task is None and is_tfds(section.train) and section.prompt is None and section.completion is None:
        return TFDS_TASKS.get(parse_tfds(str(section.train))[0])
    return section.task
