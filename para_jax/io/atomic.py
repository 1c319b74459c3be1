"""Files and folders that a kill never leaves half-written, and locks for files that one process writes."""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import IO, Any, BinaryIO

from .storage.bucket import BucketPath

try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None


def write_text(file: Path, text: str) -> None:
    """Replaces a file with this text (UTF-8). Readers see the old file or the new one, never a part."""
    write_bytes(file, text.encode())


def write_bytes(file: Path, data: bytes) -> None:
    with replacing(file) as stream:
        stream.write(data)


@contextmanager
def replacing(file: Path) -> Iterator[BinaryIO]:
    """Yields a stream whose content replaces the file when the block ends. If the block raises, the file is unchanged.

    The content is written next to the file under a random name, so that no link placed there in advance is followed,
    and reaches the disk before the name changes. An object in a bucket is written atomically anyway.
    """
    if isinstance(file, BucketPath):
        data = BytesIO()
        yield data
        file.write_bytes(data.getvalue())
        return
    part = temporary_name(file)
    try:
        with errors_named(file), part.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)
        sync_folder(file.parent)  # else a power failure may undo the rename
    finally:
        part.unlink(missing_ok=True)  # after an error; a replaced file has left this name


@contextmanager
def errors_named(path: Path | BucketPath) -> Iterator[None]:
    """Adds a path to errors that have none, such as that of a write to a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def append(stream: IO[bytes], data: bytes) -> None:
    """Adds all of the data to an unbuffered file, or none where a disk gets full."""
    written = 0
    try:
        while written < len(data):
            written += stream.write(data[written:])
    except OSError:
        if written:
            with suppress(OSError):  # of a pipe; a torn line that stays is cut off when the file is opened again
                stream.truncate(os.fstat(stream.fileno()).st_size - written)
        raise


def is_torn(line: bytes, head: bytes) -> bool:
    """Whether a kill cut off this line of a file to which `append` adds lines that begin with `head`."""
    return not line.endswith(b"\n") and (line.startswith(head) or head.startswith(line))


def files_left(file: Path) -> list[Path]:
    """Temporary files that killed replacements of the file left next to it; none in a bucket."""
    if isinstance(file, BucketPath):
        return []
    return sorted(file.parent.glob(f".{glob.escape(file.name)}." + "[0-9a-f]" * 8))


def sync_folder(folder: Path) -> None:
    """Makes renames in the folder reach the disk, if the file system supports it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


#: Errors of a full disk or quota.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def temporary_name(path: Path) -> Path:
    """An unpredictable name in the same folder, for the file or folder that will replace the path."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def folders_left(path: Path, ending: str = "") -> list[Path]:
    """Folders with names from `temporary_name` for this path, with this ending; the latest first."""
    if isinstance(path, BucketPath):
        return []
    form = re.compile(re.escape(f".{path.name}.") + "[0-9a-f]{8}" + re.escape(ending))
    found = []
    with suppress(OSError), os.scandir(path.parent) as others:
        for other in others:
            if form.fullmatch(other.name) and other.is_dir(follow_symlinks=False):
                with suppress(OSError):  # deleted meanwhile
                    found.append((other.stat().st_ctime_ns, path.with_name(other.name)))
    return [other for _, other in sorted(found, reverse=True)]


def lock(stream: IO, name: str | Path) -> None:
    """Locks an open file against other processes (and against opening it twice) until the stream is closed.

    Raises ValueError, naming the file, if it is already locked.
    """
    try:
        if fcntl is not None:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees it when the process dies
    except BlockingIOError:
        raise ValueError(f"{name}: another process is writing it; wait until it ends, or choose another") from None


def read_json(file: Any, advice: str) -> Any:
    """What a JSON file that we wrote holds. Raises ValueError, naming the file, for what is not JSON."""
    try:
        return json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}). {advice}") from None
