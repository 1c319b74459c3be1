"""A safetensors file: the tensors that it contains, and parts of them as arrays. The safetensors library checks it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp  # noqa: F401 (registers bfloat16 with NumPy, which safetensors needs)
import numpy as np
from safetensors import SafetensorError, safe_open

from .untrusted import one_line, safe_name

#: The maximum size of a header: about 30,000 tensors.
MAX_HEADER_BYTES = 2**22
DTYPES = ("F64", "F32", "F16", "BF16")


class StoredTensor(NamedTuple):
    """A tensor in a safetensors file."""

    file: Path
    name: str
    dtype: str
    """as the format names it"""
    shape: tuple[int, ...]
    opened: Any
    """the file, as safe_open maps it"""
    file_bytes: int
    """the size of the file when it was opened"""

    def read(self, start: int = 0, stop: int | None = None, columns: slice = slice(None)) -> np.ndarray:
        """Rows start...stop, or some of their columns, in the stored dtype. Reads nothing else from the file.

        Raises ValueError, naming file and tensor, for a dtype that is not a float of 16 bits or more.
        """
        if self.dtype not in DTYPES:
            raise ValueError(
                f"{self.file}: {safe_name(self.name)} is stored as {safe_name(self.dtype, 20)}; use one of "
                f"{', '.join(DTYPES)}"
            )
        # The file is mapped into memory: a read beyond its end would kill the process (SIGBUS).
        if self.file.stat().st_size != self.file_bytes:
            raise ValueError(f"{self.file} changed while it was read ({safe_name(self.name)}); fetch the file again")
        stored = self.opened.get_slice(self.name)
        if len(self.shape) < 2 or columns.indices(self.shape[1]) == (0, self.shape[1], 1):
            return stored[start:stop]  # complete rows, which are copied at once
        return stored[start:stop, columns.start : columns.stop]


def stored_tensors(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, by name. Raises ValueError, naming the file, if it is damaged or truncated."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
    if MAX_HEADER_BYTES < header_bytes <= size:
        raise ValueError(f"{file}: the header has {header_bytes} bytes; a model's has at most {MAX_HEADER_BYTES}")
    try:
        opened = safe_open(file, framework="numpy")
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"{file}: truncated, or not a safetensors file ({one_line(str(error), 200)}); fetch it again"
        ) from None
    parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a dictionary)
    return {
        name: StoredTensor(file, name, part.get_dtype(), tuple(part.get_shape()), opened, size)
        for name, part in parts.items()
    }
