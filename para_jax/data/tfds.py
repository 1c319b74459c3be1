"""tfds: sources: data sets of tensorflow_datasets, prepared once in its folder and then read without TensorFlow.

A source is tfds:NAME[/CONFIG][:SPLIT]. SPLIT follows tensorflow_datasets' syntax: tfds:glue/sst2:train[:90%].
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

from ..config import TFDS as SCHEME
from ..config import is_tfds as is_tfds
from ..io.checks import expanded, printable, shorten
from .rows import READ_AT_ONCE, DataSet, Split


class NotPrepared(ValueError):
    """The data set is not on disk. The message names the folder, and the command that prepares the data set."""


def parse_tfds(source: str) -> tuple[str, str | None]:
    """NAME[/CONFIG] and the split of a source; None if it names no split."""
    found = re.fullmatch(SCHEME + r"(\w+(?:/[\w.+-]+)*)(?::(.+))?", source)
    if not found or ".." in found[1].split("/"):
        raise ValueError(f"{shorten(source)} is not a data set; write tfds:NAME, tfds:NAME/CONFIG or tfds:NAME:SPLIT")
    return found[1], found[2]


def open_data_set(source: str, data_dir: str | None) -> DataSet:
    """The prepared data of a tfds: source. Nothing is downloaded."""
    name, named = parse_tfds(source)
    folder = newest(name, data_dir)
    return DataSet(named, list(builder_at(folder).info.splits), partial(open_prepared, name, folder))


def open_prepared(name: str, folder: Path, split: str) -> Split:
    label = f"{SCHEME}{name}:{split}"
    return Split(label, f"{label}[", partial(examples, folder, split))


def examples(folder: Path, split: str) -> Iterator[tuple[int, dict]]:
    """Each example with its index."""
    source = builder_at(folder).as_data_source(split=split)
    for start in range(0, len(source), READ_AT_ONCE):
        indices = range(len(source))[start : start + READ_AT_ONCE]
        yield from zip(indices, source.__getitems__(indices), strict=True)


def prepare(source: str, data_dir: str | None = None) -> Path:
    """Downloads a data set, writes it as array_record, and returns its folder. Data that is there already stays.

    Raises ValueError, in one line, if a package is missing or the download fails.
    """
    name, _ = parse_tfds(source)  # all splits are prepared
    try:
        with redirect_stdout(StringIO()):  # the progress bars go to stderr
            import tensorflow_datasets as tfds

            # otherwise registered only if the optional packages of all data sets are installed
            import tensorflow_datasets.question_answering
            import tensorflow_datasets.text

            builder = tfds.builder(name, data_dir=data_dir and str(expanded(data_dir)))
            builder.download_and_prepare(file_format="array_record")
    except Exception as error:  # builders raise errors of any kind
        said = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{SCHEME}{name}: cannot prepare it: {printable(said, 200)}") from None
    return Path(builder.data_path)


def describe_splits(folder: Path) -> str:
    """The splits of a prepared data set, such as "train 9427, validation 3270 examples"."""
    splits = builder_at(folder).info.splits
    return ", ".join(f"{name} {split.num_examples}" for name, split in splits.items()) + " examples"


# ----------------------------------------------------------------------------------------------------------- the folder


def newest(name: str, data_dir: str | None) -> Path:
    """The folder of the newest prepared version: DATA_DIR/NAME[/CONFIG]/VERSION."""
    from tensorflow_datasets.core.constants import DATA_DIR

    folder = expanded(data_dir or DATA_DIR) / name
    configs = [path for path in sorted(folder.glob("*")) if prepared_versions(path)]
    if not prepared_versions(folder) and len(configs) > 1:
        there = ", ".join(f"{SCHEME}{name}/{path.name}" for path in configs)
        raise ValueError(f"{SCHEME}{name}: several configs are prepared in {folder}; choose one of {there}")
    found = prepared_versions(folder) or [version for path in configs for version in prepared_versions(path)]
    if not found:
        raise NotPrepared(
            f"{SCHEME}{name} is not prepared in {folder}; prepare it first: "
            f"`para-jax prepare {SCHEME}{name}{f' --data-dir {shlex.quote(data_dir)}' if data_dir else ''}`"
        )
    if (held := builder_at(found[-1]).info.file_format.value) != "array_record":
        raise ValueError(
            f"{SCHEME}{name}: {found[-1]} holds {held} files, but only array_record can be read without TensorFlow. "
            f"Run `para-jax prepare {SCHEME}{name} --data-dir DIR` with another folder, and set data.data_dir to it"
        )
    return found[-1]


def prepared_versions(folder: Path) -> list[Path]:
    """The folders of the prepared versions, newest last."""
    found = [path.parent for path in folder.glob("*/features.json") if re.fullmatch(r"\d+\.\d+\.\d+", path.parent.name)]
    return sorted(found, key=lambda path: [int(part) for part in path.name.split(".")])


def builder_at(folder: Path) -> Any:
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(str(folder))
