"""Finds the data of a split: a data file, a data set that a library keeps on disk, or rows that a program gave."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from ..config import DataSection, expanded, is_tfds, nearest, printable, shorten
from ..storage.bucket import BucketPath, Place
from . import hf, tfds
from .arrow_files import SavedSplit, class_labels, is_saved, parquet_labels, saved_sibling, saved_split, splits_of_saved
from .given import GivenSplit, given_split, is_given, warn_of_hidden
from .hf import HfSplit, is_hf, parse_hf
from .row_files import OTHER_NAMES, form_of, misnamed_split, place_prefix, split_file
from .tasks import TFDS_TASKS
from .tfds import TfdsSplit, parse_tfds

#: Sources that give their rows themselves: `label`, `split`, `files()` and `rows()`.
DatasetSplit = TfdsSplit | HfSplit | SavedSplit | GivenSplit
#: A data file, or one split of a data set.
Source = Place | DatasetSplit
FORMS = "a .jsonl, .csv or .parquet file, a folder with {split}.jsonl (or .csv, .parquet), tfds:NAME or hf:NAME"

#: A run looks for its data several times.
warn_once_of_hidden = cache(warn_of_hidden)


def source_of(section: DataSection, split: str) -> Source | None:
    """Where the rows of a split are. Those of the validation data may be among the training data (`is_held_out`). None
    if there are none."""
    return own_source(section, "train" if split == "validation" and is_held_out(section) else split)


def is_held_out(section: DataSection) -> bool:
    """Whether a part of the training data is the validation data (data.validation_split)."""
    return section.validation_split is not None and own_source(section, "validation") is None


def own_source(section: DataSection, split: str) -> Source | None:
    """Where a split has rows of its own: in the file or data set that its field names, else next to data.train (the
    other files of a folder, the other splits of a data set). None if it has none."""
    own, train = getattr(section, split), section.train
    if is_given(own) or (own is None and is_given(train)):
        return given_split(section, split)
    if is_tfds(own):
        return tfds.find_split(str(own), split, section.data_dir)
    if is_hf(own):
        return saved_by_name(str(own), split) or hf.find_split(str(own), split)
    if own is not None:
        return existing(split, expanded(own))
    if is_tfds(train):
        return labelled(tfds.sibling_split(str(train), split, section.data_dir))
    if is_hf(train):
        name, _, named = parse_hf(str(train))
        if not is_saved(expanded(name)):
            return labelled(hf.sibling_split(str(train), split))
        return None if named else labelled(saved_sibling(expanded(name), split))
    if train is not None and (folder := expanded(train)).is_dir():
        return labelled(saved_sibling(folder, split)) if is_saved(folder) else in_folder(folder, split)
    return None


def labelled(found: TfdsSplit | HfSplit | SavedSplit | None) -> TfdsSplit | HfSplit | SavedSplit | None:
    """A split next to the training data; None if its labels are hidden, with a warning if it is validation data."""
    if found is None or found.has_labels():
        return found
    if found.split == "validation":
        warn_once_of_hidden(found.label)
    return None


def unread(section: DataSection, split: str) -> Place | None:
    """A file next to the training data that was probably meant as this split (validation or test), but is not read: it
    is named otherwise, or data.train is a file. None if the config names data of this split, or that file."""
    if getattr(section, split) is not None:
        return None
    place, named = local_place(section.train), [named_place(own) for own in (section.validation, section.test)]
    if place and place.is_dir():
        found = unread_part(place, split) if is_saved(place) else misnamed_split(place, split)
    else:
        found = beside(place, split)
    return None if found in named else found


def unread_part(folder: Path, split: str) -> Path | None:
    """The split of a data set that `save_to_disk` wrote which was probably meant as this one (validation or test), but
    is not read: it has another name, or `folder` is the split train and not the whole data set. None if there is
    none."""
    whole = folder.parent if folder.name == "train" and not splits_of_saved(folder) else folder
    there = splits_of_saved(whole)
    if whole == folder and split in there:
        return None
    meant = (split, *OTHER_NAMES) if split == "validation" else (split,)
    return next((whole / name for name in there if name.lower() in meant), None)


def named_place(own: str | None) -> Path | None:
    """The file or folder that a field names, also as hf:FOLDER::SPLIT."""
    if own is None or not is_hf(own):
        return local_place(own)
    name, _, split = parse_hf(own)
    folder = expanded(name)
    return folder / split if split and isinstance(folder, Path) and is_saved(folder) else None


def local_place(train: str | None) -> Path | None:
    """The file or folder of data.train on this machine; None for other data."""
    if train is None or is_given(train) or is_tfds(train) or is_hf(train):
        return None
    place = expanded(train)
    return None if isinstance(place, BucketPath) else place


def is_folder(train: str | None) -> bool:
    """Whether data.train is a folder on this machine."""
    place = local_place(train)
    return place is not None and place.is_dir()


def beside(place: Path | None, split: str) -> Place | None:
    """The file of a split next to train.jsonl, which is the place."""
    if not (place and place.is_file() and place.stem == "train"):
        return None
    return split_file(place.parent, split) or misnamed_split(place.parent, split)


def existing(split: str, path: Place) -> Source:
    """The data at a path. A folder without the split's file is an error."""
    found = in_folder(path, split) if path.is_dir() else path
    if found is None and is_saved(path):
        there = printable(", ".join(splits_of_saved(path)), 200)
        raise ValueError(f"data.{split}: {path} has no split {split}, but {there}; write hf:{path}::SPLIT")
    if found is None or (not isinstance(found, DatasetSplit) and not found.is_file()):
        missing = path / f"{split}.jsonl" if path.is_dir() else path
        advice = ""
        if not isinstance(missing, BucketPath):
            advice = nearest(missing) or f" in {printable(str(Path.cwd()), 200)}" * (not missing.is_absolute())
        if split == "train" and path.is_dir() and is_of_tenants(path):
            advice = f"; {path} has a folder for each tenant: use data.tenants={path}"
        raise ValueError(f"data.{split}: {missing} does not exist{advice}\nname {FORMS.format(split=split)}")
    return found


def is_of_tenants(folder: Place) -> bool:
    """Whether the sub-folders have training data of their own."""
    if isinstance(folder, BucketPath):
        return False
    return any(split_file(inside, "train") is not None for inside in folder.iterdir() if inside.is_dir())


def in_folder(folder: Place, split: str) -> Source | None:
    """A split of a folder: its file, or a part of a data set that `save_to_disk` wrote or the hub holds."""
    if is_saved(folder):
        return saved_split(folder, split)
    if (file := split_file(folder, split)) is not None:
        return file
    if not is_hub_folder(folder):
        return None
    source = f"{hf.SCHEME}{folder}"
    return hf.find_split(source, split) if split == "train" else labelled(hf.sibling_split(source, split))


def is_hub_folder(folder: Place) -> bool:
    """Whether a folder has the layout of a data set on the hub: files such as data/train-00000-of-00001.parquet."""
    if isinstance(folder, BucketPath) or split_file(folder, "train") is not None:
        return False
    return any(any(folder.glob(pattern)) for pattern in ("train-*", "data/train*", "*/train-*.parquet"))


def saved_by_name(source: str, split: str) -> SavedSplit | None:
    """A split of hf:FOLDER, where `save_to_disk` wrote the folder; None for other data sets. Raises ValueError for a
    split that is not there."""
    name, _, named = parse_hf(source)
    folder, wanted = expanded(name), named or split
    if not is_saved(folder):
        return None
    there = splits_of_saved(folder)
    if (wanted if there else named or "train") not in (there or ["train"]):
        said = f"choose one of {', '.join(there)}" if there else "it is one data set, without splits"
        raise ValueError(f"{hf.SCHEME}{name}: no split {shorten(wanted)}; {printable(said, 200)}")
    return saved_split(folder, wanted)


def files_of(source: Source | None) -> list[Place]:
    """The files that hold a source's rows."""
    if source is None:
        return []
    return [*source.files()] if isinstance(source, DatasetSplit) else [source]


def prefix_of(source: Source | None) -> str:
    """What a row's place begins with, before its number."""
    if isinstance(source, GivenSplit):
        return f"{source.label} row "
    return f"{source.label}[" if isinstance(source, DatasetSplit) else place_prefix(source)


def class_labels_of(source: Source) -> dict[str, list[str]]:
    """The names of the classes of each ClassLabel column. Its rows hold the numbers of the classes. Data sets of
    tensorflow_datasets and Hugging Face have such columns, also the Parquet files that the latter wrote."""
    if not isinstance(source, DatasetSplit):
        return parquet_labels(source) if source.is_file() and form_of(source) == "parquet" else {}
    if isinstance(source, SavedSplit | TfdsSplit):
        return source.class_labels()
    if isinstance(source, HfSplit):
        return class_labels(source.dataset)
    return class_labels(source.given)


def task_of(section: DataSection) -> str | None:
    """The public task of the data: data.task, else the one that belongs to data.train's tfds: name, unless templates
    read its columns."""
    if section.task is None and is_tfds(section.train) and section.prompt is None and section.completion is None:
        return TFDS_TASKS.get(parse_tfds(str(section.train))[0])
    return section.task
