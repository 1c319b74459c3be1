"""Folders of files that others wrote, read with care, and our own, written whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

MAX_JSON_BYTES = 2**20


def own_file(folder: Path, name: str) -> Path:
    """folder/name, a plain file of its own: a link may lead out of the folder."""
    file = folder / name
    if file.is_symlink():
        raise ValueError(f"{file}: a link, which is not followed (it may lead out of the folder)")
    if not file.is_file():
        raise ValueError(f"{folder}: no {name} there")
    return file


def read_json(file: Path) -> dict:
    if file.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{file}: {file.stat().st_size} bytes; expected at most {MAX_JSON_BYTES}")
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON: {str(error)[:200]}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: {shorten(found)}; expected a mapping")
    return found


def replace_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Puts a folder of these files in the place of what is at `folder`; where that fails, what was there stays."""
    if folder.exists():
        others = sorted({path.name for path in folder.iterdir()} - set(files)) if folder.is_dir() else [folder.name]
        if others:
            raise ValueError(
                f"{folder}: holds other files ({some(others)}), and would be replaced; choose another folder"
            )
    new = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        new.mkdir(parents=True)
        for name, data in files.items():
            with (new / name).open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        swap(new, folder)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{folder}: not saved ({reason}); what was there before is unchanged") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


def swap(new: Path, folder: Path) -> None:
    old = new.with_name(new.name + ".old")
    if folder.exists():
        os.rename(folder, old)
    try:
        os.rename(new, folder)
    except OSError:
        if old.exists():
            os.rename(old, folder)
        raise
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    with suppress(OSError):  # some file systems can't; the renames are done all the same
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def shorten(value: object, width: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."


def some(names: Iterable[str]) -> str:
    names = [name if name.isprintable() else repr(name) for name in names]
    return ", ".join(name[:200] for name in names[:5]) + (f" ... ({len(names)} in all)" if len(names) > 5 else "")
