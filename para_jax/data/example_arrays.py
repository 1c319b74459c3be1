"""Examples in a few arrays, at 4 bytes per token. Python lists need ten times as much."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .examples import Example


class ExampleArrays(Sequence[Example]):
    """A sequence of examples, each created when it is indexed."""

    def __init__(self, ids: np.ndarray, sizes: np.ndarray):
        """
        Args:
            ids: int32 [tokens]: each example's prompt and completion, concatenated.
            sizes: int32 [examples, 2]: tokens in prompt and completion.
        """
        self.ids, self.sizes = ids, sizes
        self.lengths = sizes.sum(axis=1, dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        assert self.starts[-1] == len(ids), (self.starts[-1], len(ids))

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        ids, prompt = self.ids[self.starts[index] : self.starts[index + 1]].tolist(), int(self.sizes[index, 0])
        return Example(ids[:prompt], ids[prompt:])


def arrays_of(examples: Iterable[Example]) -> ExampleArrays:
    """The examples as arrays, made without a list of them."""
    if isinstance(examples, ExampleArrays):
        return examples
    ids, sizes = array("i"), array("i")
    for prompt, completion in examples:
        ids.extend(prompt)
        ids.extend(completion)
        sizes.extend((len(prompt), len(completion)))
    return ExampleArrays(np.frombuffer(ids, np.int32), np.frombuffer(sizes, np.int32).reshape(-1, 2))


def examples_digest(examples: Sequence[Example]) -> str:
    """The sha256 of each example as int64: the two sizes, then the ids. Checkpoints store it."""
    arrays, found = arrays_of(examples), hashlib.sha256()
    for sizes, start, end in zip(arrays.sizes, arrays.starts, arrays.starts[1:], strict=False):
        found.update(sizes.astype(np.int64).tobytes() + arrays.ids[start:end].astype(np.int64).tobytes())
    return found.hexdigest()
