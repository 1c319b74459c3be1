"""A safetensors file: which tensors it holds, and parts of them as arrays. Files come from anywhere, so the header is
checked before anything else is read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from .config import shorten
from .untrusted import json_mapping, shown

#: The most bytes of a header that are read: some 30,000 tensors.
MAX_HEADER_BYTES = 2**22
MAX_AXES = 8

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
}


class StoredTensor(NamedTuple):
    """A tensor in a safetensors file."""

    file: Path
    name: str
    dtype: str
    """as the format names it"""
    shape: tuple[int, ...]
    begin: int
    """in bytes of the file"""
    end: int

    def read(self, start: int = 0, stop: int | None = None, columns: slice = slice(None)) -> np.ndarray:
        """Rows start...stop, or some columns of them, in the dtype in which they are stored; nothing else is read from
        the file. Raises ValueError, naming file and tensor, for a dtype that is not a float of 16 bits or more."""
        if self.dtype not in DTYPES:
            raise ValueError(
                f"{self.file}: {shown(self.name)} is stored as {shown(self.dtype, 20)}; "
                f"expected one of {', '.join(DTYPES)}"
            )
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        width = math.prod(self.shape[1:])
        left, right, _ = columns.indices(width)
        rows, dtype = max(0, stop - start), DTYPES[self.dtype]
        offset = self.begin + start * width * dtype.itemsize
        if right - left == width:
            values = np.fromfile(self.file, dtype, rows * width, offset=offset)
        else:
            values = read_columns(self.file, offset, np.empty((rows, right - left), dtype), left, width)
        if values.size != rows * (right - left):
            raise ValueError(f"{self.file}: truncated in {shown(self.name)}; fetch the file again")
        return values.reshape(rows, *self.shape[1:]) if right - left == width else values


def stored_tensors(file: Path) -> dict[str, StoredTensor]:
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
    found = {name: stored_tensor(file, name, value, 8 + length) for name, value in header.items()}
    require_side_by_side(file, list(found.values()), 8 + length, size)
    return found


def stored_tensor(file: Path, name: str, value: Any, data: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        sound = all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end)) and len(shape) <= MAX_AXES
        sound = sound and begin <= end and isinstance(dtype, str)
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound or (dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[dtype].itemsize):
        raise ValueError(f"{file}: bad header: tensor {shown(name)}: {shorten(value, 120)}; fetch the file again")
    return StoredTensor(file, name, dtype, shape, data + begin, data + end)


def require_side_by_side(file: Path, tensors: list[StoredTensor], data: int, size: int) -> None:
    """Raises ValueError unless the tensors follow each other without a gap from the first byte of the data to the
    last. A tensor at another's place would be read as numbers that mean something else."""
    at = data
    for tensor in sorted(tensors, key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.end > size:
            raise ValueError(
                f"{file}: truncated, or not a safetensors file: {shown(tensor.name)} ends at byte {tensor.end}, the "
                f"file at {size}; fetch it again"
            )
        if tensor.begin != at:
            raise ValueError(
                f"{file}: bad header: tensor {shown(tensor.name)} begins at byte {tensor.begin}, but the one before it "
                f"ends at {at}; fetch the file again"
            )
        at = tensor.end
    if at != size:
        raise ValueError(f"{file}: {size - at} bytes after its last tensor; fetch the file again")


def read_columns(file: Path, offset: int, values: np.ndarray, left: int, width: int) -> np.ndarray:
    """`values` filled with columns left... of rows that are `width` wide, or its rows that the file has."""
    with file.open("rb", buffering=0) as stream:
        for i, row in enumerate(values.view(np.uint8)):
            stream.seek(offset + (i * width + left) * values.itemsize)
            if stream.readinto(row) != row.nbytes:
                return values[:i]
    return values
