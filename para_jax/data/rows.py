"""The rows of data: a split, a data set of several splits, and the files that rows are read from. JSON is read by
ourselves, CSV and Parquet by pyarrow."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from itertools import islice
from typing import Any, NamedTuple

from ..io.checks import printable, without_repeats
from ..io.messages import warn
from ..io.storage.bucket import Place

#: The endings of a split's file in a folder, such as train.csv. The first that exists is read.
ENDINGS = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet")
#: Columns of a CSV file that hold JSON. An empty cell in these, or in `label`, is a missing value.
JSON_COLUMNS = ("messages", "references")
#: Bytes that are read at once of a CSV file. A row must fit.
CSV_BLOCK = 2**24
READ_AT_ONCE = 1000  # rows


class Split(NamedTuple):
    """The rows of one split."""

    label: str
    """what errors call it: a file, tfds:NAME:SPLIT, or data["train"]"""
    prefix: str
    """what a row's place begins with, before its number, such as `file:` or `file[`"""
    read: Callable[[], Iterator[tuple[int, Any]]]
    """gives each row with its number: the line of a file, or an index from 0"""

    def rows(self) -> Iterator[tuple[str, dict]]:
        """Each row's place and columns. A null or NaN counts as a missing column."""
        for number, row in self.read():
            place = f"{self.prefix}{number}" + "]" * self.prefix.endswith("[")
            if not isinstance(row, Mapping):
                raise ValueError(f'{place}: the row is a {type(row).__name__}; write an object, {{"prompt": ..., ...}}')
            columns = {str(name): plain(value) for name, value in row.items()}
            yield place, {name: x for name, x in columns.items() if not is_missing(x)}

    def hides_labels(self) -> bool:
        """Whether the labels of the first rows are all -1, as in the test data of GLUE."""
        rows = list(islice(self.rows(), 100))
        return bool(rows) and all(row.get("label") == -1 for _, row in rows)


class DataSet(NamedTuple):
    """A data set in a library's cache or a folder."""

    named: str | None
    """the split that the config names"""
    splits: Sequence[str]
    open: Callable[[str], Split]
    """opens a split, or raises ValueError"""

    def of_field(self, split: str) -> Split:
        """The split that is named, else the one of the config's field. If there is no test split, or its labels are
        hidden as in GLUE, `test` gives the validation split."""
        if self.named is not None:
            return self.open(self.named)
        options = (split, "validation") if split == "test" else (split,)
        there = (self.open(name) for name in options if name in self.splits)
        return next((found for found in there if not found.hides_labels()), None) or self.open(split)

    def sibling(self, split: str) -> Split | None:
        """The validation or test split next to the training data. None if the config names the training split, and if
        the split is missing or its labels are hidden."""
        if self.named is not None or split not in self.splits:
            return None
        found = self.open(split)
        if not found.hides_labels():
            return found
        if split == "validation":
            warn_of_hidden(found.label)
        return None


@cache  # a run looks for its data several times
def warn_of_hidden(label: str) -> None:
    warn(f"{label}: its labels are hidden (-1), so it is left out")


def plain(value: Any) -> Any:
    """A value without the types of NumPy and other libraries, with bytes as text. Bytes that are no text stay."""
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    with suppress(UnicodeDecodeError):
        return value.decode() if isinstance(value, bytes) else value
    return value


def is_missing(value: Any) -> bool:
    """Whether a value is None, NaN, or what pandas has for a missing one."""
    is_nan = isinstance(value, float) and value != value
    return value is None or is_nan or type(value).__name__ in ("NAType", "NaTType")


# --------------------------------------------------------------------------------------------------------------- files


def open_file(path: Place) -> Split:
    """The rows of a data file, by its ending: .csv, .tsv, .parquet, else JSON lines or a JSON array."""
    tables = {".csv": csv_rows, ".tsv": csv_rows, ".parquet": parquet_rows}
    if rows := tables.get(path.suffix.lower()):
        return Split(str(path), f"{path}[", lambda: enumerate(named_rows(path, rows)))
    with path.open("rb") as file:
        is_array = file.read(512).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    if is_array:
        return Split(str(path), f"{path}[", lambda: array_rows(path))
    return Split(str(path), f"{path}:", lambda: line_rows(path))


def split_file(folder: Place, split: str) -> Place | None:
    """The file of a split in a folder, such as train.jsonl or train.csv; None if there is none."""
    files = (folder / f"{split}{ending}" for ending in ENDINGS)
    return next((file for file in files if file.is_file()), None)


def line_rows(path: Place) -> Iterator[tuple[int, Any]]:
    """Each object and its line. Empty lines are skipped."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, json_value(f"{path}:{number}", line)


def array_rows(path: Place) -> Iterator[tuple[int, Any]]:
    """The objects of a JSON array, which is read at once."""
    with path.open("rb") as file:
        yield from enumerate(json_value(str(path), file.read()))


def json_value(place: str, text: bytes) -> Any:
    try:
        return json.loads(str(text, "utf-8-sig"), object_pairs_hook=without_repeats)
    except ValueError as error:
        advice = "write a JSON object per line, in UTF-8; a table with a header line must be named .csv or .tsv"
        raise ValueError(f"{place}: not JSON: {json_problem(error)}\n{advice}") from None


def json_problem(error: Exception) -> str:
    """What is wrong in a line that is not JSON, and where in it: the decoder's own "line 1" is not the file's."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at character {error.pos + 1}"
    return str(error)[:100]


def named_rows(path: Place, rows: Callable[[Place], Iterator[dict]]) -> Iterator[dict]:
    """The rows of a file that pyarrow reads. Its errors name the file."""
    import pyarrow

    try:
        yield from rows(path)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path}: {printable(str(error), 300)}") from None


def csv_rows(path: Place) -> Iterator[dict]:
    """The rows of a CSV file. Its cells are texts, except those of `messages` and `references`, which hold JSON."""
    import pyarrow
    from pyarrow import csv

    with path.open("rb") as stream:
        header = stream.readline()
    delimiter = "\t" if path.suffix.lower() == ".tsv" else "," if b"," in header else ";"
    parse, read = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True), csv.ReadOptions(block_size=CSV_BLOCK)
    with path.open("rb") as stream:
        names = csv.open_csv(stream, read, parse).schema.names
    texts = csv.ConvertOptions(column_types=dict.fromkeys(names, pyarrow.string()))
    with path.open("rb") as stream:
        for batch in csv.open_csv(stream, read, parse, texts):
            yield from map(with_json, batch.to_pylist())


def with_json(cells: dict[str, str]) -> dict:
    empty = [name for name in (*JSON_COLUMNS, "label") if not cells.get(name, "filled").strip()]
    row: dict[str, Any] = {name: cell for name, cell in cells.items() if name not in empty}
    return row | {name: json.loads(row[name]) for name in JSON_COLUMNS if name in row}


def parquet_rows(path: Place) -> Iterator[dict]:
    from pyarrow.parquet import ParquetFile

    with path.open("rb") as stream:
        for batch in ParquetFile(stream).iter_batches(READ_AT_ONCE):
            yield from batch_rows(batch)


def batch_rows(batch: Any) -> list[dict]:
    """The rows of an Arrow record batch or table, as they were before Arrow gave every object all fields of its column
    and Hugging Face's datasets wrote values of mixed types as JSON."""
    kinds = {field.name: field.type for field in batch.schema if "arrow.json" in str(field.type)}
    rows = batch.to_pylist()
    for row in rows if kinds else ():
        row |= {name: decoded(row[name], kind) for name, kind in kinds.items()}
    return without_nulls(rows)


def decoded(value: Any, kind: Any) -> Any:
    """The value of a column of an Arrow type, with each JSON text in it as what it holds."""
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
