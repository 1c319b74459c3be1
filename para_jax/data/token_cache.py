"""Token ids of training data in the user's cache folder, so that a second start need not tokenise again.

A file's name is a hash of everything that its ids depend on: the data's content, the tokenizer, the fields of `data`
that matter, and the code and libraries that make ids. So a file is never out of date, only unused: the least recently
used ones are deleted when the folder holds more than MAX_BYTES.
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

import numpy as np

from .. import devices
from ..atomic import replacing
from ..config import printable
from ..hub import cache_folder

FORMAT = 1
#: Smaller data is tokenised about as fast as it is looked up.
MIN_BYTES = 2**24
MAX_BYTES = 2**34
MAX_HEADER = 1000
ENDING = ".tokens"
#: A file that is being written is younger.
ABANDONED_SECONDS = 24 * 3600


class Tokens(NamedTuple):
    """Tokenised examples, as the cache keeps them."""

    sizes: np.ndarray
    """int32 [examples, 2], tokens of prompt and completion"""
    numbers: np.ndarray
    """int64 [examples], the line or index that each comes from"""
    ids: np.ndarray
    """int32 [tokens]"""
    cut: int
    skipped: int


def tokenizer_key(tokenizer, fields: dict[str, Any]) -> str | None:
    """A hash of all that ids depend on, except the data; None for a tokenizer whose content can't be read.

    Args:
        fields: the config's fields that matter, as JSON values.
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
    if "strftime" in str(tokenizer.chat_template):  # it writes the day, as Llama 3.2's does
        named.append(today())
    used = [*map(version, ("tokenizers", "transformers", "jinja2")), code_digest(), FORMAT, np.little_endian]
    text = json.dumps([fields, named, used], sort_keys=True, default=str)
    return hashlib.sha256(text.encode() + content().encode()).hexdigest()


def today() -> str:
    return date.today().isoformat()


def code_digest() -> str:
    """The sha256 of the code of data/, where ids are made."""
    return files_digest(sorted(Path(__file__).parent.glob("*.py")))


def files_digest(files: Iterable[Path]) -> str:
    """The sha256 of the files' content; that of one file alone is the usual one."""
    found = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while part := stream.read(2**20):
                found.update(part)
    return found.hexdigest()


def load_tokens(key: str, content: str) -> Tokens | None:
    """The ids that the cache holds; None where it holds none, or a damaged file.

    Args:
        key: of `tokenizer_key`.
        content: the data's sha256.
    """
    file = path_of(key, content)
    try:
        with file.open("rb") as stream:
            found = read_tokens(stream, file.stat().st_size)
        with suppress(OSError):  # a cache that can't be written is still of use
            file.touch()
        return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        devices.say(f"warning: {file} is damaged and not used: {printable(str(error), 200)}")
        return None


def store_tokens(key: str, content: str, tokens: Tokens) -> None:
    """Keeps the ids for the next start, and makes room for them. A cache that can't be written costs a warning."""
    parts = [np.ascontiguousarray(part) for part in tokens[:3]]
    header = dict(format=FORMAT, examples=len(tokens.sizes), tokens=len(tokens.ids), cut=tokens.cut)
    header |= dict(skipped=tokens.skipped, sha256=parts_digest(parts))
    file = path_of(key, content)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as stream:
            stream.write(json.dumps(header).encode() + b"\n")
            for part in parts:
                stream.write(part.data)
        delete_oldest(file)
    except OSError as error:
        devices.say(
            f"warning: the token ids can't be kept in {file.parent} ({error.strerror}); data.cache=false skips it"
        )


def read_tokens(stream, size: int) -> Tokens:
    line = stream.readline(MAX_HEADER)
    header = json.loads(line)
    examples, tokens, cut, skipped = (header[name] for name in ("examples", "tokens", "cut", "skipped"))
    if header["format"] != FORMAT or any(type(n) is not int or n < 0 for n in (examples, tokens, cut, skipped)):
        raise ValueError("its header is not of this version")
    if size != len(line) + 16 * examples + 4 * tokens:
        raise ValueError(f"it has {size} bytes, not those of {examples} examples with {tokens} tokens")
    sizes = np.fromfile(stream, np.int32, 2 * examples).reshape(-1, 2)
    numbers, ids = np.fromfile(stream, np.int64, examples), np.fromfile(stream, np.int32, tokens)
    if parts_digest([sizes, numbers, ids]) != header["sha256"]:
        raise ValueError("its sha256 is another one")
    if sizes.min(initial=1) < 1 or sizes.sum(dtype=np.int64) != tokens or ids.min(initial=0) < 0:
        raise ValueError("its sizes and ids don't fit")
    return Tokens(sizes, numbers, ids, cut, skipped)


def parts_digest(parts: list[np.ndarray]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part.data)
    return found.hexdigest()


def delete_oldest(keep: Path) -> None:
    """Deletes the least recently used files, but this one, while all of them have more than MAX_BYTES; and what killed
    writes left."""
    found = []
    for part in keep.parent.glob("." + "?" * 64 + ENDING + ".????????"):
        with suppress(FileNotFoundError):
            if time.time() - part.stat().st_mtime > ABANDONED_SECONDS:
                part.unlink()
    for file in keep.parent.glob("?" * 64 + ENDING):
        with suppress(FileNotFoundError):  # another process deletes too
            found.append((file.stat().st_mtime_ns, file, file.stat().st_size))
    total = sum(size for *_, size in found)
    for _, file, size in sorted(found):
        if total > MAX_BYTES and file != keep:
            file.unlink(missing_ok=True)
            total -= size


def folder() -> Path:
    return cache_folder() / "tokens"


def path_of(key: str, content: str) -> Path:
    return folder() / (hashlib.sha256(f"{key} {content}".encode()).hexdigest() + ENDING)
