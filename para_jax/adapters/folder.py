"""Folders of files that others wrote, read with care, and our own, written whole or not at all.

What comes from a folder is not trusted: sizes and shapes are checked before content is used, and no pickle is read.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from ..atomic import OLD, folders_left, set_aside, sync_folder, temporary_name
from ..storage import folder as bucket_folder
from ..storage.bucket import BucketPath, Place
from ..tensor_file import StoredTensor, stored_tensors
from ..untrusted import some

T = TypeVar("T")

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"


def own_file(folder: Path, name: str) -> Path:
    """folder/name, a plain file of its own: a link may lead out of the folder."""
    file = folder / name
    if file.is_symlink():
        raise ValueError(f"{file}: a link, which is not followed (it may lead out of the folder)")
    if not file.is_file():
        raise ValueError(f"{folder}: no {name} there")
    return file


def read_whole(find: Callable[[], Path], read: Callable[[Path], T]) -> T:
    """What `read` makes of the folder that `find` gives. If the folder is replaced meanwhile, it is read again: the
    config of one adapter and the weights of another are never taken together."""
    for _ in range(10):
        folder = find()
        before = identity(folder)
        try:
            found = read(folder)
        except (ValueError, OSError):
            if identity(folder) == before:
                raise
            continue
        if identity(folder) == before:
            return found
    raise ValueError(f"{folder}: replaced each time that it was read; try again when it is left alone")


def identity(folder: Path) -> tuple[int, ...] | None:
    """What no other folder has that stood or will stand at this path; None where there is none."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_ctime_ns


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in the folder's weights, by name; their content is not read."""
    return {name: tensor.shape for name, tensor in weights_of(folder).items()}


def read_tensors(folder: Path, expected: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The folder's tensors as float32, if they are the expected ones (names and shapes) and finite."""
    stored = weights_of(folder)
    require_as_expected(folder / WEIGHTS, stored, expected)
    tensors = {name: tensor.read().astype(np.float32, copy=False) for name, tensor in stored.items()}
    require_finite(str(folder / WEIGHTS), tensors)
    return tensors


def weights_of(folder: Path) -> dict[str, StoredTensor]:
    """The tensors in the folder's weights file, by name."""
    refuse_pickles(folder)
    return stored_tensors(own_file(folder, WEIGHTS))


def require_as_expected(file: Path, stored: dict[str, StoredTensor], expected: dict[str, tuple[int, ...]]) -> None:
    problems = {
        "missing": [name for name in expected if name not in stored],
        "unknown": [name for name in stored if name not in expected],
        "misshapen": [
            f"{name} {list(tensor.shape)} (expected {list(expected[name])})"
            for name, tensor in stored.items()
            if name in expected and tensor.shape != expected[name]
        ],
        "not of F32, F16 or BF16": [n for n, tensor in stored.items() if tensor.dtype not in ("F32", "F16", "BF16")],
    }
    if any(problems.values()):
        listed = "; ".join(f"{what}: {some(names)}" for what, names in problems.items() if names)
        raise ValueError(f"{file}: the tensors do not fit {CONFIG}. {listed}")


def require_finite(where: str, tensors: dict[str, np.ndarray]) -> None:
    broken = [name for name, value in tensors.items() if not np.isfinite(value).all()]
    if broken:
        raise ValueError(f"{where}: tensors with NaN or infinite values: {some(broken)}")


def refuse_pickles(folder: Path) -> None:
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickles and not (folder / WEIGHTS).exists():
        raise ValueError(
            f"{folder}: weights only as a pickle ({some(pickles)}), which could run code and is not read. Convert it:\n"
            f"safetensors.torch.save_file(torch.load({pickles[0]!r}, weights_only=True), {WEIGHTS!r})"
        )


def safetensors_bytes(tensors: dict[str, np.ndarray]) -> bytes:
    from safetensors.numpy import save

    return save({name: np.ascontiguousarray(value) for name, value in tensors.items()}, metadata={"format": "pt"})


# ------------------------------------------------------------------------------------------------------------- writing


def replace_folder(folder: Place, files: dict[str, bytes]) -> None:
    """Puts a folder of these files in the place of what is at `folder`; where that fails, what was there stays."""
    if isinstance(folder, BucketPath):
        bucket_folder.replace_folder(folder, files)
        return
    if folder.exists():
        others = sorted({path.name for path in folder.iterdir()} - set(files)) if folder.is_dir() else [folder.name]
        if others:
            raise ValueError(
                f"{folder}: holds other files ({some(others)}), and would be replaced; choose another folder"
            )
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


def swap(new: Path, folder: Path) -> None:
    """Renames the old folder away and the new one into its place. A kill in between leaves the old one set aside, where
    `set_aside` finds it."""
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
    """Tidies up after a replacement of the folder that was killed; where none was in place, the old one comes back."""
    if isinstance(folder, BucketPath):
        bucket_folder.mend_folder(folder)
        return
    old = set_aside(folder)
    if old is not None and not folder.exists():
        os.rename(old, folder)
    for path in [*folders_left(folder, OLD), *folders_left(folder)]:
        shutil.rmtree(path, ignore_errors=True)
