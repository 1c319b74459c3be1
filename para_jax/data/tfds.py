"""tfds: sources: data sets of tensorflow_datasets, prepared once in its folder and then read without TensorFlow.

A source is tfds:NAME[/CONFIG][:SPLIT]. SPLIT follows tensorflow_datasets' syntax: tfds:glue/sst2:train[:90%].
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..config import TFDS as SCHEME
from ..config import expanded, printable, shorten
from ..config import is_tfds as is_tfds
from .plain_values import plain_value

CATALOG = "https://www.tensorflow.org/datasets/catalog"
READ_AT_ONCE = 1000  # examples


class NotPrepared(ValueError):
    """The data set is not on disk. The message names the folder, and the command that prepares the data set."""


class TfdsSplit(NamedTuple):
    """One split of a data set on disk."""

    label: str
    """the source with its split: tfds:NAME/CONFIG:SPLIT"""
    split: str
    folder: Path
    """the folder of the newest version"""

    def files(self) -> list[Path]:
        """The files of the data set, those of its other splits included."""
        return sorted(file for file in self.folder.iterdir() if file.is_file())

    def rows(self) -> Iterator[tuple[str, dict]]:
        """Each example's place, "tfds:NAME:SPLIT[index]", and its fields: text, numbers, lists and dicts of them."""
        builder = builder_at(self.folder)
        source, short = builder.as_data_source(split=self.split), float32_fields(builder)
        for start in range(0, len(source), READ_AT_ONCE):
            indices = range(len(source))[start : start + READ_AT_ONCE]
            for index, example in zip(indices, source.__getitems__(indices), strict=True):
                place = f"{self.label}[{index}]"
                fields = example | {name: np.float32(example[name]) for name in short}
                yield place, {name: plain_value(value) for name, value in fields.items()}

    def has_labels(self) -> bool:
        """Whether the labels are known: -1 means a hidden label."""
        source = builder_at(self.folder).as_data_source(split=self.split)
        return not len(source) or all(source[0][name] != -1 for name in self.class_labels())

    def class_labels(self) -> dict[str, list[str]]:
        """The names of the classes of each ClassLabel field."""
        from tensorflow_datasets.core.features import ClassLabel

        features = builder_at(self.folder).info.features.items()
        return {name: list(feature.names) for name, feature in features if isinstance(feature, ClassLabel)}


def parse_tfds(source: str) -> tuple[str, str | None]:
    """NAME[/CONFIG] and the split of a source; None if it names no split."""
    found = re.fullmatch(SCHEME + r"(\w+(?:/[\w.+-]+)*)(?::(.+))?", source)
    if not found or ".." in found[1].split("/"):
        raise ValueError(f"{shorten(source)} is not a data set; write tfds:NAME, tfds:NAME/CONFIG or tfds:NAME:SPLIT")
    return found[1], found[2]


def require_forward(source: str, split: str) -> None:
    """Raises ValueError for a part that ends where it begins or before, such as train[50%:45%]. Both libraries read
    some of these as all the rows from there on."""
    for start, _, end in re.findall(r"\[([\d_]+)(%?):([\d_]+)\2\]", split):
        if int(start) >= int(end):
            raise ValueError(f"{source}: {split} ends at {end}, which is not after {start}, so it has no rows")


def find_split(source: str, split: str, data_dir: str | None) -> TfdsSplit:
    """The prepared data of a tfds: source. Nothing is downloaded.

    Args:
        split: the split to read if the source names none. "test" becomes "validation" if there is no test split, or
            its labels are hidden, as in GLUE and SuperGLUE.
    """
    name, named = parse_tfds(source)
    folder = newest(name, data_dir)
    if named is None:
        options = (split, "validation") if split == "test" else (split,)
        found = (split_at(name, folder, option) for option in options)
        named = next((one.split for one in found if one and one.has_labels()), split)
    require_forward(source, named)
    try:
        builder_at(folder).as_data_source(split=named)
    except ValueError:
        there = ", ".join(builder_at(folder).info.splits)
        raise ValueError(
            f"{SCHEME}{name}: no split {shorten(named)}, or no rows in it; choose one of {there}, or a part of one, "
            "such as train[:90%]"
        ) from None
    return TfdsSplit(f"{SCHEME}{name}:{named}", named, folder)


def sibling_split(source: str, split: str, data_dir: str | None) -> TfdsSplit | None:
    """The validation or test split next to the training data, a tfds: source. None if the source names its split, or
    the data set has no such split."""
    name, named = parse_tfds(source)
    folder = newest(name, data_dir)
    return split_at(name, folder, split) if named is None else None


def split_at(name: str, folder: Path, split: str) -> TfdsSplit | None:
    there = split in builder_at(folder).info.splits
    return TfdsSplit(f"{SCHEME}{name}:{split}", split, folder) if there else None


def prepare(source: str, data_dir: str | None = None) -> Path:
    """Downloads a data set, writes it as array_record, and returns its folder. Data that is there already stays.

    Raises ValueError, in one line, if a package is missing, the download fails, or the data is there as TFRecord.
    """
    name, split = parse_tfds(source)
    if split is not None:
        raise ValueError(f"{source} names a split, but data sets are prepared with all splits; write {SCHEME}{name}")
    if "://" in (data_dir or ""):
        raise ValueError(f"--data-dir {data_dir} is not a folder on this host; tfds data can't be in a bucket")
    try:
        with redirect_stdout(StringIO()):  # the progress bars go to stderr
            import tensorflow_datasets as tfds

            # otherwise registered only if the optional packages of all data sets are installed
            import tensorflow_datasets.question_answering
            import tensorflow_datasets.text

            builder = tfds.builder(name, data_dir=data_dir and str(expanded(data_dir)))
            builder.download_and_prepare(file_format="array_record")
    except Exception as error:  # builders raise errors of any kind
        raise ValueError(f"{SCHEME}{name}: {prepare_failure(error)}") from None
    folder = Path(builder.data_path)
    require_array_record(name, folder)
    return folder


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
    require_array_record(name, found[-1])
    return found[-1]


def prepared_versions(folder: Path) -> list[Path]:
    """The folders of the prepared versions, newest last."""
    found = [path.parent for path in folder.glob("*/features.json") if re.fullmatch(r"\d+\.\d+\.\d+", path.parent.name)]
    return sorted(found, key=lambda path: [int(part) for part in path.name.split(".")])


def require_array_record(name: str, folder: Path) -> None:
    held = builder_at(folder).info.file_format.value
    if held != "array_record":
        raise ValueError(
            f"{SCHEME}{name}: {folder} holds {held} files, but only array_record can be read without TensorFlow. "
            f"Run `para-jax prepare {SCHEME}{name} --data-dir DIR` with another folder, and set data.data_dir to it"
        )


def float32_fields(builder: Any) -> list[str]:
    """The fields that hold one float, which the files keep as float32, also if it is a float64, and a row gives as a
    Python float: 0.1 is then 0.10000000149011612."""
    features = builder.info.features.items()
    return [name for name, one in features if one.shape == () and np.issubdtype(one.np_dtype, np.floating)]


def builder_at(folder: Path) -> Any:
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(str(folder))


def prepare_failure(error: BaseException) -> str:
    """One line on why `prepare` failed."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ImportError) and cause.name:
            package = cause.name.partition(".")[0]
            return f"preparing it needs the package {package}: pip install {package}"
        cause = cause.__cause__
    line = printable((str(error).strip().splitlines() or [type(error).__name__])[0])
    if "not found" in line:  # the rest of the line lists hundreds of names
        line = f"{line.partition('. ')[0].rstrip('.')}; {CATALOG} lists the data sets"
    return f"cannot prepare it: {line}"
