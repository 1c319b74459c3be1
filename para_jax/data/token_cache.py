"""Caches the token ids of training data in the user's cache folder, so that the next start need not tokenise again.

A file's name is a hash of everything that its ids depend on: the content of the data, the tokenizer, some fields of
`data`, and the code and libraries that tokenise. A file is therefore never outdated. The least recently used files are
deleted when the folder exceeds MAX_BYTES.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np

from ..io.atomic import replacing
from ..io.checks import printable
from ..io.hub import cache_folder
from ..io.messages import warn
from .chat_template import writes_date

FORMAT = 2
#: Tokenising smaller data is about as fast as looking it up.
MIN_BYTES = 2**24
MAX_BYTES = 2**34
ENDING = ".npz"
#: Temporary files older than this were left by a killed process.
ABANDONED_SECONDS = 24 * 3600


class TokenisedExamples(NamedTuple):
    """Tokenised examples, as stored in the cache."""

    sizes: np.ndarray
    """int32 [examples, 2]: tokens in prompt and completion"""
    numbers: np.ndarray
    """int64 [examples]: the line or index of each in its source"""
    ids: np.ndarray
    """int32 [tokens]"""
    cut: int
    skipped: int


def tokenizer_key(tokenizer, fields: dict[str, Any]) -> str | None:
    """A hash of everything that ids depend on except the data. None for a tokenizer without readable content.

    Args:
        fields: the config fields that ids depend on, as JSON values.
    """
    content = getattr(getattr(tokenizer, "backend_tokenizer", None), "to_str", None)
    if content is None:  # a tokenizer written in Python
        return None
    simple = {
        name: value
        for name, value in tokenizer.init_kwargs.items()
        if name != "name_or_path" and isinstance(value, str | int | float | bool | None)
    }
    named = [type(tokenizer).__name__, simple, tokenizer.special_tokens_map, tokenizer.all_special_ids]
    named += [tokenizer.chat_template, tokenizer.split_special_tokens]
    if writes_date(tokenizer):
        named.append(today())
    used = [*map(version, ("tokenizers", "transformers", "jinja2")), code_digest(), FORMAT, np.little_endian]
    text = json.dumps([fields, named, used], sort_keys=True, default=str)
    return hashlib.sha256(text.encode() + content().encode()).hexdigest()


def today() -> str:
    return date.today().isoformat()


def code_digest() -> str:
    """The sha256 of the code in this package, which makes the ids."""
    return files_digest(sorted(Path(__file__).parent.glob("*.py")))


def files_digest(files: Iterable[Path]) -> str:
    """The sha256 of the files' concatenated content."""
    found = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while part := stream.read(2**20):
                found.update(part)
    return found.hexdigest()


def load_tokens(key: str, content: str) -> TokenisedExamples | None:
    """The cached ids. None if there are none, or the file is damaged.

    Args:
        key: from `tokenizer_key`.
        content: the sha256 of the data.
    """
    file = path_of(key, content)
    try:
        with np.load(file) as parts:
            tokens = TokenisedExamples(*(parts[name] for name in TokenisedExamples._fields))
        with suppress(OSError):  # a read-only cache is still useful
            file.touch()
        return tokens._replace(cut=int(tokens.cut), skipped=int(tokens.skipped))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        warn(f"ignoring the damaged cache file {file}: {printable(str(error), 200)}")
        return None


def store_tokens(key: str, content: str, tokens: TokenisedExamples) -> None:
    """Stores the ids for the next start, and deletes old files if needed. Warns if the cache cannot be written."""
    file = path_of(key, content)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as stream:
            np.savez(stream, **tokens._asdict())
        delete_oldest(file, MAX_BYTES)
    except OSError as error:
        warn(f"cannot cache token ids in {file.parent} ({error.strerror}); data.cache=false turns this off")


def delete_oldest(keep: Path, most: int) -> None:
    """Deletes temporary files that killed processes left, and the least recently used files, except `keep`, while all
    together exceed `most` bytes. Files that are named like `keep` count: a hash and its ending."""
    found, named = [], "?" * len(keep.stem) + keep.suffix
    for part in keep.parent.glob(f".{named}.????????"):
        with suppress(FileNotFoundError):
            if time.time() - part.stat().st_mtime > ABANDONED_SECONDS:
                part.unlink()
    for file in keep.parent.glob(named):
        with suppress(FileNotFoundError):  # another process may delete it first
            found.append((file.stat().st_mtime_ns, file, file.stat().st_size))
    total = sum(size for *_, size in found)
    for _, file, size in sorted(found):
        if total > most and file != keep:
            file.unlink(missing_ok=True)
            total -= size


def folder() -> Path:
    return cache_folder() / "tokens"


def path_of(key: str, content: str) -> Path:
    return folder() / (hashlib.sha256(f"{key} {content}".encode()).hexdigest() + ENDING)
