"""The three files of an adapter folder, and atomic replacement: a folder is written as a whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ..atomic import OLD, folders_left, old_folder, sync_folder, temporary_name
from ..storage.bucket import BucketPath, Place
from ..untrusted import safe_names

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
FILES = {CONFIG, WEIGHTS, CARD}


def require_replaceable(folder: Place) -> None:
    """Raises ValueError for a folder with files that no adapter has."""
    if folder.exists():
        others = sorted({path.name for path in folder.iterdir()} - FILES) if folder.is_dir() else [folder.name]
        if others:
            raise ValueError(
                f"{folder} holds other files ({safe_names(others)}), which a save would delete; move them away, or "
                "choose another folder"
            )


def replace_folder(folder: Place, files: dict[str, bytes]) -> None:
    """Makes `folder` hold exactly these files. If that fails, the old folder stays."""
    require_replaceable(folder)
    if isinstance(folder, BucketPath):
        write_to_bucket(folder, files)
        return
    new = temporary_name(folder)
    try:
        new.mkdir(parents=True)
        for name, data in files.items():
            with (new / name).open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        sync_folder(new)
        swap(new, folder)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{folder}: not saved ({reason}); what was there before is unchanged") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


def write_to_bucket(folder: BucketPath, files: dict[str, bytes]) -> None:
    """Writes the weights first and the config last: a folder with a config is whole.

    If the config changes, the old one is deleted first, so a kill may leave no adapter. If it stays the same, as in a
    run, a kill leaves the old adapter or the new one, because the weights are one object.
    """
    config = folder / CONFIG
    try:
        if config.is_file() and config.read_bytes() != files[CONFIG]:
            config.unlink()
        for name in (WEIGHTS, CARD, CONFIG):
            (folder / name).write_bytes(files[name])
    except OSError as error:
        raise OSError(f"{folder}: not saved ({error.strerror or error}); save the adapter again") from None


def swap(new: Path, folder: Path) -> None:
    """Renames the old folder away and the new one into its place. After a kill in between, `old_folder` finds the old
    one."""
    old = new.with_name(new.name + OLD)
    try:
        if folder.exists():
            os.rename(folder, old)
        os.rename(new, folder)
    except BaseException:
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        raise
    sync_folder(folder.parent)
    for path in folders_left(folder, OLD):
        shutil.rmtree(path, ignore_errors=True)


def mend_folder(folder: Place) -> None:
    """Tidies up after a replacement that was killed. If the new folder was not in place yet, the old one comes back.
    In a bucket there is nothing to tidy up.

    Raises ValueError for other files in the folder: the next save would do so, perhaps hours later.
    """
    old = old_folder(folder)
    if old is not None and not folder.exists():
        os.rename(old, folder)
    for path in [*folders_left(folder, OLD), *folders_left(folder)]:
        shutil.rmtree(path, ignore_errors=True)
    require_replaceable(folder)
