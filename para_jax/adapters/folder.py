"""Careful reading of adapter folders, and atomic replacement: a folder is written as a whole or not at all.

The content of a folder is not trusted. Sizes and shapes are checked before it is used, and no pickle is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from ..atomic import OLD, folders_left, old_folder, sync_folder, temporary_name
from ..storage.bucket import BucketPath, Place
from ..tensor_file import StoredTensor, stored_tensors
from ..text_part import text_tensors
from ..untrusted import safe_names

T = TypeVar("T")

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
FILES = {CONFIG, WEIGHTS, CARD}

# ------------------------------------------------------------------------------------------------------------- reading


def own_file(folder: Path, name: str) -> Path:
    """folder/name, if it is a plain file. Raises ValueError for a link, which may lead out of the folder."""
    file = folder / name
    if file.is_symlink():
        raise ValueError(f"{file} is a link, which may lead out of the folder; put the file itself there")
    if not file.is_file():
        raise ValueError(f"{folder} has no {name}; choose the folder of an adapter")
    return file


def read_whole(find: Callable[[], Path], read: Callable[[Path], T]) -> T:
    """Reads the folder that `find` gives. If it is replaced meanwhile, it is read again, so that the config of one
    adapter is never combined with the weights of another."""
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
    raise ValueError(f"{folder} was replaced every time it was read; try again when nothing writes to it")


def identity(folder: Path) -> tuple[int, ...] | None:
    """Tells the folder from any earlier or later one at this path. None if there is no folder."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_ctime_ns


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the folder's tensors, by name. Their content is not read."""
    return {name: tensor.shape for name, tensor in weights_of(folder).items()}


def read_tensors(folder: Path, expected: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The folder's tensors as float32. Raises ValueError unless they are finite and have the expected names and
    shapes."""
    stored = weights_of(folder)
    require_as_expected(folder / WEIGHTS, stored, expected)
    tensors = {name: tensor.read().astype(np.float32, copy=False) for name, tensor in stored.items()}
    require_finite(str(folder / WEIGHTS), tensors)
    require_undamaged(own_file(folder, WEIGHTS).read_bytes(), str(folder / WEIGHTS))
    return tensors


def weights_of(folder: Path) -> dict[str, StoredTensor]:
    """The tensors in the folder's weights file, by name."""
    refuse_pickles(folder)
    return text_tensors(stored_tensors(own_file(folder, WEIGHTS)))


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
        listed = "; ".join(f"{what}: {safe_names(names)}" for what, names in problems.items() if names)
        raise ValueError(f"{file}: the tensors do not match {CONFIG}. {listed}")


def require_finite(where: str, tensors: dict[str, np.ndarray]) -> None:
    broken = [name for name, value in tensors.items() if not np.isfinite(value).all()]
    if broken:
        raise ValueError(f"{where}: these tensors have NaN or infinite values: {safe_names(broken)}")


def refuse_pickles(folder: Path) -> None:
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickles and not (folder / WEIGHTS).exists():
        raise ValueError(
            f"{folder}: weights only as a pickle ({safe_names(pickles)}), which is not read because it could run code. "
            "Convert it:\n"
            f"safetensors.torch.save_file(torch.load({pickles[0]!r}, weights_only=True), {WEIGHTS!r})"
        )


def safetensors_bytes(tensors: dict[str, np.ndarray]) -> bytes:
    """The file of tensors. Its header has a hash of them, so that the first bytes tell one adapter from another."""
    from safetensors.numpy import save

    data = save({name: np.ascontiguousarray(value) for name, value in tensors.items()}, metadata={"format": "pt"})
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"]["sha256"] = hashlib.sha256(data).hexdigest()  # `save` writes two entries in a random order
    return header_bytes(header) + data[start:]


def header_bytes(header: dict) -> bytes:
    """The header of a safetensors file with its length, as `save` writes it."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def require_undamaged(data: bytes, where: str) -> None:
    """Raises ValueError if a file has a hash, as those of `safetensors_bytes` do, and its tensors do not match it."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata = header.get("__metadata__")
    held = metadata.pop("sha256", None) if isinstance(metadata, dict) else None
    if held is None:
        return
    digest = hashlib.sha256(header_bytes(header))
    digest.update(memoryview(data)[start:])
    if digest.hexdigest() != held:
        raise ValueError(
            f"{where}: the weights do not match the sha256 in the file's metadata, so it is damaged; restore it from a "
            "copy, or train again (a program that changes weights on purpose must remove the sha256)"
        )


# ------------------------------------------------------------------------------------------------------------- writing


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
