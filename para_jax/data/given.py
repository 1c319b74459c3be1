"""Rows that a program gives to `train`: lists of dicts, a DataFrame, a datasets.Dataset, or a dict of these by split.

pandas and datasets are not imported; their objects are recognised by their methods.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..config import DataSection, one_of, shorten
from ..messages import warn
from ..untrusted import safe_names
from .arrow_files import (
    as_written,
    float32_columns,
    hides_labels,
    json_columns,
    require_distinct,
    rows_of_batches,
    text_columns,
    without_media,
    without_nulls,
)
from .plain_values import plain_value

#: data.train of a run whose data came from Python. A tenant's is <python>/NAME.
PYTHON = "<python>"
SPLITS = ("train", "validation", "test")
#: What pandas has for a missing value, besides NaN.
MISSING = ("NAType", "NaTType")


class GivenSplit(NamedTuple):
    """One split of the data."""

    label: str
    """as the program wrote it: data["train"]"""
    split: str
    given: Sequence[Any]

    def files(self) -> list[Path]:
        return []

    def rows(self) -> Iterator[tuple[str, dict]]:
        """Each row's place, 'data["train"] row 7' (counted from 0), and its columns. NaN and None are missing."""
        dataset: Any = self.given if hasattr(self.given, "with_format") else None  # of the library datasets
        in_json = None if dataset is None else json_columns(dataset)
        short = set() if dataset is None else float32_columns(dataset.features or {})
        for index, row in enumerate(self.given):
            place = f"{self.label} row {index}"
            if not isinstance(row, Mapping):
                raise ValueError(f'{place} is a {type(row).__name__}; write a dict, such as {{"prompt": ..., ...}}')
            found = row if in_json is None else as_written(dict(row), in_json, short)
            values = {str(name): plain_value(value) for name, value in found.items()}
            if len(values) < len(found):
                raise ValueError(
                    f"{place}: two of its keys are the same text ({safe_names(map(str, found))}); rename one"
                )
            yield place, {name: value for name, value in values.items() if not is_missing(value)}


def is_given(source: str | None) -> bool:
    return source is not None and source.startswith(PYTHON)


def described(source: str | None) -> str:
    """data.train or data.tenants for a report."""
    return "from Python" if is_given(source) else str(source)


def with_data(section: DataSection, data: Any) -> DataSection:
    """The section of a run on this data.

    Raises ValueError for data of another kind, and where the section names data of the same split.
    """
    given = splits_of("data", data)
    named = [split for split in given if not is_given(getattr(section, split) or PYTHON)]
    if named:
        raise ValueError(
            f"data.{named[0]} ({getattr(section, named[0])}) and data= are both given; set data.{named[0]}=null, or "
            "leave data= out"
        )
    return replace(section, train=PYTHON, given=given)


def with_tenants(section: DataSection, data: Any) -> DataSection:
    """The section of a run of many tenants on this data, by tenant."""
    if not is_given(section.tenants or PYTHON):
        raise ValueError(
            f"data.tenants ({section.tenants}) and data= are both given; set data.tenants=null, or leave data= out"
        )
    if not isinstance(data, Mapping) or not data:
        raise ValueError(f"data of many tenants must be a dict, {{name: rows}}; got {type(data).__name__}")
    if wrong := [name for name in data if not isinstance(name, str)]:
        raise ValueError(f"data of many tenants: the name {shorten(wrong[0])} is not a text; give str(name)")
    return replace(
        section, tenants=PYTHON, given={name: splits_of(f'data["{name}"]', one) for name, one in data.items()}
    )


def given_split(section: DataSection, split: str) -> GivenSplit | None:
    """A split that a program gave; None if it gave none.

    Raises ValueError where the run's data came from a program, and is not here now.
    """
    if section.given is None:
        raise ValueError(
            f"data.{split}: the data of this run came from Python; name a file, data.{split}=FILE, or give it again: "
            f"train(config, data=...), or task_of_run(config, {split!r}, tokenizer, data=...) for an evaluation"
        )
    return section.given.get(split)


def splits_of(label: str, data: Any) -> dict[str, GivenSplit]:
    """The splits of one run's data. Rows alone are training data."""
    if not isinstance(data, Mapping):
        return {"train": GivenSplit(label, "train", sequence_of(label, data))}
    others = [str(key) for key in data if key not in SPLITS]
    if "train" not in data or others:
        rename = f"Rename {safe_names(others)}" if "train" in data else "Give rows as a list of dicts, one for each row"
        raise ValueError(
            f"{label} has the keys {safe_names(map(str, data)) or 'none'}; a dict of splits has train, and perhaps "
            f"validation and test. {rename}"
        )
    named = {split: f'{label}["{split}"]' for split in SPLITS if data.get(split) is not None}
    for split in [split for split in named if split != "train" and hides_labels(data[split])]:
        warn_of_hidden(named.pop(split))
    return {split: GivenSplit(own, split, sequence_of(own, data[split])) for split, own in named.items()}


def warn_of_hidden(label: str) -> None:
    warn(f"{label}: its labels are hidden (-1), so it is left out")


def sequence_of(label: str, data: Any) -> Sequence[Any]:
    """The rows of a list, a DataFrame (pandas or polars), a datasets.Dataset or an Arrow table."""
    if hasattr(data, "to_pylist") and hasattr(data, "column_names"):  # an Arrow table, or one batch of it
        texts = data.select(text_columns(label, data.schema))
        return [
            row for _, row in rows_of_batches(label, texts.to_batches() if hasattr(texts, "to_batches") else [texts])
        ]
    for method, arguments in (("to_dicts", ()), ("to_dict", ("records",))):
        if hasattr(data, method) and hasattr(data, "columns"):
            require_distinct(label, list(data.columns))
            short = float32_columns(dict(data.schema if method == "to_dicts" else data.dtypes))
            rows = getattr(data, method)(*arguments)
            arrow = {name for name in data.columns if method == "to_dicts" or "[pyarrow]" in str(data[name].dtype)}
            made = ({str(name): cell(value, name in arrow) for name, value in row.items()} for row in rows)
            return [as_written(row, row.keys(), short) for row in made]
    if hasattr(data, "with_format") and hasattr(data, "__len__"):  # without the arrays of another library
        require_untransformed(label, data)
        return without_media(data).with_format(None)
    if isinstance(data, list | tuple):
        return data
    kinds = ("a list of dicts", "a DataFrame", "a datasets.Dataset", "a dict of these by split")
    name = "an iterator, which can be read once" if hasattr(data, "__next__") else type(data).__name__
    raise ValueError(f"{label} must be {one_of(kinds)}; got {name}")


def require_untransformed(label: str, dataset: Any) -> None:
    """Raises ValueError for a datasets.Dataset with a transform (with_transform, set_transform). It changes rows when
    they are read through the Dataset, and we read the stored rows."""
    if dataset.format["type"] == "custom":
        raise ValueError(
            f"{label} has a transform, which is not applied; write its rows first, with dataset.map instead of "
            "with_transform"
        )


def cell(value: Any, arrow: bool) -> Any:
    """A cell of a DataFrame, without the nulls that Arrow fills into structs.

    Args:
        arrow: the column is Arrow's, as all of polars are. In other columns of pandas, an array is Arrow's and a list
            is the program's own.
    """
    if arrow or isinstance(value, np.ndarray):
        return without_nulls(plain_value(value))
    if isinstance(value, dict):
        return {name: cell(part, arrow) for name, part in value.items()}
    return [cell(part, arrow) for part in value] if isinstance(value, list | tuple) else plain_value(value)


def is_missing(value: Any) -> bool:
    return value is None or type(value).__name__ in MISSING or is_nan(value)


def is_nan(value: Any) -> bool:
    """Whether a value is NaN, which Python and pandas write for a missing number."""
    return isinstance(value, float) and value != value
