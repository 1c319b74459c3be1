"""The states of prompts in the user's cache folder, for train.cache_prompts=disk.

A file's name is a hash of everything that its bits depend on: the backbone's weights and shape, the prompts, the
pooler, the batches and the mesh that compute them, the code, the device and its precision. A file is therefore never
outdated. The least recently used files are deleted when the folder exceeds MAX_BYTES; a run that reads a deleted file
keeps it until it ends.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import jax
import numpy as np

from ..adapters.adapter import Adapter
from ..atomic import remedy, replacing
from ..backbone.content import backbone_content
from ..config import printable
from ..data.example_arrays import ExampleArrays, examples_digest
from ..data.token_cache import delete_oldest, files_digest
from ..hub import cache_folder
from ..messages import warn
from .prompt_states import pooler_digest

FORMAT = 1
MAX_BYTES = 2**36
#: Bytes before the first record, and of the sha256 of the records after the last one.
HEADER, DIGEST = 4096, 32
ENDING = ".states"


def file_of(model, pooler: Adapter, prompts: ExampleArrays, rows: int) -> Path:
    """The file of these prompts' states, on the current mesh. It may not exist."""
    mesh, package = jax.sharding.get_mesh(), Path(__file__).parents[1]
    code = *sorted((package / "backbone").glob("*.py")), package / "residual.py", package / "training/prompt_states.py"
    named = [FORMAT, rows, dict(mesh.shape), mesh.devices.flat[0].device_kind, jax.__version__]
    named += [jax.config.jax_default_matmul_precision]  # pyright: ignore[reportAttributeAccessIssue]
    named += [repr(model.attention), backbone_content(model), pooler_digest(pooler), examples_digest(prompts)]
    text = json.dumps([*named, files_digest(code)])
    return folder() / (hashlib.sha256(text.encode()).hexdigest() + ENDING)


def folder() -> Path:
    return cache_folder() / "prompts"


def mapped(file: Path, size: int) -> np.ndarray | None:
    """The records of a file, uint8 [size], mapped into memory. None if there is no file, or it is damaged."""
    try:
        with file.open("rb") as stream:
            found, held = stream.read(HEADER), file.stat().st_size
        if found != header(size) or held != HEADER + size + DIGEST:
            raise ValueError(f"its header or its {held} bytes are not those of {size} bytes of states")
        content = np.asarray(np.memmap(file, np.uint8, "r", HEADER))
        if hashlib.sha256(content[:size].data).digest() != content[size:].tobytes():
            raise ValueError("its sha256 does not match")
        with suppress(OSError):  # a read-only cache is still useful
            file.touch()
        return content[:size]
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        warn(f"ignoring the damaged cache file {file}: {printable(str(error), 200)}")
        return None


def write(file: Path, size: int, parts: Iterable[bytes]) -> None:
    """Writes the records, `size` bytes in all, and deletes old files if needed. A kill leaves no such file.

    Raises ValueError if the folder can't be written.
    """
    written, seen = 0, hashlib.sha256()
    with folder_errors(file.parent):
        with replacing(file) as stream:
            stream.write(header(size))
            for part in parts:
                written += stream.write(part)
                seen.update(part)
            assert written == size, (written, size)
            stream.write(seen.digest())
        delete_oldest(file, MAX_BYTES)


def free_space() -> int:
    """Free bytes where the files are. Makes their folder. Raises ValueError if that fails."""
    with folder_errors(folder()):
        folder().mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(folder()).free


@contextmanager
def folder_errors(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"train.cache_prompts=disk: {place} can't be written ({error.strerror}); {remedy(error.errno)}, set "
            "XDG_CACHE_HOME to another folder, or use train.cache_prompts=off"
        ) from None


def header(size: int) -> bytes:
    return json.dumps({"format": FORMAT, "bytes": size}).encode().ljust(HEADER, b"\n")
