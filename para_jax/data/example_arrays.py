"""Examples in a few arrays, at 4 bytes per token. Python lists need ten times as much."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .examples import Example

HASHED_AT_ONCE = 4096  # examples


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


class ExampleBuilder:
    """Collects examples into arrays."""

    def __init__(self):
        self.ids, self.sizes = array("i"), array("i")

    def add(self, examples: Iterable[Example]) -> None:
        for prompt, completion in examples:
            self.ids.extend(prompt)
            self.ids.extend(completion)
            self.sizes.extend((len(prompt), len(completion)))

    def __len__(self) -> int:
        return len(self.sizes) // 2

    def arrays(self) -> ExampleArrays:
        """The added examples, without a copy. No more can be added afterwards."""
        return ExampleArrays(np.frombuffer(self.ids, np.int32), np.frombuffer(self.sizes, np.int32).reshape(-1, 2))


def prompt_and_completion_sizes(examples: Sequence[Example]) -> np.ndarray:
    """Tokens in each example's prompt and completion, int32 [examples, 2]."""
    if isinstance(examples, ExampleArrays):
        return examples.sizes
    return np.array([(len(prompt), len(completion)) for prompt, completion in examples], np.int32).reshape(-1, 2)


def examples_digest(examples: Sequence[Example]) -> str:
    """The sha256 of each example as int64: the two sizes, then the ids. Checkpoints store it."""
    found = hashlib.sha256()
    if not isinstance(examples, ExampleArrays):
        for prompt, completion in examples:
            found.update(array("q", [len(prompt), len(completion), *prompt, *completion]).tobytes())
        return found.hexdigest()
    for first in range(0, len(examples), HASHED_AT_ONCE):
        last = min(first + HASHED_AT_ONCE, len(examples))
        begin, end = examples.starts[first], examples.starts[last]
        sizes_at = examples.starts[first:last] - begin + 2 * np.arange(last - first)
        values = np.empty(end - begin + 2 * (last - first), np.int64)
        is_id = np.ones(len(values), bool)
        for column in (0, 1):
            values[sizes_at + column] = examples.sizes[first:last, column]
            is_id[sizes_at + column] = False
        values[is_id] = examples.ids[begin:end]
        found.update(values.tobytes())
    return found.hexdigest()
