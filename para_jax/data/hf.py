"""Data sets that the `datasets` library of Hugging Face reads: those of the hub, which it downloads into its cache,
local copies of them, and folders that `save_to_disk` wrote.

A source is hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT. NAME is a hub id (user/name, or user/name@revision) or a
local folder. CONFIG may be empty: hf:NAME::train[:90%]. Only JSON and Parquet files are read, and no code of a data set
is ever run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from ..io.checks import expanded, nearest, printable, shorten
from ..io.hub import HUB_ID, inside_folder, is_inside_folder
from ..io.storage.bucket import Place
from .rows import READ_AT_ONCE, DataSet, Split, batch_rows

SCHEME = "hf:"
FORMATS = ("json", "parquet")
SOURCE = re.compile(r"hf:(?P<name>[^:]+)(:(?P<config>[^:]*)(:(?P<split>.+))?)?")
#: The file in which `save_to_disk` lists the splits.
SAVED_SPLITS = "dataset_dict.json"


def is_hf(source: str | None) -> bool:
    return source is not None and source.startswith(SCHEME)


def open_data_set(source: str) -> DataSet:
    """The data set of an hf: source, downloaded into the cache if it is not there."""
    name, config, named = parse_hf(source)
    folder = expanded(name)
    if is_saved(folder):
        return saved_data_set(folder, named)
    check_name(name)
    builder = (prepared_builder if folder.is_dir() else hub_builder)(name, config)
    return DataSet(named, list(builder.info.splits), partial(read_split, builder, name, config))


def parse_hf(source: str) -> tuple[str, str | None, str | None]:
    """(name, config, split) of a source; None for what it leaves out."""
    found = SOURCE.fullmatch(source)
    if found is None:
        raise ValueError(f"{shorten(source)} is not a data set; write hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT")
    return found["name"], found["config"] or None, found["split"]


def check_name(name: str) -> None:
    """Raises ValueError for a path where there is no folder. Like runs/nope where there is a folder runs, it is not
    looked for on the hub."""
    folder = expanded(name)
    if folder.is_dir():
        return
    if HUB_ID.fullmatch(name) is None or is_inside_folder(name):
        why = inside_folder(name) if is_inside_folder(name) else f"{shorten(name)} is not a hub id such as user/name"
        raise ValueError(f"{SCHEME}{name}: no such folder{nearest(folder)} ({why})")


def prepared_builder(name: str, config: str | None) -> Any:
    """A datasets.DatasetBuilder, all of whose splits are in the cache."""
    source, folder = SCHEME + name + (f":{config}" if config else ""), expanded(name)
    path, _, revision = (str(folder.absolute()), "", "") if folder.is_dir() else name.partition("@")
    try:
        builder = datasets_library(source).load_dataset_builder(path, name=config, revision=revision or None)
        if (kind := builder.info.builder_name) not in FORMATS:
            raise ValueError(
                f"it holds {kind} files, but only JSON and Parquet are read. The hub may have a Parquet copy: "
                f"{SCHEME}{path}@refs/convert/parquet"
            )
        builder.download_and_prepare()
    except Exception as error:  # of many kinds: the hub's, the network's and the library's
        said = " ".join(str(error.__cause__ or error).split())  # the cause says more than the error that wraps it
        raise ValueError(f"{source}: {printable(said, 300) or type(error).__name__}") from None
    return builder


#: A run opens its data several times, and each time would ask the hub. A local folder may change in between.
hub_builder = lru_cache(16)(prepared_builder)


def datasets_library(source: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{source} needs the package datasets: pip install 'para_jax[hf]'") from None
    return datasets


def read_split(builder: Any, name: str, config: str | None, split: str) -> Split:
    return split_of(f"{SCHEME}{name}:{config or ''}:{split}", builder.as_dataset(split=split))


def split_of(label: str, dataset: Any) -> Split:
    return Split(label, f"{label}[", lambda: enumerate(dataset_rows(dataset)))


def dataset_rows(dataset: Any) -> Iterator[dict]:
    """The rows of a datasets.Dataset. Images and the like stay as they are stored."""
    for table in dataset.with_format("arrow").iter(READ_AT_ONCE):
        yield from batch_rows(table)


# --------------------------------------------------------------------------------------------------------- save_to_disk


def is_saved(folder: Place) -> bool:
    """Whether `save_to_disk` wrote the folder: a data set, or one with splits."""
    return isinstance(folder, Path) and any((folder / name).is_file() for name in (SAVED_SPLITS, "state.json"))


def splits_of_saved(folder: Path) -> list[str]:
    """The splits of a folder that `save_to_disk` wrote; none where it is one data set."""
    return sorted(file.parent.name for file in folder.glob("*/state.json")) if (folder / SAVED_SPLITS).is_file() else []


def saved_data_set(folder: Path, named: str | None = None) -> DataSet:
    """A folder that `save_to_disk` wrote."""
    return DataSet(named, splits_of_saved(folder), partial(open_saved, folder))


def open_saved(folder: Path, split: str) -> Split:
    """A split of a folder that `save_to_disk` wrote. A data set without splits is the one that it is named for."""
    own = folder / split if splits_of_saved(folder) else folder
    return split_of(str(own), datasets_library(str(folder)).load_from_disk(str(own)))
