"""hf: sources: data sets of the Hugging Face hub, which the `datasets` library downloads into its cache and reads.

A source is hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT. NAME is a hub id (user/name, or user/name@revision) or a
local folder. CONFIG may be empty: hf:NAME::train[:90%]. Only JSON and Parquet files are read, and no code of a data set
is ever run.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from ..io.checks import expanded, nearest, printable, shorten
from ..io.hub import HUB_ID, inside_folder, is_inside_folder
from .row_files import dataset_rows
from .split import DataSet, Split

SCHEME = "hf:"
FORMATS = ("json", "parquet")
SOURCE = re.compile(r"hf:(?P<name>[^:]+)(:(?P<config>[^:]*)(:(?P<split>.+))?)?")


def is_hf(source: str | None) -> bool:
    return source is not None and source.startswith(SCHEME)


def open_data_set(source: str) -> DataSet:
    """The data set of an hf: source, downloaded into the cache if it is not there."""
    name, config, named = parse_hf(source)
    builder = prepared_builder(name, config)
    return DataSet(named, list(builder.info.splits), partial(read_split, builder, name, config))


def parse_hf(source: str) -> tuple[str, str | None, str | None]:
    """(name, config, split) of a source; None for what it leaves out."""
    found = SOURCE.fullmatch(source)
    if found is None:
        raise ValueError(f"{shorten(source)} is not a data set; write hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT")
    return found["name"], found["config"] or None, found["split"]


def prepared_builder(name: str, config: str | None) -> Any:
    """A datasets.DatasetBuilder, all of whose splits are in the cache."""
    source = SCHEME + name + (f":{config}" if config else "")
    check_name(name)
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{source} needs the package datasets: pip install 'para_jax[hf]'") from None
    folder, revision, hint = expanded(name), None, ""
    if folder.is_dir():
        path = str(folder.absolute())
    else:
        hub_id = HUB_ID.fullmatch(name)
        assert hub_id is not None, name  # as check_name found
        path, revision = hub_id["repository"], hub_id["revision"]
        hint = f". The hub may have a Parquet copy: {SCHEME}{path}@refs/convert/parquet"
    try:
        builder = datasets.load_dataset_builder(path, name=config, revision=revision)
    except Exception as error:  # of many kinds: the hub's, the network's and the library's
        raise ValueError(f"{source}: {load_failure(error)}") from None
    if builder.info.builder_name not in FORMATS:
        raise ValueError(f"{source} holds {builder.info.builder_name} files, but only JSON and Parquet are read{hint}")
    try:
        builder.download_and_prepare()
    except Exception as error:
        raise ValueError(f"{source}: {load_failure(error)}") from None
    return builder


def check_name(name: str) -> None:
    """Raises ValueError for a path where there is no folder. Like runs/nope where there is a folder runs, it is not
    looked for on the hub."""
    if expanded(name).is_dir():
        return
    if HUB_ID.fullmatch(name) is None:
        raise ValueError(
            f"{SCHEME}{name}: no such folder{nearest(expanded(name))}, and {shorten(name)} is not a hub id such as "
            "user/name"
        )
    if is_inside_folder(name):
        raise ValueError(f"{SCHEME}{name}: no such folder{nearest(Path(name))} ({inside_folder(name)})")


def load_failure(error: Exception) -> str:
    """One line on why `datasets` failed. The cause says more than the error that wraps it."""
    words = str(error.__cause__ or error).split() or [type(error).__name__]
    text = printable(" ".join(words), 300)
    if text.startswith("BuilderConfig"):  # the user may have meant a split
        return f"{text}. A split is written after the config: hf:NAME:CONFIG:SPLIT, or hf:NAME::SPLIT"
    return text


def read_split(builder: Any, name: str, config: str | None, split: str) -> Split:
    try:
        dataset = builder.as_dataset(split=split)
    except ValueError:
        raise ValueError(
            f"{SCHEME}{name}: no split {shorten(split)}, or no rows in it; choose one of "
            f"{', '.join(builder.info.splits)}, or a part of one, such as train[:90%]"
        ) from None
    label, files = f"{SCHEME}{name}:{config or ''}:{split}", [Path(file["filename"]) for file in dataset.cache_files]
    return Split(label, split, f"{label}[", lambda: enumerate(dataset_rows(dataset)), files)
