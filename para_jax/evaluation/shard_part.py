"""An evaluation's shard: which adapters it has, and what its shard file says."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .. import __version__
from ..inference.content import ANSWERS_VERSION
from ..io.shards import Shard


class ShardOfAdapters(NamedTuple):
    """One worker's share of an evaluation."""

    shard: Shard
    digests: Mapping[str, str]
    """a hash of each adapter of the evaluation, those of other shards too, by name"""

    @property
    def names(self) -> list[str]:
        """The adapters of this shard, in the order of all."""
        return [name for name, digest in self.digests.items() if self.shard.has_content(digest)]


def settings_of(
    content: str,
    device: str,
    writing: str,
    tasks: Iterable[tuple[Any, ...]],
    digests: Mapping[str, str],
    libraries: Mapping[str, str],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """What all shards of an evaluation must share, so that their answers and scores are those of one worker.

    Args:
        content, writing: hashes of the backbone, and of the tokenizer with its stop tokens.
        tasks: each task's names, owner, questions, and what else its scores depend on.
    """
    return {
        "version": [__version__, ANSWERS_VERSION],
        "libraries": dict(libraries),
        "device": device,
        "backbone": content,
        "tokenizer": writing,
        **options,  # before the tasks: an error names the first difference, and another limit gives other tasks
        "tasks": hash_of(tasks),
        "adapters": [len(digests), hash_of(digests.items())],
    }


def hash_of(parts: Iterable[Sequence[Any]]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        for value in part:
            for one in value if isinstance(value, list) else [value]:
                digest.update(repr(one).encode())
                digest.update(b"\n")
    return digest.hexdigest()
