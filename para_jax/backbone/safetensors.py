"""The tensors of a Hugging Face folder: model.safetensors, or the shards that its index names. They are read a part at
a time, and headers are checked, for a file may come from anywhere."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
}


class Entry(NamedTuple):
    """Where a tensor lies in a safetensors file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class Safetensors:
    """The tensors of a folder's model.safetensors, or of the shards that its model.safetensors.index.json names."""

    def __init__(self, folder: str | Path):
        self.entries = folder_entries(Path(folder))
        self.shapes = {name: entry.shape for name, entry in self.entries.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None, columns: slice = slice(None)) -> np.ndarray:
        """Rows start...stop of a tensor, or some columns of them, in the dtype in which it is stored; nothing else is
        read from the file."""
        file, dtype, shape, offset = self.entries[name]
        if dtype not in DTYPES:
            raise ValueError(f"{file}: {name} is stored as {dtype}; expected one of {', '.join(DTYPES)}")
        start, stop, _ = slice(start, stop).indices(shape[0])
        width = math.prod(shape[1:])
        left, right, _ = columns.indices(width)
        rows, dtype = max(0, stop - start), DTYPES[dtype]
        offset += start * width * dtype.itemsize
        if right - left == width:
            values = np.fromfile(file, dtype, rows * width, offset=offset)
        else:
            values = read_columns(file, offset, np.empty((rows, right - left), dtype), left, width)
        if values.size != rows * (right - left):
            raise ValueError(f"{file}: truncated in {name}; fetch the file again")
        return values.reshape(rows, *shape[1:]) if right - left == width else values


def read_columns(file: Path, offset: int, values: np.ndarray, left: int, width: int) -> np.ndarray:
    """`values` filled with columns left... of rows that are `width` wide, or its rows that the file has."""
    with file.open("rb", buffering=0) as stream:
        for i, row in enumerate(values.view(np.uint8)):
            stream.seek(offset + (i * width + left) * values.itemsize)
            if stream.readinto(row) != row.nbytes:
                return values[:i]
    return values


def folder_entries(folder: Path) -> dict[str, Entry]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return file_entries(single)
    if index.is_file():
        return sharded_entries(folder, index)
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"{folder}: weights only as a pickle ({some(pickles)}), which could run code and is not read;\n"
            "if you trust it, convert it: transformers.AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)"
        )
    raise ValueError(f"{folder}: no model.safetensors and no model.safetensors.index.json")


def sharded_entries(folder: Path, index: Path) -> dict[str, Entry]:
    found = read_json(index, index.read_bytes())
    shards = found.get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise ValueError(f"{index}: no weight_map from tensor names to file names")
    files = {}
    for shard in sorted(set(shards.values())):
        if Path(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{index}: {shard!r} is not the name of a .safetensors file in the same folder")
        if not (folder / shard).is_file():
            raise ValueError(f"{folder}: the shard {shard} is missing; fetch it again")
        files[shard] = file_entries(folder / shard)
    for name, shard in shards.items():
        if name not in files[shard]:
            raise ValueError(f"{folder / shard}: no tensor {name}, which {index.name} expects there")
    everything = {name: entry for entries in files.values() for name, entry in entries.items()}
    return everything | {name: files[shard][name] for name, shard in shards.items()}


def file_entries(file: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file: 8 bytes with the header's length, a JSON header, the data."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, 100_000_000):
            raise ValueError(f"{file}: truncated, or not a safetensors file ({size} bytes); fetch it again")
        header = read_json(file, stream.read(length))
    header.pop("__metadata__", None)
    return {name: file_entry(file, name, value, 8 + length, size) for name, value in header.items()}


def file_entry(file: Path, name: str, value: Any, data: int, size: int) -> Entry:
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        sound = all(type(n) is int and n >= 0 for n in (*shape, begin, end)) and begin <= end and isinstance(dtype, str)
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{file}: bad header: tensor {name}") from None
    if not sound or (dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[dtype].itemsize):
        raise ValueError(f"{file}: bad header: tensor {name}")
    if data + end > size:
        raise ValueError(f"{file}: truncated: {name} ends at byte {data + end}, the file at {size}; fetch it again")
    return Entry(file, dtype, shape, data + begin)


def read_json(file: Path, text: bytes) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: bad header: not a JSON mapping")
    return value


def some(names: Iterable[str]) -> str:
    names = list(dict.fromkeys(names))
    return ", ".join(names[:5]) + (f" ... ({len(names)} in all)" if len(names) > 5 else "")
