"""Tasks: the scores of a run's tenants on held-out examples, from questions to answers to scores.

With shuffled prompts, the factors are made from another example's prompt: the score then loses what it owes to reading
its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..adapters.rows import Stack
from ..data.batches import epoch_bits, permutation
from .answers import Answerer
from .batch_adapters import StackBank
from .questions import Answer
from .score import Score, score_answers
from .shapes import plan_shapes
from .tasks import EncodedTask, EvalTask, check_room, encode_task


class Tasks:
    """The tasks of many tenants (None: a tenant has none). Compiled shapes are planned once, whoever is scored."""

    def __init__(
        self,
        model,
        tokenizer,
        tasks: Sequence[EvalTask | None],
        limit: int | Sequence[int | None] | None = None,
        split: str = "evaluation",
        *,
        rows: int = 16,
    ):
        """
        Args:
            limit: score at most this many examples of each task, from its start. A list has a limit for each task.
            split: names the examples where the progress is shown.
            rows: of a batch, over all devices; rounded up to what the mesh divides.

        Raises ValueError for an example that the model has no tokens or too few positions for.
        """
        self.model, self.tokenizer, self.split, self.rows = model, tokenizer, split, rows
        limits = limit if isinstance(limit, Sequence) else [limit] * len(tasks)
        self.encoded = {i: encode_task(task, tokenizer, limits[i]) for i, task in enumerate(tasks) if task}
        for encoded in self.encoded.values():
            check_room(model.config, encoded)
        self.shapes = plan_shapes(list(self.encoded.values())) if self.encoded else None

    def scores(self, stack: Stack, slots: Mapping[int, int]) -> dict[int, Score]:
        """The scores of tenants, each with the adapter in its slot of the stack (-1: the backbone). Tenants without a
        task are left out."""
        scored = [tenant for tenant in slots if tenant in self.encoded]
        if not scored:
            return {}
        answerer = Answerer(self.model, StackBank(stack), self.tokenizer, rows=self.rows, shapes=self.shapes)
        asked = [(None if slots[tenant] < 0 else slots[tenant], self.encoded[tenant]) for tenant in scored]
        count = sum(len(task.examples) for _, task in asked)
        found = answer_tasks(answerer, asked, None, f"scoring {count} {self.split} examples")
        return {tenant: score_answers(self.encoded[tenant], one) for tenant, one in zip(scored, found, strict=True)}


def share_shapes(*parts: Tasks) -> None:
    """Plans one set of shapes for several Tasks, such as a run's validation and test, which then share programs."""
    encoded = [one for part in parts for one in part.encoded.values()]
    shapes = plan_shapes(encoded) if encoded else None
    for part in parts:
        part.shapes = shapes


def answer_tasks(
    answerer: Answerer, asked: Sequence[tuple[Any, EncodedTask]], shuffle: int | None, what: str
) -> list[list[Answer]]:
    """The answers to each task's questions by a tenant of the answerer's bank (None: the base model)."""
    questions = [task.questions(other_prompts(task, shuffle)) for _, task in asked]
    answers = iter(
        answerer.answer(
            [(tenant, one) for (tenant, _), of_task in zip(asked, questions, strict=True) for one in of_task], what
        )
    )
    return [[next(answers) for _ in of_task] for of_task in questions]


# ----------------------------------------------------------------------------------------------------- shuffled prompts


def other_prompts(encoded: EncodedTask, shuffle: int | None) -> list[list[int]] | None:
    """The prompt of another example for each one; None without a seed."""
    if shuffle is None:
        return None
    prompts = [example.prompt_ids for example in encoded.examples]
    return [prompts[i] for i in derangement(encoded.task.name, len(prompts), shuffle)]


def derangement(name: str, count: int, seed: int) -> np.ndarray:
    """For each of `count` examples, the one whose prompt it reads, int [count]: a cycle through all of them in an order
    drawn by the seed, so that no example follows itself (Sattolo 1986)."""
    if count < 2:
        raise ValueError(f"{name}: {count} example; to shuffle prompts at least 2 are needed")
    order, followers = permutation(epoch_bits(seed), count), np.zeros(count, int)
    followers[order] = np.roll(order, -1)
    return followers
