"""The compiled shapes of an evaluation. Each shape is a program, which takes minutes to compile for a large model.

PlannedShapes are chosen once over all examples that a run may ever score, so there are few of them. OpenShapes depend
on the length of a question alone, so its answer has the same bits whatever else is asked. Padding is masked: no score
depends on the shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from ..data.batches import Bucket, best_lengths, plan_buckets, rounded_up
from ..data.examples import Example
from ..inference.generate import CACHE_MULTIPLE
from ..io.messages import say
from .tasks import EncodedTask

#: Padded lengths of the pass for likelihoods, and of prompts after which answers are written.
SCORED_LENGTHS, WRITTEN_LENGTHS = 3, 2
#: Completions of at most this many tokens are padded to one length; longer ones to two.
SHORT_COMPLETION = 8


class PlannedShapes(NamedTuple):
    """The few shapes in which known examples are scored."""

    buckets: tuple[Bucket, ...]
    """of the pass for likelihoods: prompts with their completions, or prompts alone"""
    of_prompts: bool
    """whether the buckets hold prompts alone; each is then read once for all its completions"""
    completions: tuple[int, ...] = ()
    """padded tokens of the completions that follow such a prompt"""
    prompts: tuple[int, ...] = ()
    """padded tokens of the prompts after which answers are written"""
    cache: int = 0
    """tokens per row that the cache holds while answers are written"""

    def context(self, length: int) -> int:
        """Padded tokens of a context."""
        return padded_to(length, [bucket.length for bucket in self.buckets])

    def context_cache(self, length: int) -> int:
        """Tokens per row that the cache holds behind a context; contexts that share it share the continuations'
        programs."""
        return self.buckets[-1].length

    def continuation(self, length: int) -> int:
        """Padded tokens of a continuation."""
        return padded_to(length, self.completions)

    def prompt(self, length: int) -> int:
        """Padded tokens of a prompt after which an answer is written."""
        return padded_to(length, self.prompts)

    def writing_cache(self, length: int) -> int:
        """Tokens per row that the cache holds for a prompt and what is written after it."""
        return self.cache


class OpenShapes(NamedTuple):
    """Shapes for any question. The methods are those of PlannedShapes."""

    longest: int
    """the model's positions"""

    def context(self, length: int) -> int:
        """16, 24, 32, 48, 64, 96, 128, 192, ... tokens: few sizes, little padding."""
        size = max(16, 1 << (length - 1).bit_length())
        size = size * 3 // 4 if length <= size * 3 // 4 and size > 16 else size
        return min(size, self.longest)

    def context_cache(self, length: int) -> int:
        """64, 128, 256, ... tokens."""
        return min(max(64, 1 << (length - 1).bit_length()), self.longest)

    def continuation(self, length: int) -> int:
        """1, 2, 4, 8, ... tokens."""
        return 1 << (length - 1).bit_length()

    def prompt(self, length: int) -> int:
        return self.context(length)

    def writing_cache(self, length: int) -> int:
        return self.context_cache(length)


Shapes = PlannedShapes | OpenShapes


def plan_shapes(tasks: Sequence[EncodedTask]) -> PlannedShapes:
    """Few programs for all the tasks together. Where answers are ranked: three for likelihoods and two for completions.
    Where they are written: three for likelihoods, two for prompts and one for decoding. Where both are: eight.

    The lengths are those that pad the fewest tokens altogether. Raises ValueError if the tasks have no examples.
    """
    asked = [example for task in tasks for example in [*task.examples, *task.ranked]]
    writing = [task for task in tasks if task.task.writes]
    of_prompts = any(task.ranked for task in tasks)
    held = [Example(prompt, []) for prompt, _ in asked] if of_prompts else asked
    shapes = PlannedShapes(plan_buckets(held, SCORED_LENGTHS), of_prompts)
    if of_prompts:
        lengths = np.array([len(completion) for _, completion in asked])
        count = 1 if lengths.max() <= SHORT_COMPLETION else 2
        shapes = shapes._replace(completions=tuple(best_lengths(lengths, count)))
    if writing:
        lengths = np.array([len(prompt) for task in writing for prompt, _ in task.examples])
        prompts = tuple(best_lengths(rounded_up(lengths), WRITTEN_LENGTHS))
        needed = int(lengths.max()) + max(task.task.max_new_tokens for task in writing)
        cache = max(rounded_up(needed, CACHE_MULTIPLE), prompts[-1])
        shapes = shapes._replace(prompts=prompts, cache=cache)
    return shapes


def padded_to(length: int, lengths: Sequence[int]) -> int:
    """The shortest of the lengths, which are in order, that is at least this one."""
    return next(padded for padded in lengths if padded >= length)


def batch_rows(batch_size: int) -> int:
    """The rows of a compiled batch: `batch_size`, rounded up to a multiple of data x fsdp of the current mesh. Every
    device would compute the whole of any other batch."""
    mesh = jax.sharding.get_abstract_mesh()
    return batch_size if mesh.empty else rounded_up(batch_size, mesh.shape["data"] * mesh.shape["fsdp"])


def say_evaluation(parts: Mapping[str, Sequence[EncodedTask]], batch_size: int) -> None:
    """Reports what a run's evaluations compute on the current mesh.

    Args:
        parts: the tasks of each split.
    """
    each = [f"{sum(len(one.examples) for one in tasks)} {split} examples" for split, tasks in parts.items()]
    new = max((one.task.max_new_tokens for tasks in parts.values() for one in tasks if one.task.writes), default=0)
    writes = f", with answers of up to {new} tokens; eval.limit and eval.test_limit score fewer" if new else ""
    if parts:
        say(f"evaluation: {' and '.join(each)}, in batches of {batch_rows(batch_size)} rows{writes}")
