"""The rows of data files: JSON by ourselves, and CSV, Parquet and folders that `save_to_disk` wrote by pyarrow."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..io.checks import printable, shorten, without_repeats
from ..io.storage.bucket import BucketPath, Place
from .split import DataSet, Split

#: The delimiter of a table of text. A .csv file without a comma in its header has semicolons.
DELIMITERS = {".csv": ",", ".tsv": "\t"}
#: The endings of a split's file in a folder, such as train.csv. The first that exists is read.
ENDINGS = (".jsonl", ".json", ".ndjson", *DELIMITERS, ".parquet")
#: What others call the validation data. It is not read by these names.
OTHER_NAMES = ("valid", "val", "dev", "eval")
#: The file in which `save_to_disk` lists the splits.
SPLITS = "dataset_dict.json"
#: Columns of a CSV file that hold JSON. An empty cell in these, or in `label`, is a missing value.
JSON_COLUMNS = ("messages", "references")
#: Bytes that are read at once of a CSV file. A row must fit.
CSV_BLOCK = 2**24
READ_AT_ONCE = 1000  # rows


# --------------------------------------------------------------------------------------------------------------- files


def open_file(path: Place, split: str = "train") -> Split:
    """The rows of a data file, by its ending: .csv, .tsv, .parquet, else JSON lines or a JSON array."""
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"{path} {problem}; name a .jsonl, .csv or .parquet file")
    ending = path.suffix.lower()
    if ending in DELIMITERS:
        read = partial(arrow_rows, path, csv_rows)
    elif ending == ".parquet":
        read = partial(arrow_rows, path, parquet_rows)
    else:
        is_array = starts_array(path)
        read = partial(array_rows if is_array else line_rows, path)
        return Split(str(path), split, f"{path}[" if is_array else f"{path}:", read, (path,))
    return Split(str(path), split, f"{path}[", read, (path,))


def split_file(folder: Place, split: str) -> Place | None:
    """The file of a split in a folder, such as train.jsonl or train.csv; None if there is none."""
    files = (folder / f"{split}{ending}" for ending in ENDINGS)
    return next((file for file in files if file.is_file()), None)


def starts_array(path: Place) -> bool:
    with path.open("rb") as file:
        return file.read(512).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def line_rows(path: Place) -> Iterator[tuple[int, dict]]:
    """Each object and its line. Empty lines are skipped."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, json_object(f"{path}:{number}", line)


def json_object(place: str, line: bytes) -> dict:
    try:
        row = json.loads(str(line, "utf-8-sig"), object_pairs_hook=without_repeats)
    except ValueError as error:
        advice = "write a JSON object per line, in UTF-8; a table with a header line must be named .csv or .tsv"
        raise ValueError(f"{place}: not JSON: {json_problem(error)}\n{advice}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{place}: the line is a {type(row).__name__}, not a JSON object")
    return row


def json_problem(error: Exception) -> str:
    """What is wrong in a line that is not JSON, and where in it: the decoder's own "line 1" is not the file's."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at character {error.pos + 1}"
    return str(error)[:100]


def array_rows(path: Place) -> Iterator[tuple[int, dict]]:
    """The objects of a JSON array, which is read at once."""
    with path.open("rb") as file:
        try:
            rows = json.loads(str(file.read(), "utf-8-sig"), object_pairs_hook=without_repeats)
        except ValueError as error:
            raise ValueError(f"{path}: not a JSON array: {error}") from None
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{path}[{index}]: the item is a {type(row).__name__}, not a JSON object")
        yield index, row


# --------------------------------------------------------------------------------------------------------------- arrow


def arrow_rows(path: Any, rows: Callable[[Any], Iterator[dict]]) -> Iterator[tuple[int, dict]]:
    """The rows of a file or folder that pyarrow reads. Its errors name the file."""
    import pyarrow

    try:
        yield from enumerate(rows(path))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path}: {printable(str(error), 300)}") from None


def csv_rows(path: Place) -> Iterator[dict]:
    """The rows of a CSV file. Its cells are texts, except those of `messages` and `references`, which hold JSON."""
    import pyarrow
    from pyarrow import csv

    with path.open("rb") as stream:
        header = stream.readline()
    delimiter = DELIMITERS[path.suffix.lower()]
    delimiter = ";" if delimiter == "," and b"," not in header else delimiter
    parse, read = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True), csv.ReadOptions(block_size=CSV_BLOCK)
    with path.open("rb") as stream:
        names = csv.open_csv(stream, read, parse).schema.names
    texts = csv.ConvertOptions(column_types=dict.fromkeys(names, pyarrow.string()))
    with path.open("rb") as stream:
        for batch in csv.open_csv(stream, read, parse, texts):
            yield from map(with_json, batch_rows(batch))


def with_json(cells: dict[str, str]) -> dict:
    empty = [name for name in (*JSON_COLUMNS, "label") if not cells.get(name, "filled").strip()]
    row: dict[str, Any] = {name: cell for name, cell in cells.items() if name not in empty}
    return row | {name: json.loads(row[name]) for name in JSON_COLUMNS if name in row}


def parquet_rows(path: Place) -> Iterator[dict]:
    from pyarrow.parquet import ParquetFile

    with path.open("rb") as stream:
        for batch in ParquetFile(stream).iter_batches(READ_AT_ONCE):
            yield from batch_rows(batch)


def saved_rows(folder: Path) -> Iterator[dict]:
    import pyarrow
    import pyarrow.ipc

    for file in saved_files(folder):
        with pyarrow.memory_map(str(file)) as stream:
            for batch in pyarrow.ipc.open_stream(stream):
                yield from batch_rows(batch)


def dataset_rows(dataset: Any) -> Iterator[dict]:
    """The rows of a datasets.Dataset. Images and the like stay as they are stored."""
    for table in dataset.with_format("arrow").iter(READ_AT_ONCE):
        yield from batch_rows(table)


def batch_rows(batch: Any) -> list[dict]:
    """The rows of a record batch or table, as they were before Arrow gave every object all fields of its column."""
    kinds = {field.name: field.type for field in batch.schema if "arrow.json" in str(field.type)}
    require_distinct(batch.schema.names)
    rows = batch.to_pylist()
    for row in rows if kinds else ():
        row |= {name: decoded(row[name], kind) for name, kind in kinds.items()}
    return without_nulls(rows)


def require_distinct(names: list[str]) -> None:
    """Raises ValueError for two columns of one name. Those without a name are not read."""
    if repeated := next((name for name in names if name and names.count(name) > 1), None):
        raise ValueError(f"the column {shorten(repeated)} is there twice; rename one of them")


def decoded(value: Any, kind: Any) -> Any:
    """The value of a column of an Arrow type, with each JSON text in it as what it holds. Hugging Face datasets stores
    values of mixed types so."""
    if value is None or "arrow.json" not in str(kind):
        return value
    if isinstance(value, dict):
        return {field.name: decoded(value[field.name], field.type) for field in kind}
    return json.loads(value) if isinstance(value, str) else [decoded(item, kind.value_type) for item in value]


def without_nulls(value: Any) -> Any:
    """The value without the fields of its objects that are null. A chat template would write them."""
    if isinstance(value, dict):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


# --------------------------------------------------------------------------------------------------------- save_to_disk


def is_saved(folder: Place) -> bool:
    """Whether `save_to_disk` wrote the folder: a data set, or one with splits."""
    if isinstance(folder, BucketPath) or not folder.is_dir():
        return False
    return (folder / SPLITS).is_file() or (folder / "state.json").is_file()


def splits_of_saved(folder: Path) -> list[str]:
    """The splits of a folder that `save_to_disk` wrote; none where it is one data set."""
    return sorted(file.parent.name for file in folder.glob("*/state.json")) if (folder / SPLITS).is_file() else []


def saved_data_set(folder: Path, named: str | None = None) -> DataSet:
    """A folder that `save_to_disk` wrote."""
    return DataSet(named, splits_of_saved(folder), partial(open_saved, folder))


def open_saved(folder: Path, split: str) -> Split:
    """A split of a folder that `save_to_disk` wrote. A data set without splits is the one that it is named for."""
    own = folder / split if (folder / SPLITS).is_file() else folder
    if not (own / "state.json").is_file() or "[" in split:
        there = printable(", ".join(splits_of_saved(folder)), 200) or "none"
        raise ValueError(f"{folder}: no split {shorten(split)}; it has {there}; choose one with hf:{folder}::SPLIT")
    return Split(str(own), split, f"{own}[", partial(arrow_rows, own, saved_rows), saved_files(own))


def saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a split, in the order of the rows."""
    return [folder / file["filename"] for file in json.loads((folder / "state.json").read_bytes())["_data_files"]]
