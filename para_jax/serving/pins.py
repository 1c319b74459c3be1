"""The prompts whose beginnings an engine keeps in its prefix cache."""

from __future__ import annotations

from collections.abc import Sequence

from ..io.checks import shorten
from .prefix_cache import PrefixCache


class Pins:
    """The pinned prompts. `kept` is replaced as a whole, so any thread may read it. Only a thread that holds the
    engine's lock may change it."""

    def __init__(self, cache: PrefixCache, blocks: int):
        """
        Args:
            blocks: how many may be pinned.
        """
        self.cache, self.blocks = cache, blocks
        self.kept: dict[tuple[int, ...], list[bytes]] = {}
        """the keys of each prompt's complete blocks, by the ids in them"""

    def add(self, ids: Sequence[int]) -> int:
        """Pins a prompt, and returns how many of its tokens are in complete blocks. Raises ValueError for one that is
        too short, and where the cache has no room."""
        keys, size = self.cache.keys(ids), self.cache.size
        if not keys:
            raise ValueError(f"pin: {len(ids)} tokens are less than a block of {size}; give a longer prefix")
        kept = self.kept | {self._complete(ids): keys}
        needed = len({key for of_one in kept.values() for key in of_one})
        if needed > self.blocks:
            raise ValueError(
                f"pin: the pinned prefixes would have {needed * size} tokens, and the cache has room for "
                f"{self.blocks * size}; make the engine with larger prefix_cache_bytes"
            )
        self.kept = kept
        return len(keys) * size

    def remove(self, ids: Sequence[int], prefix: object) -> None:
        """Unpins the prompts with these complete blocks. Raises ValueError that names the `prefix` if there are
        none."""
        if not self.drop(self._complete(ids)):
            raise ValueError(f"unpin: {shorten(prefix)} is not pinned")

    def drop(self, ids: tuple[int, ...]) -> bool:
        """Unpins complete blocks. Returns whether they were pinned."""
        found = ids in self.kept
        self.kept = {kept: keys for kept, keys in self.kept.items() if kept != ids}
        return found

    def _complete(self, ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(ids[: len(ids) // self.cache.size * self.cache.size])
