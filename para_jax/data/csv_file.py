"""CSV and TSV files as rows of text. The first line names the columns; the files are UTF-8, quoted as in RFC 4180."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from itertools import chain
from typing import BinaryIO

from ..config import printable, shorten, without_repeats
from ..storage.bucket import Place
from ..untrusted import require_unicode, safe_names

DELIMITERS = {".csv": ",", ".tsv": "\t"}
#: The largest row, in bytes. A quote that is never closed would otherwise take the rest of the file into memory.
MAX_ROW = 2**26
MAX_COLUMNS = 10_000
#: Bytes that are read at once of a file with CR line ends.
BLOCK = 2**20
#: Columns that hold JSON where a text is not enough. An empty cell in these, or in `label`, is a missing value.
JSON_COLUMNS = ("messages", "references")


def csv_rows(path: Place, delimiter: str, seen) -> Iterator[tuple[str, dict]]:
    """Each row's place, "file:line", and its columns.

    Args:
        delimiter: where it is a comma, and the header has a semicolon and no comma, the semicolon is used.
        seen: a hash that is updated with the bytes as they are read.
    """
    size = number = 0

    def lines(stream) -> Iterator[str]:
        nonlocal size, number
        for line in csv_lines(stream):
            number, size = number + 1, size + len(line)
            if seen is not None:
                seen.update(line)
            if size > MAX_ROW:
                raise ValueError(f"the row is longer than {MAX_ROW} bytes; is a quote missing?")
            yield str(line, "utf-8-sig" if number == 1 else "utf-8")

    csv.field_size_limit(max(MAX_ROW, csv.field_size_limit()))  # the bound is that of the row
    with path.open("rb") as stream:
        texts, place = lines(stream), f"{path}:1"
        try:
            first = next(texts, "")
            if delimiter == "," and "," not in first and ";" in first:
                delimiter = ";"
            reader = csv.reader(chain([first], texts), delimiter=delimiter, strict=True)
            columns = column_names(next(reader, []))
            while True:
                size, place = 0, f"{path}:{number + 1}"
                cells = next(reader, None)
                if cells is None:
                    return
                if cells:
                    yield place, row_of(columns, cells)
        except UnicodeDecodeError as error:
            raise ValueError(f"{place}: not UTF-8 text ({error.reason}); save the file as CSV UTF-8") from None
        except csv.Error as error:
            raise ValueError(f"{place}: {csv_problem(str(error))}") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: {error}") from None


def csv_lines(stream: BinaryIO) -> Iterator[bytes]:
    """The lines of a file with their ends: LF, CR LF, or CR alone as in Excel's "CSV (Macintosh)". A line of more than
    MAX_ROW bytes is cut to a part that still has more."""
    first = stream.readline(MAX_ROW + 1)
    if not ends_with_cr(first):
        yield first
        yield from iter(lambda: stream.readline(MAX_ROW + 1), b"")
        return
    text, block = b"", first
    while block:
        text, start = text + block, 0
        while end := text.find(b"\r", start) + 1:
            yield text[start:end]
            start = end
        text = text[start:]
        block = stream.read(BLOCK) if len(text) <= MAX_ROW else b""
    if text:
        yield text


def ends_with_cr(text: bytes) -> bool:
    """Whether the header, with which a text begins, ends with CR alone: outside quotes, with no LF after it. CR CR LF,
    which Python may write on Windows, ends with LF."""
    header, end, after = text.partition(b"\r")
    return bool(end) and not after.lstrip(b"\r").startswith(b"\n") and header.count(b'"') % 2 == 0


def csv_problem(said: str) -> str:
    """What is wrong with a row, and what to do."""
    if said.startswith("new-line"):
        return "a line break outside quotes, of another kind than the file's; put quotes around a text with a newline"
    return f"{printable(said)}; put a text that has quotes in quotes, and double each quote in it"


def column_names(cells: list[str]) -> list[str]:
    """The names in the header. Empty ones are left out of the rows: the index that pandas writes, and the columns
    without a name that spreadsheets add at the end."""
    names = [name.strip() for name in cells]
    if not any(names):
        raise ValueError("there is no header; write the names of the columns on the first line")
    if len(names) > MAX_COLUMNS:
        raise ValueError(f"{len(names)} columns; at most {MAX_COLUMNS} are read")
    if repeated := [name for name in names if name and names.count(name) > 1][:1]:
        raise ValueError(f"the column {shorten(repeated[0])} is there twice; rename one of them")
    return names


def row_of(columns: list[str], cells: list[str]) -> dict:
    if len(columns) == 1 and (other := next((sign for sign in "|\t" if sign in columns[0]), None)):
        raise ValueError(f"the header has one column, {shorten(columns[0])}; use , or ; between columns, not {other!r}")
    if len(cells) != len(columns):
        raise ValueError(
            f"{len(cells)} cells, but the header has {len(columns)} ({safe_names(columns)}); put quotes around a text "
            "with a delimiter, a quote or a newline"
        )
    row: dict = {name: cell for name, cell in zip(columns, cells, strict=True) if name}
    for name in (*JSON_COLUMNS, "label"):
        if not row.get(name, "filled").strip():
            del row[name]
    for name in JSON_COLUMNS:
        if row.get(name, "").lstrip().startswith("["):
            try:
                row[name] = json.loads(row[name], object_pairs_hook=without_repeats)
                require_unicode(name, row[name])
            except ValueError as error:
                raise ValueError(f"{name} is not JSON: {printable(str(error))}") from None
    return row
