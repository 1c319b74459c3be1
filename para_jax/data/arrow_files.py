"""Parquet files, and folders that `save_to_disk` of Hugging Face datasets wrote, as rows.

Both are read by pyarrow alone: no pickle, and no code of a data set.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..config import printable, shorten, without_repeats
from ..storage.bucket import BucketPath, Place
from ..untrusted import json_mapping, read_json, require_unicode
from .plain_values import plain_value

#: The first bytes of a Parquet file.
MAGIC = b"PAR1"
#: The file in which `save_to_disk` lists the splits.
SPLITS = "dataset_dict.json"
READ_AT_ONCE = 1000  # rows
#: Lists of images, as Hugging Face datasets stores them.
MEDIA = re.compile(r"(large_)?list<\w+: struct<bytes: (large_)?binary, path: (large_)?string>>")
#: The type of a column of JSON texts. Hugging Face datasets stores values of mixed types so.
JSON = "extension<arrow.json>"
#: The types of float32 columns, as Arrow, datasets, and pandas and polars write them.
FLOAT32 = re.compile(r"float(\[pyarrow\])?|value\('float32'\)|float32")


def parquet_rows(path: Place) -> Iterator[tuple[str, dict]]:
    """Each row's place, "file[index]", and its columns. A null counts as a missing column."""
    arrow = pyarrow_for(path)
    from pyarrow.parquet import ParquetFile

    with path.open("rb") as stream:
        try:
            file = ParquetFile(stream)
            names = text_columns(path, file.schema_arrow)
            yield from rows_of_batches(str(path), file.iter_batches(READ_AT_ONCE, columns=names))
        except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a Parquet file that can be read: {printable(str(error), 300)}") from None


def parquet_labels(path: Place) -> dict[str, list[str]]:
    """The names of the classes of each ClassLabel column, in a file that Hugging Face datasets wrote."""
    arrow = pyarrow_for(path)
    from pyarrow.parquet import read_schema

    try:
        with path.open("rb") as stream:
            described = json_mapping((read_schema(stream).metadata or {}).get(b"huggingface", b"{}"))
    except (arrow.ArrowException, OSError, ValueError):
        return {}  # reading the rows tells what is wrong with the file
    info = described.get("info")
    return described_labels(info) if isinstance(info, dict) else {}


class SavedSplit(NamedTuple):
    """A data set in a folder that `Dataset.save_to_disk` wrote."""

    label: str
    split: str
    folder: Path

    def files(self) -> list[Path]:
        """The Arrow files, in the order of the rows."""
        state = self.folder / "state.json"
        named = read_json(state).get("_data_files")
        names = [one.get("filename") for one in named if isinstance(one, dict)] if isinstance(named, list) else []
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not (self.folder / name).is_file():
                raise ValueError(f"{state}: {shorten(name)} is not a file of the folder; save the data set again")
        return [self.folder / str(name) for name in names]

    def rows(self) -> Iterator[tuple[str, dict]]:
        """Each row's place, "folder[index]", and its columns. A null counts as a missing column."""
        arrow = pyarrow_for(self.label)
        try:
            yield from rows_of_batches(self.label, self.batches(arrow))
        except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.label}: damaged: {printable(str(error), 300)}") from None

    def has_labels(self) -> bool:
        """Whether the labels are known: -1 means a hidden label."""
        _, first = next(self.rows(), ("", {}))
        return all(first.get(name) != -1 for name in self.class_labels())

    def class_labels(self) -> dict[str, list[str]]:
        """The names of the classes of each ClassLabel column."""
        file = self.folder / "dataset_info.json"
        return described_labels(read_json(file)) if file.is_file() else {}

    def batches(self, arrow: Any) -> Iterator[Any]:
        for file in self.files():
            with arrow.memory_map(str(file)) as stream, arrow.ipc.open_stream(stream) as reader:
                names = text_columns(self.label, reader.schema)
                for batch in reader:
                    for start in range(0, batch.num_rows, READ_AT_ONCE):
                        yield batch.select(names).slice(start, READ_AT_ONCE)


def is_saved(folder: Place) -> bool:
    """Whether `save_to_disk` wrote the folder: a data set, or one with splits."""
    if isinstance(folder, BucketPath) or not folder.is_dir():
        return False
    return (folder / SPLITS).is_file() or (folder / "state.json").is_file()


def splits_of_saved(folder: Path) -> list[str]:
    """The splits of a folder that `save_to_disk` wrote; none where it is one data set."""
    if not (folder / SPLITS).is_file():
        return []
    return sorted(file.parent.name for file in folder.glob("*/state.json"))


def saved_split(folder: Path, split: str) -> SavedSplit | None:
    """A split of a folder that `save_to_disk` wrote. One data set is the split that it is named for."""
    own = folder / split if (folder / SPLITS).is_file() else folder
    return SavedSplit(str(own), split, own) if (own / "state.json").is_file() else None


def saved_sibling(folder: Path, split: str) -> SavedSplit | None:
    """The validation or test split next to the training data; None if there is none."""
    return saved_split(folder, split) if split in splits_of_saved(folder) else None


def pyarrow_for(what: object) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        raise ValueError(f"{what}: reading it needs the package pyarrow: pip install 'para_jax[hf]'") from None
    return pyarrow


def text_columns(label: object, schema: Any) -> list[str]:
    """The columns without images, audio and video, which are stored as structs of bytes. Raises ValueError for a name
    that is there twice, because a row has one value for it."""
    require_distinct(label, schema.names)
    return [field.name for field in schema if not is_media(str(field.type))]


def require_distinct(label: object, names: list) -> None:
    if len(set(names)) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{label}: the column {shorten(repeated)} is there twice; rename one of them")


def is_media(kind: str) -> bool:
    return (kind.startswith("struct") and "binary" in kind) or MEDIA.fullmatch(kind) is not None


def without_media(dataset: Any) -> Any:
    """A datasets.Dataset without images, audio and video, which it would decode."""
    media = [name for name, feature in (dataset.features or {}).items() if decodes_media(feature)]
    return dataset.remove_columns(media) if media else dataset


def hides_labels(data: Any) -> bool:
    """Whether a datasets.Dataset has -1 as a label, as the test data of GLUE does: a hidden one."""
    whole = hasattr(data, "with_format") and hasattr(data, "__len__")
    labels = list(class_labels(data)) if whole else []
    first = data.select_columns(labels).with_format(None)[:1] if labels else {}
    return any(-1 in first[name] for name in labels)


def described_labels(info: dict) -> dict[str, list[str]]:
    """The names of the classes of each ClassLabel column, from the description that `datasets` writes of a data set."""
    features = info.get("features")
    kinds = features.items() if isinstance(features, dict) else ()
    labels = [(name, kind) for name, kind in kinds if isinstance(kind, dict) and kind.get("_type") == "ClassLabel"]
    return {name: kind["names"] if isinstance(kind.get("names"), list) else [] for name, kind in labels}


def class_labels(data: Any) -> dict[str, list[str]]:
    """The names of the classes of each ClassLabel column of a datasets.Dataset; of other data nothing."""
    features = getattr(data, "features", None)
    kinds = features.items() if isinstance(features, dict) else ()
    return {name: list(kind.names or []) for name, kind in kinds if type(kind).__name__ == "ClassLabel"}


def decodes_media(feature: Any) -> bool:
    """Whether a feature of `datasets` is an image or the like, a list of them, or an object that has one."""
    if isinstance(feature, dict):
        return any(map(decodes_media, feature.values()))
    inner = getattr(feature, "feature", None)
    if inner is not None:
        return not isinstance(inner, dict) and decodes_media(inner)
    return hasattr(feature, "decode_example") and type(feature).__name__ != "Json"


def rows_of_batches(label: str, batches: Iterable[Any]) -> Iterator[tuple[str, dict]]:
    index = 0
    for batch in batches:
        in_json = {field.name: field.type for field in batch.schema if JSON in str(field.type)}
        short = float32_columns({field.name: field.type for field in batch.schema})
        try:
            rows = batch.to_pylist()
        except (ValueError, OverflowError, RecursionError, LookupError) as error:  # an unknown year or time zone
            raise ValueError(f"{label}[{index}] or one of the rows after it: {printable(str(error), 200)}") from None
        for row in rows:
            place = f"{label}[{index}]"
            try:
                row |= {name: from_json(name, row[name], kind) for name, kind in in_json.items()}
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{place}: {printable(str(error), 200)}") from None
            yield place, {name: plain_value(value) for name, value in as_written(row, in_json, short).items()}
            index += 1


def as_written(row: dict[str, Any], in_json: Collection[str], short: Collection[str]) -> dict[str, Any]:
    """The row without nulls. Arrow gives every row all columns, and every struct the fields of all structs of its
    column, so a null says that the row has no such field. In a column of JSON, a null inside was written as one.

    Args:
        short: the float32 columns. Their numbers become the shortest that round to them: 0.1, not 0.10000000149011612.
    """
    there = {name: value for name, value in row.items() if value is not None}
    there |= {name: np.float32(there[name]) for name in short if isinstance(there.get(name), float)}
    return {name: value if name in in_json else without_nulls(value) for name, value in there.items()}


def without_nulls(value: Any) -> Any:
    """The value without the fields of its structs that are null."""
    if isinstance(value, dict):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def float32_columns(types: Mapping[str, Any]) -> set[str]:
    """The columns of type float32, of Arrow, datasets, pandas or polars."""
    return {str(name) for name, kind in types.items() if FLOAT32.fullmatch(str(kind).lower())}


def json_columns(dataset: Any) -> set[str]:
    """The columns of a datasets.Dataset that hold JSON."""
    return {name for name, feature in (dataset.features or {}).items() if "Json(" in str(feature)}


def from_json(name: str, value: Any, kind: Any) -> Any:
    """The value of a column of an Arrow type, with each JSON text in it as what it holds."""
    if value is None or JSON not in str(kind):
        return value
    if str(kind) == JSON:
        try:
            found = json.loads(value, object_pairs_hook=without_repeats)
        except ValueError as error:
            raise ValueError(f"{name} is not JSON: {error}") from None
        require_unicode(name, found)
        return found
    if isinstance(value, dict):
        return {part.name: from_json(name, value[part.name], part.type) for part in kind}
    inner = getattr(kind, "value_type", None)  # a map has none
    return [from_json(name, item, inner) for item in value] if isinstance(value, list) and inner else value
