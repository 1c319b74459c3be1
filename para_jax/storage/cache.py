"""What is fetched from a bucket into the user's cache: backbones, file by file, and adapters, whole.

A copy lies in a folder named by address and content (the objects' generations; an adapter's bytes), so an object that
was replaced is fetched again, and a copy never changes. It appears there whole.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from .bucket import BLOCK, BucketPath
from .folder import read_folder

try:
    import fcntl
except ImportError:  # Windows: two processes fetch the same twice
    fcntl = None

#: Files that are fetched at once, bytes of one request, and versions of an adapter that are kept.
AT_ONCE, PART, VERSIONS = 8, 4 * BLOCK, 3


def fetched_files(folder: BucketPath, cache: Path, patterns: list[str], most_of_text: int) -> Path:
    """A local folder with those files of a bucket's folder whose names match; those below it are left out.

    Raises ValueError for a file that is no safetensors file and has more than `most_of_text` bytes.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    chosen = [folder / name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    return copied(folder, cache, chosen, most_of_text)


def fetched_file(file: BucketPath, cache: Path) -> Path:
    """A local copy of one file."""
    return copied(file.parent, cache, [file], 0) / file.name


def copied(folder: BucketPath, cache: Path, files: list[BucketPath], most_of_text: int) -> Path:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = dict(zip(files, pool.map(BucketPath.stat, files), strict=True))
    for file, about in found.items():
        if about.st_size > most_of_text and file.suffix not in (".safetensors", ".gguf"):
            raise ValueError(f"{file}: {about.st_size} bytes; expected {most_of_text} at most")
    key = digest(*(f"{file.name} {about.generation} {about.st_size}" for file, about in found.items()))
    place = cache / "buckets" / digest(str(folder)) / key
    with alone(place) as missing:
        if missing:
            need = sum(about.st_size for about in found.values())
            free = shutil.disk_usage(place.parent).free
            if need > free:
                raise ValueError(f"{folder}: {need} bytes, and {place.parent} has {free}; XDG_CACHE_HOME names another")
            with appearing(place) as part, ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(lambda file: fetch(file, part / file.name, found[file].generation), files))
    return place


def fetch(file: BucketPath, to: Path, generation: int) -> None:
    """Copies the object. Raises ValueError if another content has taken its place since it had this generation."""
    with file.open("rb") as stream, to.open("xb") as out:
        if stream.raw.generation != generation:
            raise ValueError(f"{file}: replaced while it was fetched; the same command fetches the new one")
        shutil.copyfileobj(stream, out, PART)


def fetched_adapter(folder: BucketPath, cache: Path, names: list[str], most: int) -> Path:
    """A local folder with an adapter's files, all of one version; see `bucket_folder.read_folder`."""
    files = read_folder(folder, names, most)
    key = digest(*(f"{name} {hashlib.sha256(data).hexdigest()}" for name, data in sorted(files.items())))
    place = cache / "buckets" / digest(str(folder)) / key
    with alone(place):
        if not (place.is_dir() and all((place / name).read_bytes() == data for name, data in files.items())):
            shutil.rmtree(place, ignore_errors=True)
            with appearing(place) as part:
                for name, data in files.items():
                    (part / name).write_bytes(data)
            others = sorted((path for path in place.parent.iterdir() if path.is_dir()), key=lambda p: p.stat().st_mtime)
            for old in others[:-VERSIONS]:
                shutil.rmtree(old, ignore_errors=True)
    return place


@contextmanager
def alone(place: Path) -> Iterator[bool]:
    """Keeps other processes of this host from making the same copy meanwhile; whether it is missing."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with (place.parent / ".lock").open("a") as stream:
        if fcntl is not None:
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield not place.is_dir()


@contextmanager
def appearing(place: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when the block ends."""
    part = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
    part.mkdir()
    try:
        yield part
        os.rename(part, place)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:20]
