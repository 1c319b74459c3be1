"""The tensors of a Hugging Face folder: model.safetensors, or the shards that its index names. They are read a part at
a time, and headers are checked, for a file may come from anywhere."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ..config import shorten
from ..untrusted import json_mapping, read_json, shown, some

#: The most bytes of a header or an index that are read: some 30,000 tensors.
MAX_HEADER_BYTES = 2**22
MAX_AXES = 8

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
    begin: int
    """in bytes of the file"""
    end: int


class Safetensors:
    """The tensors of a folder's model.safetensors, or of the shards that its model.safetensors.index.json names."""

    def __init__(self, folder: str | Path):
        self.path = Path(folder)
        self.entries = folder_entries(self.path)
        self.shapes = {name: entry.shape for name, entry in self.entries.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None, columns: slice = slice(None)) -> np.ndarray:
        """Rows start...stop of a tensor, or some columns of them, in the dtype in which it is stored; nothing else is
        read from the file."""
        file, dtype, shape, offset, _ = self.entries[name]
        if dtype not in DTYPES:
            raise ValueError(
                f"{file}: {shown(name)} is stored as {shown(dtype, 20)}; expected one of {', '.join(DTYPES)}"
            )
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
            raise ValueError(f"{file}: truncated in {shown(name)}; fetch the file again")
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
    shards = read_json(index, MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise ValueError(f"{index}: no weight_map from tensor names to file names")
    everything: dict[str, Entry] = {}
    for shard in sorted(set(shards.values())):
        if Path(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{index}: {shorten(shard)} is not the name of a .safetensors file in the same folder")
        if not (folder / shard).is_file():
            raise ValueError(f"{folder}: the shard {shown(shard)} is missing; fetch it again")
        entries = file_entries(folder / shard)
        if doubled := everything.keys() & entries.keys():
            others = ", ".join({everything[name].file.name for name in doubled})
            raise ValueError(f"{folder / shard}: {some(sorted(doubled))} is in {others} too; fetch the folder again")
        everything |= entries
    for name, shard in shards.items():
        if name not in everything or everything[name].file.name != shard:
            raise ValueError(f"{folder / shard}: no tensor {shown(name)}, which {index.name} expects there")
    return everything


def file_entries(file: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file: 8 bytes with the header's length, a JSON header, the data. As the safetensors
    library demands, each byte of the data belongs to one tensor."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{file}: truncated, or not a safetensors file ({size} bytes); fetch it again")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{file}: bad header: {length} bytes; a model's has at most {MAX_HEADER_BYTES}")
        text = stream.read(length)
    try:
        header = json_mapping(text)
    except ValueError as error:
        raise ValueError(f"{file}: bad header: {error}") from None
    header.pop("__metadata__", None)
    entries = {name: file_entry(file, name, value, 8 + length) for name, value in header.items()}
    require_side_by_side(file, entries, 8 + length, size)
    return entries


def file_entry(file: Path, name: str, value: Any, data: int) -> Entry:
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        sound = all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end)) and len(shape) <= MAX_AXES
        sound = sound and begin <= end and isinstance(dtype, str)
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound or (dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[dtype].itemsize):
        raise ValueError(f"{file}: bad header: tensor {shown(name)}: {shorten(value, 120)}; fetch the file again")
    return Entry(file, dtype, shape, data + begin, data + end)


def require_side_by_side(file: Path, entries: dict[str, Entry], data: int, size: int) -> None:
    """Raises ValueError unless the tensors follow each other without a gap from the first byte of the data to the
    last. A tensor at another's place would be read as numbers that mean something else."""
    at = data
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.end > size:
            raise ValueError(
                f"{file}: truncated: {shown(name)} ends at byte {shorten(entry.end)}, the file at {size}; "
                "fetch it again"
            )
        if entry.begin != at:
            raise ValueError(
                f"{file}: bad header: tensor {shown(name)} begins at byte {entry.begin}, but the one before it ends at "
                f"{at}; fetch the file again"
            )
        at = entry.end
    if at != size:
        raise ValueError(f"{file}: {size - at} bytes after its last tensor; fetch the file again")
