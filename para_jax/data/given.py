"""Rows that a program gives to `train`: lists of dicts, a DataFrame, a datasets.Dataset, or a dict of these by split.

pandas and datasets are not imported; their objects are recognised by their methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from ..config import DataSection
from .hf import dataset_rows
from .rows import Split, batch_rows, plain, warn_of_hidden, without_nulls

#: data.train of a run whose data came from Python. A tenant's is <python>/NAME.
PYTHON = "<python>"
SPLITS = ("train", "validation", "test")


def is_given(source: str | None) -> bool:
    return source is not None and source.startswith(PYTHON)


def described(source: str | None) -> str:
    """data.train or data.tenants for a report."""
    return "from Python" if is_given(source) else str(source)


def with_data(section: DataSection, data: Any) -> DataSection:
    """The section of a run on this data, which takes the place of what the section names for the same splits."""
    given = splits_of("data", data)
    return replace(section, **dict.fromkeys(given) | {"train": PYTHON, "given": given})


def with_tenants(section: DataSection, data: Any) -> DataSection:
    """The section of a run of many tenants on this data, by tenant."""
    given = {str(name): splits_of(f'data["{name}"]', rows) for name, rows in data.items()}
    return replace(section, tenants=PYTHON, given=given)


def given_split(section: DataSection, split: str) -> Split | None:
    """A split that a program gave; None if it gave none. ValueError where the run's data came from a program, and is
    not here now."""
    if section.given is None:
        raise ValueError(
            f"data.{split}: the data of this run came from Python; name a file, data.{split}=FILE, or give it again: "
            f'train(config, data=...), or evaluate(model, adapters, {{"{split}": rows}}, ...)'
        )
    return section.given.get(split)


def splits_of(label: str, data: Any) -> dict[str, Split]:
    """The splits of one run's data. Rows alone are training data. Splits with hidden labels are left out."""
    if not isinstance(data, Mapping):
        return {"train": rows_split(label, data)}
    if "train" not in data or not set(data) <= set(SPLITS):
        raise ValueError(
            f"{label} has the keys {', '.join(map(str, data)) or 'none'}; give a list of dicts, one for each row, or a "
            "dict of train and perhaps validation and test"
        )
    found = {}
    for name in SPLITS:
        if data.get(name) is not None:
            split = rows_split(f'{label}["{name}"]', data[name])
            if name != "train" and is_dataset(data[name]) and split.hides_labels():
                warn_of_hidden(split.label)
            else:
                found[name] = split
    return found


def rows_split(label: str, data: Any) -> Split:
    rows = rows_of(label, data)
    return Split(label, f"{label} row ", lambda: enumerate(rows()))


def rows_of(label: str, data: Any) -> Callable[[], Iterable[Any]]:
    """Gives the rows of a list, a DataFrame (pandas or polars), a datasets.Dataset or an Arrow table."""
    if is_dataset(data):
        if data.format["type"] == "custom":
            raise ValueError(f"{label} has a transform, which would not be applied; use dataset.map instead")
        return partial(dataset_rows, data)
    if hasattr(data, "to_pylist") and hasattr(data, "schema"):
        return partial(batch_rows, data)
    if hasattr(data, "to_dicts"):
        return lambda: without_nulls(data.to_dicts())
    if hasattr(data, "to_dict") and hasattr(data, "columns"):
        return lambda: (without_nulls(plain(row)) for row in data.to_dict("records"))
    if isinstance(data, list | tuple):
        return partial(iter, data)
    kinds = "a list of dicts, a DataFrame, a datasets.Dataset or a dict of these by split"
    raise ValueError(f"{label} must be {kinds}; got {type(data).__name__}")


def is_dataset(data: Any) -> bool:
    """Whether this is a datasets.Dataset, or another sequence of rows from that library."""
    return hasattr(data, "with_format") and hasattr(data, "__len__")
