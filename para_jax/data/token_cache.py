"""Caches the token ids of training data in the user's cache folder, so that the next start need not tokenise again.

A file's name is a hash of everything that its ids depend on: the content of the data, the tokenizer, some fields of
`data`, and the code and libraries that tokenise. A file is therefore never outdated. The least recently used files are
deleted when the folder exceeds MAX_BYTES.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..io.atomic import replacing
from ..io.hub import cache_folder
from ..io.messages import warn
from ..io.storage.bucket import Place
from .chats import writes_date

#: Tokenising smaller data is about as fast as looking it up.
MIN_BYTES = 2**24
MAX_BYTES = 2**34


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


def cache_file(files: Sequence[Place], tokenizer, fields: dict[str, Any]) -> Path | None:
    """The file for the token ids of this data. None for small data, and a tokenizer without readable content.

    Args:
        files: those that hold the data.
        fields: the config fields that ids depend on, as JSON values.
    """
    content = getattr(getattr(tokenizer, "backend_tokenizer", None), "to_str", None)
    if content is None or sum(file.stat().st_size for file in files) < MIN_BYTES:
        return None
    simple = {
        name: value
        for name, value in tokenizer.init_kwargs.items()
        if name != "name_or_path" and isinstance(value, str | int | float | bool | None)
    }
    parts = [fields, type(tokenizer).__name__, simple, tokenizer.special_tokens_map, tokenizer.all_special_ids]
    parts += [tokenizer.chat_template, tokenizer.split_special_tokens, today() if writes_date(tokenizer) else ""]
    parts += [content(), *map(version, ("tokenizers", "transformers", "jinja2")), code_digest(), files_digest(files)]
    text = json.dumps(parts, sort_keys=True, default=str)
    return folder() / f"{hashlib.sha256(text.encode()).hexdigest()}.npz"


def folder() -> Path:
    return cache_folder() / "tokens"


def today() -> str:
    return date.today().isoformat()


def code_digest() -> str:
    """The sha256 of the code in this package, which makes the ids."""
    return files_digest(sorted(Path(__file__).parent.glob("*.py")))


def files_digest(files: Sequence[Place]) -> str:
    """The sha256 of the files' concatenated content."""
    found = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while part := stream.read(2**20):
                found.update(part)
    return found.hexdigest()


def load_tokens(file: Path) -> TokenisedExamples | None:
    """The cached ids; None if there are none."""
    if not file.is_file():
        return None
    with suppress(OSError):  # a read-only cache is still useful
        file.touch()
    with np.load(file) as parts:
        tokens = TokenisedExamples(*(parts[name] for name in TokenisedExamples._fields))
    return tokens._replace(cut=int(tokens.cut), skipped=int(tokens.skipped))


def store_tokens(file: Path, tokens: TokenisedExamples) -> None:
    """Stores the ids for the next start, and deletes old files if needed. Warns if the cache cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as stream:
            np.savez(stream, **tokens._asdict())
        delete_oldest(file, MAX_BYTES)
    except OSError as error:
        warn(f"cannot cache token ids in {file.parent} ({error.strerror}); data.cache=false turns this off")


def delete_oldest(keep: Path, most: int) -> None:
    """Deletes the least recently used files, except `keep`, while all together exceed `most` bytes."""
    total = keep.stat().st_size
    others = [(file.stat(), file) for file in keep.parent.glob("*.npz") if file != keep]
    for stat, file in sorted(others, key=lambda part: part[0].st_mtime_ns, reverse=True):
        total += stat.st_size
        if total > most:
            file.unlink(missing_ok=True)
