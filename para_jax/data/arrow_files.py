"""Parquet files, and folders that `save_to_disk` of Hugging Face datasets wrote, as rows.

Both are read by pyarrow alone: no pickle, and no code of a data set.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..config import printable, shorten
from ..storage.bucket import BucketPath, Place
from ..untrusted import read_json
from .tfds import plain

#: The first bytes of a Parquet file.
MAGIC = b"PAR1"
READ_AT_ONCE = 1000  # rows


def parquet_rows(path: Place) -> Iterator[tuple[str, dict]]:
    """Each row's place, "file[index]", and its columns. A null counts as a missing column."""
    arrow = pyarrow_for(path)
    from pyarrow.parquet import ParquetFile

    with path.open("rb") as stream:
        try:
            file = ParquetFile(stream)
            names = text_columns(file.schema_arrow)
            yield from rows_of(str(path), file.iter_batches(READ_AT_ONCE, columns=names))
        except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a Parquet file that can be read: {printable(str(error), 300)}") from None


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
            yield from rows_of(self.label, self.batches(arrow))
        except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.label}: damaged: {printable(str(error), 300)}") from None

    def has_labels(self) -> bool:
        """Whether the labels are known: -1 means a hidden label."""
        file = self.folder / "dataset_info.json"
        features = read_json(file).get("features") if file.is_file() else None
        kinds = features.items() if isinstance(features, dict) else ()
        labels = [name for name, kind in kinds if isinstance(kind, dict) and kind.get("_type") == "ClassLabel"]
        _, first = next(self.rows(), ("", {}))
        return all(first.get(name) != -1 for name in labels)

    def batches(self, arrow: Any) -> Iterator[Any]:
        for file in self.files():
            with arrow.memory_map(str(file)) as stream, arrow.ipc.open_stream(stream) as reader:
                names = text_columns(reader.schema)
                for batch in reader:
                    for start in range(0, batch.num_rows, READ_AT_ONCE):
                        yield batch.select(names).slice(start, READ_AT_ONCE)


def is_saved(folder: Place) -> bool:
    """Whether `save_to_disk` wrote the folder: a data set, or one with splits."""
    if isinstance(folder, BucketPath) or not folder.is_dir():
        return False
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def splits_of_saved(folder: Path) -> list[str]:
    """The splits of a folder that `save_to_disk` wrote; none where it is one data set."""
    if not (folder / "dataset_dict.json").is_file():
        return []
    return sorted(file.parent.name for file in folder.glob("*/state.json"))


def saved_split(folder: Path, split: str) -> SavedSplit | None:
    """A split of a folder that `save_to_disk` wrote. One data set is the split that it is named for."""
    own = folder / split if (folder / "dataset_dict.json").is_file() else folder
    return SavedSplit(str(own), split, own) if (own / "state.json").is_file() else None


def saved_sibling(folder: Path, split: str) -> SavedSplit | None:
    """The validation or test split next to the training data. None if there is none with labels."""
    found = saved_split(folder, split) if split in splits_of_saved(folder) else None
    return found if found and found.has_labels() else None


def pyarrow_for(what: object) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        raise ValueError(f"{what}: reading it needs the package pyarrow: pip install 'para_jax[hf]'") from None
    return pyarrow


def text_columns(schema: Any) -> list[str]:
    """The columns without images, audio and video, which are stored as structs of bytes."""
    return [
        field.name for field in schema if not (str(field.type).startswith("struct") and "binary" in str(field.type))
    ]


def rows_of(label: str, batches: Iterator[Any]) -> Iterator[tuple[str, dict]]:
    index = 0
    for batch in batches:
        try:
            rows = batch.to_pylist()
        except (ValueError, OverflowError, RecursionError) as error:  # such as a year that Python does not know
            raise ValueError(f"{label}[{index}] or one of the rows after it: {printable(str(error), 200)}") from None
        for row in rows:
            place = f"{label}[{index}]"
            yield place, {name: plain(value, f"{place}: {name}") for name, value in row.items() if value is not None}
            index += 1
