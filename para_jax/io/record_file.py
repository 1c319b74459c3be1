"""What a command writes its results to: whether a file or a folder can be written, locking it, and writing a JSON
file."""

from __future__ import annotations

import errno
import json
import tempfile
from pathlib import Path
from typing import IO

from . import atomic
from .messages import say
from .storage.bucket import BucketPath

#: Errors of file systems that can't lock, such as some that hosts share.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)


def lock_output(stream: IO, name: str | Path) -> None:
    """Locks an open file as `atomic.lock` does. Where the file system can't, says so."""
    try:
        atomic.lock(stream, name)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        say(f"{name}: this file system can't lock files; let no second process write there")


def check_record_file(option: str, file: Path) -> None:
    """Raises ValueError or OSError if a record's file can't be written; called before the work for it begins."""
    if file.is_dir():
        raise ValueError(f"{option} {file}: a folder. Give the path of a file in it")
    if isinstance(file, BucketPath) or written_in_place(file):
        return
    try:
        near = next(one for one in file.absolute().parents if one.exists())
        tempfile.TemporaryFile(dir=near).close()
    except OSError as error:
        raise OSError(f"{option} {file}: {error.strerror}. Give a path that can be written") from None


def write_record(file: Path, record: dict) -> None:
    """Writes a record as JSON, and the folders of its path. Readers see the old file or the new one, never a part."""
    text = json.dumps(record, indent=2) + "\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    if written_in_place(file):
        file.write_text(text)
    else:
        atomic.write_text(file, text)


def written_in_place(file: Path) -> bool:
    """Whether a path names a device, a pipe or a link, such as /dev/stdout, which must not be replaced by a file."""
    return file.is_symlink() or (file.exists() and not file.is_file())
