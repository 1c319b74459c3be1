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
from .storage.bucket import BucketPath, Place

#: A record has at most this many bytes.
MAX_BYTES = 2**28
#: Errors of file systems that can't lock, such as some that hosts share.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)
#: Files that only a run or an adapter has in its folder.
OWNERS = {"config.yaml": "a run", "adapter_config.json": "an adapter"}


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
    if file.is_file() and not is_record(file):
        raise ValueError(f"{option} {file}: it holds no results, and would be overwritten; give another file")
    if isinstance(file, BucketPath) or written_in_place(file):
        return
    check_writable(option, file, file.parent)


def check_writable(option: str, path: Path, folder: Path) -> None:
    """Raises OSError, which names the path, if nothing can be written to a folder, or where a missing one is made."""
    try:
        near = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
        tempfile.TemporaryFile(dir=near).close()
    except OSError as error:
        raise OSError(f"{option} {path}: {error.strerror}. Give a path that can be written") from None


def is_record(file: Place) -> bool:
    """Whether a file is empty, or holds a record of an earlier command."""
    with file.open("rb") as stream:
        data = stream.read(MAX_BYTES + 1)
    try:
        found = json.loads(data or b'{"command": ""}')
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and "command" in found


def check_results_folder(folder: Place) -> None:
    """Raises ValueError for the folder of a run or an adapter. A run's scores.json could not be told from results, and
    saving an adapter replaces its folder."""
    for name, owner in OWNERS.items():
        if (folder / name).is_file():
            raise ValueError(f"--output {folder} is the folder of {owner} ({name}); choose another folder")


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
