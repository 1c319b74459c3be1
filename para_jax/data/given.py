"""Rows that a program gives to `train`: lists of dicts, a DataFrame, a datasets.Dataset, or a dict of these by split.

pandas and datasets are not imported; their objects are recognised by their methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from ..config import DataSection
from ..io.checks import one_of, shorten
from ..io.messages import warn
from ..io.untrusted import safe_names
from .row_files import batch_rows, dataset_rows, require_distinct, without_nulls
from .split import Split, plain

#: data.train of a run whose data came from Python. A tenant's is <python>/NAME.
PYTHON = "<python>"
SPLITS = ("train", "validation", "test")


def is_given(source: str | None) -> bool:
    return source is not None and source.startswith(PYTHON)


def described(source: str | None) -> str:
    """data.train or data.tenants for a report."""
    return "from Python" if is_given(source) else str(source)


def with_data(section: DataSection, data: Any) -> DataSection:
    """The section of a run on this data. ValueError for data of another kind, and where the section names data of the
    same split."""
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
        section, tenants=PYTHON, given={name: splits_of(f'data["{name}"]', rows) for name, rows in data.items()}
    )


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
    """The splits of one run's data. Rows alone are training data."""
    if not isinstance(data, Mapping):
        return {"train": rows_split(label, "train", data)}
    others = [str(key) for key in data if key not in SPLITS]
    if "train" not in data or others:
        rename = f"Rename {safe_names(others)}" if "train" in data else "Give rows as a list of dicts, one for each row"
        raise ValueError(
            f"{label} has the keys {safe_names(map(str, data)) or 'none'}; a dict of splits has train, and perhaps "
            f"validation and test. {rename}"
        )
    splits = [rows_split(f'{label}["{name}"]', name, data[name]) for name in SPLITS if data.get(name) is not None]
    hidden = [one for one in splits if one.name != "train" and is_dataset(data[one.name]) and one.hides_labels()]
    for split in hidden:
        warn(f"{split.label}: its labels are hidden (-1), so it is left out")
    return {split.name: split for split in splits if split not in hidden}


def rows_split(label: str, name: str, data: Any) -> Split:
    return Split(label, name, f"{label} row ", partial(numbered, f"{label} row", rows_of(label, data)))


def numbered(place: str, rows: Callable[[], Iterable[Any]]) -> Iterator[tuple[int, Mapping]]:
    for index, row in enumerate(rows()):
        if not isinstance(row, Mapping):
            raise ValueError(f'{place} {index} is a {type(row).__name__}; write a dict, such as {{"prompt": ..., ...}}')
        yield index, row


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
        require_distinct(list(data.columns))
        return partial(pandas_rows, data)
    if isinstance(data, list | tuple):
        return partial(iter, data)
    kinds = ("a list of dicts", "a DataFrame", "a datasets.Dataset", "a dict of these by split")
    name = "an iterator, which can be read once" if hasattr(data, "__next__") else type(data).__name__
    raise ValueError(f"{label} must be {one_of(kinds)}; got {name}")


def pandas_rows(frame: Any) -> Iterator[dict]:
    """The rows of a pandas DataFrame, without the nulls that Arrow fills in. Cells that are arrays came from Arrow."""
    arrow = {name for name, kind in frame.dtypes.items() if "[pyarrow]" in str(kind)}
    for row in frame.to_dict("records"):
        yield {k: without_nulls(plain(x)) if k in arrow or hasattr(x, "tolist") else x for k, x in row.items()}


def is_dataset(data: Any) -> bool:
    """Whether this is a datasets.Dataset, or another sequence of rows from that library."""
    return hasattr(data, "with_format") and hasattr(data, "__len__")
