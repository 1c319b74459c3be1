"""The JSON file that a command writes its measurements to: whether it can be written, and writing it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from . import atomic
from .storage.bucket import BucketPath


def check_record_file(option: str, file: Path) -> None:
    """Raises ValueError or OSError if a record's file can't be written; called before the work for it begins."""
    if file.is_dir():
        raise ValueError(f"{option} {file}: a folder. Give the path of a file in it")
    if isinstance(file, BucketPath) or written_in_place(file):
        return
    try:
        tempfile.TemporaryFile(dir=next(folder for folder in file.absolute().parents if folder.exists())).close()
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
