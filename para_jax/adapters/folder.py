"""Folders of files that others wrote, read with care, and our own, written whole or not at all.

What comes from a folder is not trusted: sizes and shapes are checked before content is used, and no pickle is read.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..atomic import sync_folder
from ..config import shorten

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
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


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in the folder's weights, by name; their content is not read."""
    with opened(folder) as (_, stored):
        return {name: tuple(tensor.get_shape()) for name, tensor in stored.items()}


def read_tensors(folder: Path, expected: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The folder's tensors as float32, if they are the expected ones (names and shapes) and finite."""
    with opened(folder) as (file, stored):
        require_as_expected(file, stored, expected)
        tensors = {name: tensor[...].astype(np.float32) for name, tensor in stored.items()}
    require_finite(str(file), tensors)
    return tensors


@contextmanager
def opened(folder: Path) -> Iterator[tuple[Path, dict]]:
    """The folder's weights file, and its tensors by name: slices, of which nothing is read yet."""
    from safetensors import SafetensorError, safe_open

    refuse_pickles(folder)
    file = own_file(folder, WEIGHTS)
    try:
        with safe_open(file, framework="numpy") as tensors:
            yield file, {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: truncated, or not a safetensors file: {error}") from None


def require_as_expected(file: Path, stored: dict, expected: dict[str, tuple[int, ...]]) -> None:
    problems = {
        "missing": [name for name in expected if name not in stored],
        "unknown": [name for name in stored if name not in expected],
        "misshapen": [
            f"{name} {stored[name].get_shape()} (expected {list(expected[name])})"
            for name in stored
            if name in expected and tuple(stored[name].get_shape()) != expected[name]
        ],
        "not of F32, F16 or BF16": [name for name in stored if stored[name].get_dtype() not in ("F32", "F16", "BF16")],
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


def mend_folder(folder: Path) -> None:
    """Tidies up after a replacement of the folder that was killed; where none was in place, the old one comes back."""
    for path in sorted(folder.parent.glob(f".{folder.name}.*.old")):
        if not folder.exists():
            os.rename(path, folder)
    for path in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(path, ignore_errors=True)


def some(names: Iterable[str]) -> str:
    names = [name if name.isprintable() else repr(name) for name in names]
    return ", ".join(name[:200] for name in names[:5]) + (f" ... ({len(names)} in all)" if len(names) > 5 else "")
