"""hf: sources: data sets of the Hugging Face hub, which the `datasets` library downloads into its cache and reads.

A source is hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT. NAME is a hub id (user/name, or user/name@revision) or a
local folder. CONFIG may be empty: hf:NAME::train[:90%]. Only JSON and Parquet files are read, and no code of a data set
is ever run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..config import expanded, nearest, printable, shorten
from ..hub import HUB_ID, inside_folder, is_inside_folder
from .arrow_files import as_written, float32_columns, hides_labels, json_columns, without_media
from .plain_values import plain_value
from .tfds import require_forward

SCHEME = "hf:"
FORMATS = ("json", "parquet")
SOURCE = re.compile(r"hf:(?P<name>[^:]+)(:(?P<config>[^:]*)(:(?P<split>.+))?)?")
READ_AT_ONCE = 1000  # rows


class HfSplit(NamedTuple):
    """One split of a data set in the cache of `datasets`."""

    label: str
    """the source with its config and split: hf:NAME:CONFIG:SPLIT"""
    split: str
    dataset: Any
    """a datasets.Dataset"""

    def files(self) -> list[Path]:
        """The Arrow files in the cache that hold the rows."""
        return sorted(Path(file["filename"]) for file in self.dataset.cache_files)

    def rows(self) -> Iterator[tuple[str, dict]]:
        """Each row's place, "hf:NAME:CONFIG:SPLIT[index]", and its columns. A null counts as a missing column."""
        index, in_json, short = 0, json_columns(self.dataset), float32_columns(self.dataset.features or {})
        for columns in without_media(self.dataset).iter(batch_size=READ_AT_ONCE):
            for values in zip(*columns.values(), strict=True):
                place = f"{self.label}[{index}]"
                row = as_written(dict(zip(columns, values, strict=True)), in_json, short)
                yield place, {name: plain_value(value) for name, value in row.items()}
                index += 1

    def has_labels(self) -> bool:
        return not hides_labels(self.dataset)


def is_hf(source: str | None) -> bool:
    return source is not None and source.startswith(SCHEME)


def find_split(source: str, split: str) -> HfSplit:
    """The data of an hf: source, downloaded into the cache if it is not there.

    Args:
        split: the split to read if the source names none. "test" becomes "validation" if there is no test split, or
            its labels are hidden, as in GLUE.
    """
    name, config, named = parse_hf(source)
    builder = prepared_builder(name, config)
    if named is None:
        options = (split, "validation") if split == "test" else (split,)
        found = (read_split(builder, name, config, option) for option in options if option in builder.info.splits)
        named = next((one.split for one in found if one.has_labels()), split)
    require_forward(source, named)
    return read_split(builder, name, config, named)


def sibling_split(source: str, split: str) -> HfSplit | None:
    """The validation or test split next to the training data, an hf: source. None if the source names its split, or the
    data set has no such split."""
    name, config, named = parse_hf(source)
    if named is not None:
        return None
    builder = prepared_builder(name, config)
    return read_split(builder, name, config, split) if split in builder.info.splits else None


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


def read_split(builder: Any, name: str, config: str | None, split: str) -> HfSplit:
    try:
        dataset = builder.as_dataset(split=split)
    except ValueError:
        raise ValueError(
            f"{SCHEME}{name}: no split {shorten(split)}, or no rows in it; choose one of "
            f"{', '.join(builder.info.splits)}, or a part of one, such as train[:90%]"
        ) from None
    return HfSplit(f"{SCHEME}{name}:{config or ''}:{split}", split, dataset)
