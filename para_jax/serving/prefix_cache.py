"""Which blocks of the engine's pool are in use, and which tokens they hold: the prefix cache, without its arrays.

A block is identified by a hash of the backbone, of all tokens before it and of its own tokens, so it is found only if
the whole prompt up to its end is the same. Prompts at work and rows refer to their blocks. A known block that nothing
refers to stays until its room is needed; the least recently used is dropped first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class PrefixCacheStats(NamedTuple):
    """Statistics of an engine's prefix cache. Hits divided by queries is the share of prompt tokens that did not have
    to be computed. A prompt that is still kept whole for the same adapter is not looked up, and counts in neither."""

    queries: int
    """tokens of all prompts that were looked up"""
    hits: int
    """tokens of them that were found"""
    bytes: int
    """of the blocks that are known"""


def prompt_key(adapter: str | None, ids: Sequence[int], salt: str | None = None) -> tuple:
    """What a prefilled prompt depends on: PARA's factors come from all of it. An adapter's name is not enough, because
    it may be replaced. A prefix is not enough, because its last token differs. The salt keeps those apart who may not
    share. Ids enter as a hash: a tuple of them would be hashed at every look.

    Args:
        adapter: the hash of its content.
    """
    return adapter, hashlib.sha256(np.array(ids, np.int32).tobytes()).digest(), salt


class PrefixCache:
    """The blocks of a pool, from 1 on: block 0 is no row's. Used by one thread at a time."""

    def __init__(self, blocks: int, size: int, content: str, *, enabled: bool = True):
        """
        Args:
            size: tokens per block.
            content: identifies the backbone.
            enabled: False: no block is ever found again.
        """
        self.blocks, self.size, self.enabled = blocks, size, enabled
        self.queries = self.hits = 0
        self._root = hashlib.sha256(content.encode()).digest()
        self.clear()

    def clear(self) -> None:
        """Forgets all blocks. The counts stay."""
        self._free = list(range(self.blocks, 0, -1))  # pop() then takes the lowest first
        self._of_key: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._references = [0] * (self.blocks + 1)
        self._idle: OrderedDict[int, None] = OrderedDict()
        """known blocks that nothing refers to, the least recently used first"""

    @property
    def available(self) -> int:
        """How many blocks can be taken."""
        return len(self._free) + len(self._idle)

    def blocks_of(self, tokens: int) -> int:
        """The number of blocks that a number of tokens takes, with the last, incomplete one."""
        return -(-tokens // self.size)

    def keys(self, ids: Sequence[int], salt: str | None = None) -> list[bytes]:
        """The keys of a prompt's complete blocks: each hashes the key before it and its own tokens. With a salt, they
        are the same only for prompts of that salt."""
        key = self._root
        if salt is not None:  # no block's key begins like this
            key = hashlib.sha256(b"salt" + self._root + salt.encode("utf-8", "surrogatepass")).digest()
        keys = []
        for start in range(0, len(ids) - self.size + 1, self.size):
            tokens = np.array(ids[start : start + self.size], np.int32)
            key = hashlib.sha256(key + tokens.tobytes()).digest()
            keys.append(key)
        return keys

    def find(self, key: bytes) -> int | None:
        """The block of a key, with one more reference; None if it is not known."""
        block = self._of_key.get(key)
        if block is not None:
            self._idle.pop(block, None)  # in use again, so it can not be taken
            self._references[block] += 1
        return block

    def share(self, blocks: Sequence[int]) -> None:
        """Adds a reference to blocks that are in use."""
        for block in blocks:
            self._references[block] += 1

    def take(self) -> int:
        """A block to write, with one reference. There must be one: see `available`."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._idle.popitem(last=False)  # the least recently used
            del self._of_key[self._key_of.pop(block)]
        self._references[block] = 1
        return block

    def publish(self, block: int, key: bytes) -> None:
        """Lets others find a block, unless they find another one of this key already."""
        if self.enabled and key not in self._of_key:
            self._of_key[key], self._key_of[block] = block, key

    def release(self, blocks: Sequence[int]) -> None:
        """Gives up references to blocks, which are in the order of their tokens."""
        for block in reversed(blocks):  # a later one is of use only with those before it, so it goes first
            self._references[block] -= 1
            if self._references[block]:  # others share it
                continue
            if block in self._key_of:  # its content may be found again
                self._idle[block] = None
            else:
                self._free.append(block)

    @property
    def known(self) -> int:
        """How many blocks can be found."""
        return len(self._of_key)
