"""Paths in a Google Cloud Storage bucket, gs://bucket/folder/file, with those methods of `pathlib.Path` that are used.

A bucket holds objects under names, and no folders: a folder is there as long as an object's name begins with it. An
object appears whole or not at all. Nothing is renamed. gcsfs (`pip install 'para_jax[gcs]'`) talks to the service.
"""

from __future__ import annotations

import functools
import io
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from email.utils import parsedate_to_datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

#: Bytes that are read ahead of a stream, and of the largest object that is written in one request.
BLOCK, SINGLE = 2**22, 2**23
#: Requests at once.
AT_ONCE = 16
#: Seconds until a request that gets no answer fails. It is tried again a few times.
TIMEOUT = 60
BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
#: The longest name of an object, in bytes.
LONGEST_NAME = 1024
SUPPORTED = "a path, or gs://bucket/folder for a Google Cloud Storage bucket"
INSTALL = "gcsfs is not installed, which gs:// needs; `pip install 'para_jax[gcs]'`"
#: Until when (time.monotonic) this process may write in the folders that it has locked; see bucket_lock.py.
DEADLINES: dict[BucketPath, float] = {}


def bucket_path(text: str | Path | BucketPath) -> BucketPath | None:
    """The path of a gs:// address; None for a path of the file system. ValueError for any other address."""
    if isinstance(text, BucketPath):
        return text
    found = re.match(r"(\w[\w+.-]*)://", str(text))
    if found is None:
        return None
    if found[1] != "gs":
        raise ValueError(f"{str(text)[:300]!r}: {found[1]}:// is not supported; expected {SUPPORTED}")
    bucket, _, key = str(text).removeprefix("gs://").partition("/")
    if not BUCKET.fullmatch(bucket):
        raise ValueError(f"{str(text)[:300]!r}: {bucket!r} can't be a bucket's name; expected gs://bucket/folder")
    key = key.rstrip("/")
    if key and not all(map(is_name, key.split("/"))):
        raise ValueError(f"{str(text)[:300]!r}: empty, '.', '..' or unprintable parts in the path; leave them out")
    if len(key.encode()) > LONGEST_NAME:
        raise ValueError(f"{str(text)[:80]!r}...: longer than {LONGEST_NAME} bytes, which no object's name is")
    return BucketPath(bucket, key)


address = bucket_path  # the old name


def is_name(part: str) -> bool:
    """Whether a part of an object's name is like that of a file. Names from a listing can be anything."""
    return part not in ("", ".", "..") and part.isprintable() and not set(part) & set("/\\")


def described(call: Callable) -> Callable:
    """A method whose errors are OSErrors of one line that name the path."""

    @functools.wraps(call)
    def calling(self: BucketPath, *arguments, **settings):
        try:
            return call(self, *arguments, **settings)
        except FileNotFoundError:
            raise FileNotFoundError(2, "no such object", str(self)) from None
        except FileExistsError:
            raise FileExistsError(17, "changed or made by somebody else meanwhile", str(self)) from None
        except ImportError:
            raise ValueError(f"{self}: {INSTALL}") from None
        except (ValueError, OSError) as error:
            if str(self) in str(error):
                raise
            raise OSError(5, reason(error), str(self)) from None
        except Exception as error:  # of aiohttp, google.auth and gcsfs
            raise OSError(5, reason(error), str(self)) from None

    return calling


def reason(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]
    line = line if line.isprintable() else repr(line)
    code = getattr(error, "code", None)
    if code in (401, 403) or "Forbidden" in str(error):
        return f"no access ({line}); `gcloud auth application-default login`, or give the host's service account access"
    return line


class Stat(NamedTuple):
    st_size: int
    generation: int
    """another one for each content that stood under the name"""
    age: float
    """seconds since it was written, by the service's own clock"""


class BucketPath:
    """gs://bucket/key, with the methods of pathlib.Path. `resolve`, `absolute` and `expanduser` change nothing."""

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
        if not all(map(is_name, added.split("/"))):
            raise ValueError(f"{self}: {added[:200]!r} is no name of a file in it")
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

    @property
    def parents(self) -> list[BucketPath]:
        return [self.parent, *self.parent.parents] if self.key else []

    def with_name(self, name: str) -> BucketPath:
        return self.parent / name

    def resolve(self) -> BucketPath:
        return self

    absolute = expanduser = resolve

    # ---------------------------------------------------------------------------------------------------- what is there

    @described
    def stat(self) -> Stat:
        headers, body = file_system().call("GET", "b/{}/o/{}", self.bucket, self.key)
        found = json.loads(body)
        now, written = parsedate_to_datetime(headers["Date"]), datetime.fromisoformat(found["updated"])
        return Stat(int(found["size"]), int(found["generation"]), (now - written).total_seconds())

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

    @described
    def is_dir(self) -> bool:
        if self._folder is not None:
            return self._folder
        try:
            found = self._page(maxResults=1)
        except FileNotFoundError:  # of the bucket
            return False
        return bool(found.get("items") or found.get("prefixes")) or not self.key

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def is_symlink(self) -> bool:
        return False

    @described
    def iterdir(self) -> Iterator[BucketPath]:
        """What lies in the folder. Names that could not be those of files are left out."""
        return iter(self._children())

    def _children(self) -> list[BucketPath]:
        found, token, start = {}, {}, f"{self.key}/" if self.key else ""
        while True:
            page = self._page(delimiter="/", **token)
            for item in page.get("items", []):
                found[item["name"][len(start) :]] = False
            for prefix in page.get("prefixes", []):
                found.setdefault(prefix[len(start) :].rstrip("/"), True)
            if not page.get("nextPageToken"):
                return [
                    BucketPath(self.bucket, start + name, folder) for name, folder in found.items() if is_name(name)
                ]
            token = {"pageToken": page["nextPageToken"]}

    def _page(self, **settings) -> dict[str, Any]:
        prefix = f"{self.key}/" if self.key else ""
        return file_system().call("GET", "b/{}/o", self.bucket, prefix=prefix, json_out=True, **settings)

    def glob(self, pattern: str) -> Iterator[BucketPath]:
        """The files and folders under names such as "*.jsonl" or "*/config.yaml"."""
        first, _, rest = pattern.partition("/")
        if not any(mark in first for mark in "*?["):
            below = [self / first] if rest or (self / first).exists() else []
        else:
            below = [path for path in self.iterdir() if fnmatchcase(path.name, first)]
        if not rest:
            yield from below
            return
        folders = [path for path in below if path._folder is not False]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for found in pool.map(lambda path: list(path.glob(rest)), folders):
                yield from found

    @described
    def all_files(self) -> list[BucketPath]:
        """The objects in the folder and in those below it."""
        found, token = [], {}
        while True:
            page = self._page(**token)
            found += [BucketPath(self.bucket, item["name"], False) for item in page.get("items", [])]
            if not page.get("nextPageToken"):
                return found
            token = {"pageToken": page["nextPageToken"]}

    # ---------------------------------------------------------------------------------------------------------- reading

    def open(self, mode: str = "r", **_) -> Any:
        """A stream to read. It sees the content that stands there now, or fails where that is replaced meanwhile."""
        if mode not in ("r", "rb"):
            raise ValueError(f"{self}: an object is written whole; mode {mode} is not possible")
        stream = io.BufferedReader(ObjectReader(self), BLOCK)
        return stream if mode == "rb" else io.TextIOWrapper(stream, encoding="utf-8")

    @described
    def read_bytes(self) -> bytes:
        return file_system().cat_file(f"{self.bucket}/{self.key}")

    def read_text(self) -> str:
        return self.read_bytes().decode()

    @described
    def read_range(self, start: int, end: int, generation: int) -> bytes:
        part = {"alt": "media", "generation": str(generation), "headers": {"Range": f"bytes={start}-{end - 1}"}}
        return file_system().call("GET", "b/{}/o/{}", self.bucket, self.key, **part)[1]

    # ---------------------------------------------------------------------------------------------------------- writing

    def mkdir(self, **_) -> None:
        """Nothing: a folder is there when it holds something."""

    @described
    def write_bytes(self, data: bytes, *, generation: int | None = None, is_lock: bool = False) -> int:
        """Writes the object, whole or not at all; the generation that it has now.

        Args:
            generation: only in the place of this one (0: only where none is); else FileExistsError.
            is_lock: this is the folder's own lock, which may be renewed late.
        """
        if not is_lock:
            self.require_held()
        files = file_system()
        if len(data) > SINGLE and generation is None:
            files.pipe_file(f"{self.bucket}/{self.key}", data)
            return 0
        if_match = {} if generation is None else {"ifGenerationMatch": str(generation)}
        place = f"{files._location}/upload/storage/v1/b/{self.bucket}/o"
        octets = {"Content-Type": "application/octet-stream"}
        done = files.call(
            "POST", place, uploadType="media", name=self.key, headers=octets, data=data, json_out=True, **if_match
        )
        return int(done["generation"])

    def create(self, data: bytes) -> None:
        """Writes an object whose name is free. FileExistsError if somebody else has taken it."""
        try:
            self.write_bytes(data, generation=0)
        except FileExistsError:
            if self.read_bytes() != data:  # the same: this very request, which was sent twice
                raise

    @described
    def copy_to(self, other: BucketPath) -> None:
        other.require_held()
        file_system().cp_file(f"{self.bucket}/{self.key}", f"{other.bucket}/{other.key}")

    @described
    def unlink(self, missing_ok: bool = False, generation: int | None = None) -> None:
        self.require_held()
        if_match = {} if generation is None else {"ifGenerationMatch": str(generation)}
        try:
            file_system().call("DELETE", "b/{}/o/{}", self.bucket, self.key, **if_match)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def delete_all(self) -> None:
        """Deletes the folder: every object in it."""
        for file in self.all_files():
            file.unlink(missing_ok=True)

    def require_held(self) -> None:
        """Raises OSError in a folder that this process had locked, where another may have taken over meanwhile."""
        for folder, deadline in list(DEADLINES.items()):
            if time.monotonic() > deadline and (folder == self or folder in self.parents):
                raise OSError(
                    16, "its lock could not be renewed, and another process may have taken over there", str(folder)
                )


#: A Path or a BucketPath, which have the same methods.
Place = Any


class ObjectReader(io.RawIOBase):
    """The bytes of an object, as one generation of it has them."""

    def __init__(self, path: BucketPath):
        self.path, self.at = path, 0
        found = path.stat()
        self.size, self.generation = found.st_size, found.generation

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = max(0, offset + (0, self.at, self.size)[whence])
        return self.at

    def readinto(self, buffer) -> int:
        end = min(self.size, self.at + len(buffer))
        if end <= self.at:
            return 0
        data = self.path.read_range(self.at, end, self.generation)
        if len(data) != end - self.at:
            raise OSError(5, f"{len(data)} bytes came instead of {end - self.at}", str(self.path))
        buffer[: len(data)] = data
        self.at = end
        return len(data)


def file_system() -> Any:
    """gcsfs, one a process: what it holds open does not survive a fork."""
    return _file_system(os.getpid())


@functools.cache
def _file_system(process: int) -> Any:
    import fsspec.config
    from gcsfs.core import GCSFileSystem

    if logging.getLogger("gcsfs").level == logging.NOTSET:
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs the traceback of an error that it raises too
    # orbax makes its own, which must see what this one writes
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return GCSFileSystem(use_listings_cache=False, requests_timeout=TIMEOUT, skip_instance_cache=True)
