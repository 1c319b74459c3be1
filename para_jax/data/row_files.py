"""The rows of one data file, each with its place for errors: JSON lines, a JSON array, CSV, TSV or Parquet."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config import without_repeats
from ..storage.bucket import Place
from ..untrusted import require_unicode
from .arrow_files import MAGIC, parquet_rows
from .csv_file import DELIMITERS, csv_rows

#: The longest line of JSON, and the largest JSON array, in bytes. Other files may have any size.
MAX_LINE, MAX_ARRAY = 2**26, 2**28
#: The endings of a split's file in a folder, such as train.csv. The first that exists is read.
ENDINGS = (".jsonl", ".json", *DELIMITERS, ".parquet")
#: The first bytes of files that hold a table in packed form, and what they are.
PACKED = {
    b"\x1f\x8b": "a gzip file", b"PK\x03\x04": "a zip file, as .xlsx is", b"\x28\xb5\x2f\xfd": "a zstd file",
    b"BZh": "a bzip2 file", b"\xfd7zXZ": "an xz file",
}  # fmt: skip
#: How the names of packed files end, which are not read.
PACKED_ENDINGS = (".gz", ".zst", ".bz2", ".xz")
#: What others call the validation data. It is not read by these names.
OTHER_NAMES = ("valid", "val", "dev", "eval")
#: Another ending for JSON lines. No file is found by it.
OTHER_LINES = ".ndjson"


def read_rows(path: Any, seen=None) -> Iterator[tuple[str, dict]]:
    """Each row's place, "file:line" or "file[index]", and its columns. Empty lines are skipped.

    The name says which file is CSV (.csv) or TSV (.tsv). Parquet and JSON are recognised by their content.

    Args:
        seen: a hash that is updated with the bytes as they are read, except those of Parquet.
    """
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"{path} {problem}; name a .jsonl, .csv or .parquet file")
    form = form_of(path)
    if form == "parquet":
        return parquet_rows(path)
    if form in DELIMITERS:
        return csv_rows(path, DELIMITERS[form], seen)
    return array_rows(path, seen) if form == "array" else line_rows(path, seen)


def form_of(path: Place) -> str:
    """What a file holds: parquet, .csv, .tsv, a JSON array or JSON lines ("array", "lines"). Raises ValueError for a
    packed file."""
    with path.open("rb") as stream:
        start = stream.read(512)
    if start.startswith(MAGIC):
        return "parquet"
    if packed := [kind for first, kind in PACKED.items() if start.startswith(first)]:
        raise ValueError(f"{path} is {packed[0]}; unpack it, or save the table as .csv or .jsonl")
    if path.suffix.lower() in DELIMITERS:
        return path.suffix.lower()
    return "array" if start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[") else "lines"


def place_prefix(path: Place) -> str:
    """What a row's place begins with, before its number."""
    return f"{path}[" if form_of(path) in ("parquet", "array") else f"{path}:"


def split_file(folder: Place, split: str) -> Place | None:
    """The file of a split in a folder, such as train.jsonl or train.csv; None if there is none."""
    files = (folder / f"{split}{ending}" for ending in ENDINGS)
    return next((file for file in files if file.is_file()), None)


def misnamed_split(folder: Path, split: str) -> Path | None:
    """The file in a folder that was probably meant as this split, such as validation.jsonl.gz, validation.CSV or
    dev.jsonl; None if there is none, or data of this split."""
    if split_file(folder, split) is not None:
        return None
    names = (split, *OTHER_NAMES) if split == "validation" else (split,)
    endings = (*ENDINGS, OTHER_LINES, *(ending + packed for ending in ENDINGS for packed in PACKED_ENDINGS))
    meant = {f"{name}{ending}" for name in names for ending in endings}
    try:
        found = sorted(name for name in os.listdir(folder) if name.lower() in meant)
    except OSError:  # a folder that may not be listed
        found = []
    return next((folder / name for name in found if (folder / name).is_file()), None)


def line_rows(path: Place, seen) -> Iterator[tuple[str, dict]]:
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
            place = f"{path}:{number}"
            if seen is not None:
                seen.update(line)
            if len(line) > MAX_LINE:
                raise ValueError(f"{place}: the line is longer than {MAX_LINE} bytes; split it")
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                row = json.loads(str(line, "utf-8-sig"), object_pairs_hook=without_repeats)
                require_unicode("a text", row)  # half a surrogate pair is JSON
            except UnicodeDecodeError as error:
                raise ValueError(f"{place}: not JSON: {not_utf8(error)}") from None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{place}: not JSON: {json_problem(error)}{advice(number, line)}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{place}: the line is a {type(row).__name__}, not a JSON object")
            yield place, row


def not_utf8(error: UnicodeDecodeError) -> str:
    return f"it is not UTF-8 text ({error.reason}); save the file as UTF-8"


def json_problem(error: Exception) -> str:
    """What is wrong in a line that is not JSON, and where in it: the decoder's own "line 1" is not the file's."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at character {error.pos + 1}"
    return str(error)[:100]


def advice(number: int, line: bytes) -> str:
    """What to do about a first line that is not JSON: the file may be another kind of table."""
    if number > 1 or line.lstrip().startswith(b"{"):
        return ""
    return "\nthe file must hold a JSON object per line; a table with a header line must be named .csv or .tsv"


def array_rows(path: Place, seen) -> Iterator[tuple[str, dict]]:
    """The objects of a JSON array, which is read at once."""
    with path.open("rb") as file:
        text = file.read(MAX_ARRAY + 1)
    if len(text) > MAX_ARRAY:
        raise ValueError(f"{path}: a JSON array of more than {MAX_ARRAY} bytes; write an object per line instead")
    if seen is not None:
        seen.update(text)
    try:
        rows = json.loads(str(text, "utf-8-sig"), object_pairs_hook=without_repeats)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a JSON array: {not_utf8(error)}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON array: {error}") from None
    for index, row in enumerate(rows):
        place = f"{path}[{index}]"
        try:
            require_unicode("a text", row)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{place}: the item is a {type(row).__name__}, not a JSON object")
        yield place, row
