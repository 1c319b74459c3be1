"""A split of a run's data, and a data set of several splits, whatever library reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from itertools import islice
from typing import Any, NamedTuple

from ..io.messages import warn
from ..io.storage.bucket import Place


class Split(NamedTuple):
    """The rows of one split."""

    label: str
    """what errors call it: a file, tfds:NAME:SPLIT, or data["train"]"""
    name: str
    """as its source calls it, such as train or train[:90%]"""
    prefix: str
    """what a row's place begins with, before its number, such as `file:` or `file[`"""
    read: Callable[[], Iterator[tuple[int, Mapping]]]
    """gives each row with its number: the line of a file, or an index from 0"""
    files: Sequence[Place] = ()
    """those that hold the rows"""

    def rows(self) -> Iterator[tuple[str, dict]]:
        """Each row's place and columns. A null or NaN counts as a missing column."""
        for number, row in self.read():
            columns = {str(name): plain(value) for name, value in row.items()}
            yield place_of(self.prefix, number), {name: x for name, x in columns.items() if not is_missing(x)}

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
        if found.hides_labels():
            if split == "validation":
                warn_of_hidden(found.label)
            return None
        return found


@cache  # a run looks for its data several times
def warn_of_hidden(label: str) -> None:
    warn(f"{label}: its labels are hidden (-1), so it is left out")


def place_of(prefix: str, number: int) -> str:
    return f"{prefix}{number}" + "]" * prefix.endswith("[")


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
