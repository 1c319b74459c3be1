"""Files that a kill never leaves half-written, and files that only one process writes."""

from __future__ import annotations

import glob
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None


def write_text(file: Path, text: str) -> None:
    """Replaces a file by this text (UTF-8). Readers see the old file or the new one, never a part."""
    write_bytes(file, text.encode())


def write_bytes(file: Path, data: bytes) -> None:
    with replacing(file) as stream:
        stream.write(data)


@contextmanager
def replacing(file: Path) -> Iterator[BinaryIO]:
    """A stream whose content replaces the file when the block ends; if the block raises, the file stays as it was.

    The content is written next to the file under a random name, so that no link put there beforehand is followed, and
    reaches the disk before the name changes.
    """
    part = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        with part.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)
        sync_folder(file.parent)
    finally:
        part.unlink(missing_ok=True)


def leftovers(file: Path) -> list[Path]:
    """The temporary files that killed replacements of the file left next to it."""
    return sorted(file.parent.glob(f".{glob.escape(file.name)}." + "[0-9a-f]" * 8))


def sync_folder(folder: Path) -> None:
    """Makes the folder's renames reach the disk, where the file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def lock(stream: IO, name: str | Path) -> None:
    """Locks an open file against other processes (and other openings of it) until the stream is closed.

    Raises ValueError that names the file if somebody else holds the lock.
    """
    try:
        if fcntl is not None:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{name}: another process is writing it; wait until it ends, or choose another one") from None
