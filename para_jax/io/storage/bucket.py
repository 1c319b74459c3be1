"""Paths in a Google Cloud Storage bucket: `BucketPath` has the methods of `pathlib.Path` that para_jax uses.

A bucket contains named objects and no folders: a folder exists while the name of some object begins with it. An object
is written completely or not at all. Nothing can be renamed.
"""

from __future__ import annotations

import io
import re
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from .service import file_system, one_line_errors

#: Bytes that a stream reads at once.
BLOCK = 2**22
#: Bytes of the largest object that is written in one request.
SINGLE_REQUEST = 2**23
#: Requests at the same time.
CONCURRENCY = 16
BUCKET_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
#: The maximum length of an object's name, in bytes.
MAX_NAME_BYTES = 1024


def bucket_path(text: str | Path | BucketPath) -> BucketPath | None:
    """The path of a gs:// address; None for a path of the file system. Raises ValueError for any other address."""
    if isinstance(text, BucketPath):
        return text
    found = re.match(r"(\w[\w+.-]*)://", str(text))
    if found is None:
        return None
    if found[1] != "gs":
        raise ValueError(
            f"{str(text)[:300]!r}: {found[1]}:// is not supported; use a path, or gs://bucket/folder for Google Cloud "
            "Storage"
        )
    bucket, _, key = str(text).removeprefix("gs://").partition("/")
    if not BUCKET_NAME.fullmatch(bucket):
        raise ValueError(f"{str(text)[:300]!r}: {bucket!r} can't be the name of a bucket; use gs://bucket/folder")
    key = key.rstrip("/")
    if key and not all(map(is_file_name, key.split("/"))):
        raise ValueError(f"{str(text)[:300]!r}: the path has empty, '.', '..' or unprintable parts; remove them")
    if len(key.encode()) > MAX_NAME_BYTES:
        raise ValueError(
            f"{str(text)[:80]!r}...: an object's name has at most {MAX_NAME_BYTES} bytes; use a shorter one"
        )
    return BucketPath(bucket, key)


def is_file_name(part: str) -> bool:
    """Whether a part of an object's name could be the name of a file. Names in a listing can be anything."""
    return part not in ("", ".", "..") and part.isprintable() and not set(part) & set("/\\")


class Stat(NamedTuple):
    st_size: int
    generation: int
    """a number that changes with each new content"""
    md5: str
    """of the content, in base64; of an object that was composed of others, which has none, its generation"""


class BucketPath:
    """gs://bucket/key, with methods of pathlib.Path. `resolve`, `absolute` and `expanduser` change nothing."""

    __slots__ = ("bucket", "key", "_folder")

    def __init__(self, bucket: str, key: str, folder: bool | None = None):
        self.bucket, self.key, self._folder = bucket, key, folder

    def __str__(self) -> str:
        return f"gs://{self.bucket}/{self.key}".rstrip("/")

    __repr__ = __str__

    def __eq__(self, other) -> bool:
        return isinstance(other, BucketPath) and (self.bucket, self.key) == (other.bucket, other.key)

    def __hash__(self) -> int:
        return hash((self.bucket, self.key))

    def __lt__(self, other: BucketPath) -> bool:
        return (self.bucket, self.key) < (other.bucket, other.key)

    def __truediv__(self, name: str | Path) -> BucketPath:
        added = str(name).strip("/")
        if not all(map(is_file_name, added.split("/"))):
            raise ValueError(f"{self}: {added[:200]!r} can't be the name of a file in it")
        return BucketPath(self.bucket, f"{self.key}/{added}".lstrip("/"))

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2] or self.bucket

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    @property
    def stem(self) -> str:
        return Path(self.name).stem

    @property
    def parent(self) -> BucketPath:
        return BucketPath(self.bucket, self.key.rpartition("/")[0])

    def with_name(self, name: str) -> BucketPath:
        return self.parent / name

    def resolve(self) -> BucketPath:
        return self

    absolute = expanduser = resolve

    # ---------------------------------------------------------------------------------------------------- looking

    @one_line_errors
    def stat(self) -> Stat:
        found = file_system().call("GET", "b/{}/o/{}", self.bucket, self.key, json_out=True)
        return Stat(int(found["size"]), int(found["generation"]), found.get("md5Hash") or found["generation"])

    def is_file(self) -> bool:
        if self._folder is not None:
            return not self._folder
        if not self.key:
            return False
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    @one_line_errors
    def is_dir(self) -> bool:
        if self._folder is not None:
            return self._folder
        try:
            found = any(page.get("items") or page.get("prefixes") for page in self._pages(maxResults=1))
        except FileNotFoundError:  # the bucket does not exist
            return False
        return found or not self.key

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def is_symlink(self) -> bool:
        return False

    @one_line_errors
    def iterdir(self) -> Iterator[BucketPath]:
        """The files and folders in the folder, without objects whose names no file can have."""
        found, start = {}, f"{self.key}/" if self.key else ""
        for page in self._pages(delimiter="/"):
            for item in page.get("items", []):
                found[item["name"][len(start) :]] = False
            for prefix in page.get("prefixes", []):
                found.setdefault(prefix[len(start) :].rstrip("/"), True)  # an object may have the name of a folder
        return (BucketPath(self.bucket, start + name, folder) for name, folder in found.items() if is_file_name(name))

    def _pages(self, **settings) -> Iterator[dict[str, Any]]:
        """The pages of a listing. One may be empty although others follow it."""
        token = {}
        while True:
            page = self._page(**settings, **token)
            yield page
            if not page.get("nextPageToken"):
                return
            token = {"pageToken": page["nextPageToken"]}

    def _page(self, **settings) -> dict[str, Any]:
        prefix = f"{self.key}/" if self.key else ""
        return file_system().call("GET", "b/{}/o", self.bucket, prefix=prefix, json_out=True, **settings)

    def glob(self, pattern: str) -> Iterator[BucketPath]:
        """The files and folders that match a pattern such as "*.jsonl" or "*/config.yaml"."""
        first, _, rest = pattern.partition("/")
        if not any(mark in first for mark in "*?["):
            below = [self / first] if rest or (self / first).exists() else []
        else:
            below = [path for path in self.iterdir() if fnmatchcase(path.name, first)]
        if not rest:
            yield from below
            return
        folders = [path for path in below if path._folder is not False]
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            for found in pool.map(lambda path: list(path.glob(rest)), folders):
                yield from found

    @one_line_errors
    def all_files(self) -> list[BucketPath]:
        """All objects in the folder and its sub-folders."""
        names = (item["name"] for page in self._pages() for item in page.get("items", []))
        return [BucketPath(self.bucket, name, False) for name in names]

    # ---------------------------------------------------------------------------------------------------------- reading

    def open(self, mode: str = "r", **_) -> Any:
        """A stream to read the current content. Reading fails once the object is replaced."""
        if mode not in ("r", "rb"):
            raise ValueError(f"{self}: mode {mode} is not supported, because an object is written at once")
        stream = io.BufferedReader(ObjectReader(self), BLOCK)
        return stream if mode == "rb" else io.TextIOWrapper(stream, encoding="utf-8")

    @one_line_errors
    def read_bytes(self) -> bytes:
        return file_system().cat_file(f"{self.bucket}/{self.key}")

    @one_line_errors
    def read_range(self, start: int, end: int, generation: int) -> bytes:
        part = {"alt": "media", "generation": str(generation), "headers": {"Range": f"bytes={start}-{end - 1}"}}
        return file_system().call("GET", "b/{}/o/{}", self.bucket, self.key, **part)[1]

    # ---------------------------------------------------------------------------------------------------------- writing

    def mkdir(self, **_) -> None:
        """Does nothing: a folder exists once it contains an object."""

    @one_line_errors
    def write_bytes(self, data: bytes) -> None:
        """Replaces the object."""
        files = file_system()
        if len(data) > SINGLE_REQUEST:
            files.pipe_file(f"{self.bucket}/{self.key}", data)
            return
        place = f"{files._location}/upload/storage/v1/b/{self.bucket}/o"
        octets = {"Content-Type": "application/octet-stream"}
        files.call("POST", place, uploadType="media", name=self.key, headers=octets, data=data)

    @one_line_errors
    def append(self, data: bytes) -> None:
        """Adds data to the end of the object, or creates it. What another writer adds meanwhile stays.

        An object can't grow. So the data becomes an object of its own, and the service joins both to one.
        """
        part = self.with_name(f".{self.name}.{secrets.token_hex(4)}")  # hidden, and no other writer has it
        part.write_bytes(data)
        try:
            while not self._join(part):
                # Another writer came first. Or this data was joined, but the answer was lost and gcsfs asked again.
                found = self.stat()
                if self.read_range(max(0, found.st_size - len(data)), found.st_size, found.generation) == data:
                    return
        finally:
            part.unlink(missing_ok=True)

    def _join(self, part: BucketPath) -> bool:
        """Adds another object to the end of this one; False if this one changes meanwhile."""
        generation = self.stat().generation if self.is_file() else 0  # 0: it must not exist
        sources = [{"name": path.key} for path in ([self, part] if generation else [part])]
        joined = {"sourceObjects": sources, "destination": {"bucket": self.bucket, "name": self.key}}
        only_if = {"ifGenerationMatch": str(generation)}  # else another writer's data would be lost
        try:
            file_system().call("POST", "b/{}/o/{}/compose", self.bucket, self.key, json=joined, **only_if)
        except FileExistsError:  # what gcsfs makes of a failed precondition
            return False
        return True

    @one_line_errors
    def copy_to(self, other: BucketPath) -> None:
        file_system().cp_file(f"{self.bucket}/{self.key}", f"{other.bucket}/{other.key}")

    @one_line_errors
    def unlink(self, missing_ok: bool = False) -> None:
        try:
            file_system().call("DELETE", "b/{}/o/{}", self.bucket, self.key)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def delete_all(self) -> None:
        """Deletes every object in the folder."""
        for file in self.all_files():
            file.unlink(missing_ok=True)


#: A Path or a BucketPath.
Place = Any


def open_now(file: Place) -> BinaryIO:
    """A stream of the file. In a bucket it holds what the file has now, whatever is added while it is read."""
    return io.BytesIO(file.read_bytes()) if isinstance(file, BucketPath) else file.open("rb")


class ObjectReader(io.RawIOBase):
    """Reads one generation of an object."""

    def __init__(self, path: BucketPath):
        self.path, self.at = path, 0
        found = path.stat()
        self.size, self.generation = found.st_size, found.generation

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = max(0, offset + (0, self.at, self.size)[whence])
        return self.at

    def readinto(self, buffer) -> int:
        end = min(self.size, self.at + len(buffer))
        if end <= self.at:
            return 0
        data = self.path.read_range(self.at, end, self.generation)
        if len(data) != end - self.at:
            raise OSError(5, f"got {len(data)} bytes instead of {end - self.at}", str(self.path))
        buffer[: len(data)] = data
        self.at = end
        return len(data)
