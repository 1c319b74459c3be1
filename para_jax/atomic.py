"""Files that a kill never leaves half-written, and files that only one process writes."""

from __future__ import annotations

import errno
import glob
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import IO, BinaryIO

from .storage.bucket import BucketPath

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
    reaches the disk before the name changes. In a bucket an object appears whole anyway.
    """
    if isinstance(file, BucketPath):
        data = BytesIO()
        yield data
        file.write_bytes(data.getvalue())
        return
    part = temporary_name(file)
    try:
        with part.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)
        sync_folder(file.parent)
    finally:
        part.unlink(missing_ok=True)


def files_left(file: Path) -> list[Path]:
    """The temporary files that killed replacements of the file left next to it; none in a bucket."""
    if isinstance(file, BucketPath):
        return []
    return sorted(file.parent.glob(f".{glob.escape(file.name)}." + "[0-9a-f]" * 8))


def sync_folder(folder: Path) -> None:
    """Makes the folder's renames reach the disk, where the file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


#: Errors of a disk, or of a share of it, that is full.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def remedy(number: int | None) -> str:
    """What to do about an error of writing."""
    return "make room there" if number in FULL else "see to it that the folder can be written and renamed in"


#: The end of the old folder's name while a new folder takes its place.
OLD = ".old"


def temporary_name(path: Path) -> Path:
    """A name in the same folder that nobody can foresee, for what will replace the path."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def folders_left(path: Path, ending: str = "") -> list[Path]:
    """The folders under names that `temporary_name` made for this path, with this ending; the latest first."""
    if isinstance(path, BucketPath):
        return []
    form = re.compile(re.escape(f".{path.name}.") + "[0-9a-f]{8}" + re.escape(ending))
    found = []
    with suppress(OSError), os.scandir(path.parent) as others:
        for other in others:
            if form.fullmatch(other.name) and other.is_dir(follow_symlinks=False):
                with suppress(OSError):  # gone meanwhile
                    found.append((other.stat().st_ctime_ns, path.with_name(other.name)))
    return [other for _, other in sorted(found, reverse=True)]


def set_aside(folder: Path) -> Path | None:
    """The old folder, if a replacement was killed after it had been renamed and before the new one got its name."""
    return next(iter(folders_left(folder, OLD)), None)


def lock(stream: IO, name: str | Path) -> None:
    """Locks an open file against other processes (and other openings of it) until the stream is closed.

    Raises ValueError that names the file if somebody else holds the lock.
    """
    try:
        if fcntl is not None:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{name}: another process is writing it; wait until it ends, or choose another one") from None
