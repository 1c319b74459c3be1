"""Local copies of backbones and adapters from a bucket, and of adapters from the hub, in the user's cache.

The folder of a copy is named by its address and content (the generations of the objects, or the bytes of an adapter).
So a copy never changes, and a replaced object is fetched again. A kill leaves no partial copy.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from .bucket import BLOCK, BucketPath, Place

T = TypeVar("T")

#: Files that are fetched at the same time.
CONCURRENCY = 8
#: Bytes per request.
REQUEST_BYTES = 4 * BLOCK
#: How many versions of an adapter are kept.
KEPT_VERSIONS = 3
#: How often an adapter is read that is replaced meanwhile.
TRIES = 5
#: The suffix of a copy while it is made.
PART = ".part"


def fetched_files(
    folder: BucketPath, cache: Path, patterns: list[str], max_text_bytes: int, ignored: Sequence[str]
) -> Path:
    """A local folder with the files of a bucket's folder that match a pattern and none of the ignored ones, without
    sub-folders.

    Raises ValueError for a file of more than `max_text_bytes` bytes that is not a safetensors file.
    """
    from huggingface_hub.utils import filter_repo_objects

    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    chosen = filter_repo_objects(names, allow_patterns=patterns, ignore_patterns=list(ignored))
    return local_copy(folder, cache, [folder / name for name in chosen], max_text_bytes)


def fetched_file(file: BucketPath, cache: Path) -> Path:
    """A local copy of one file."""
    return local_copy(file.parent, cache, [file], 0) / file.name


def local_copy(folder: BucketPath, cache: Path, files: list[BucketPath], max_text_bytes: int) -> Path:
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        found = dict(zip(files, pool.map(BucketPath.stat, files), strict=True))
    for file, about in found.items():
        if about.st_size > max_text_bytes and file.suffix not in (".safetensors", ".gguf"):
            raise ValueError(f"{file}: {about.st_size} bytes, more than the allowed {max_text_bytes}")
    key = short_digest(*(f"{file.name} {about.generation} {about.st_size}" for file, about in found.items()))
    place = cache / "buckets" / short_digest(str(folder)) / key
    with locked_copy(place) as missing:
        if missing:
            with new_folder(place) as part, ThreadPoolExecutor(CONCURRENCY) as pool:
                list(pool.map(lambda file: fetch(file, part / file.name, found[file].generation), files))
    return place


def fetch(file: BucketPath, to: Path, generation: int) -> None:
    """Copies the object. Raises ValueError if it no longer has this generation."""
    with file.open("rb") as stream, to.open("xb") as out:
        if stream.raw.generation != generation:
            raise ValueError(f"{file} was replaced while it was fetched; run the same command to fetch the new one")
        shutil.copyfileobj(stream, out, REQUEST_BYTES)


def fetched_adapter(folder: BucketPath, cache: Path, names: list[str], max_bytes: int) -> Path:
    """A local folder with those of an adapter's files that exist.

    Args:
        names: the first is the config.
    """

    def files() -> dict[str, bytes]:
        return {name: data for name in names if (data := read(folder / name, max_bytes)) is not None}

    return adapter_copy(cache / "buckets" / short_digest(str(folder)), of_one_version(folder / names[0], files))


def of_one_version(config: Place, read: Callable[[], T]) -> T:
    """What `read` makes of an adapter's files. A save deletes a config that changes first and writes it last. If that
    happened meanwhile, `read` is called again, so the config of one adapter never meets the weights of another. It
    waits longer each time, up to 1.6 s, so that the save can end."""
    for number in range(TRIES):
        before = generation(config)
        try:
            found = read()
        except (ValueError, OSError):
            if generation(config) == before:
                raise
        else:
            if generation(config) == before:
                return found
        time.sleep(0.1 * 2**number)
    raise ValueError(f"{config.parent} was replaced every time it was read; try again when nothing writes to it")


def generation(file: Place) -> Hashable:
    """What tells a file from the ones before it under this name; None if there is none."""
    try:
        about = file.stat()
    except FileNotFoundError:
        return None
    return about.generation if isinstance(file, BucketPath) else (about.st_ino, about.st_ctime_ns)


def read(file: Place, max_bytes: int) -> bytes | None:
    """The content of a file; None if it does not exist or is deleted meanwhile."""
    try:
        size = file.stat().st_size
        if size > max_bytes:
            raise ValueError(f"{file} has {size} bytes, more than the allowed {max_bytes}")
        return file.read_bytes()
    except FileNotFoundError:
        return None


def adapter_copy(versions: Path, files: dict[str, bytes]) -> Path:
    """A folder with these files of an adapter, in the folder of its versions."""
    place = versions / short_digest(
        *(f"{name} {hashlib.sha256(data).hexdigest()}" for name, data in sorted(files.items()))
    )
    with locked_copy(place) as missing:
        if missing:
            with new_folder(place) as part:
                for name, data in files.items():
                    (part / name).write_bytes(data)
            others = sorted((path for path in place.parent.iterdir() if path.is_dir()), key=lambda p: p.stat().st_mtime)
            for old in others[:-KEPT_VERSIONS]:
                shutil.rmtree(old, ignore_errors=True)
    return place


@contextmanager
def locked_copy(place: Path) -> Iterator[bool]:
    """Locks a copy against other processes on this host, and deletes what killed ones left unfinished. Yields whether
    the copy is missing."""
    from filelock import FileLock  # it loads asyncio, which --help does without

    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.parent / ".lock"):
        for left in place.parent.glob(f"*{PART}"):
            shutil.rmtree(left, ignore_errors=True)
        yield not place.is_dir()


@contextmanager
def new_folder(place: Path) -> Iterator[Path]:
    """Yields a folder to fill, which gets the name `place` when the block ends."""
    part = place.with_name(f".{place.name}.{secrets.token_hex(4)}{PART}")
    part.mkdir()
    try:
        yield part
        os.rename(part, place)  # at once: a kill leaves all of it or none
    finally:
        shutil.rmtree(part, ignore_errors=True)  # after the rename there is nothing to remove


def short_digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:20]
