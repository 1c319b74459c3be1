"""evaluate: the scores of adapters on held-out examples, from tasks to questions to answers to scores.

The factors are made from an example's prompt and never see an answer that is ranked. With shuffled prompts they are
made from another example's prompt: the score then loses what it owes to reading its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..adapters.rows import Stack, require_adapter, stack_adapters
from ..config import listed, shorten
from ..config.bounds import PositiveInt, Seed, check_value
from ..data.batches import epoch_bits, permutation
from ..data.examples import require_tokenizer
from ..model import require_backbone
from .answers import Answerer
from .batch_adapters import StackBank
from .questions import Answer
from .samples import logged_samples
from .score import Score, score_answers
from .shapes import plan_shapes
from .tasks import EncodedTask, EvalTask, check_room, encode_task


class Report(NamedTuple):
    """What `evaluate` gives back: a score for each task. Printed, it is a line for each."""

    scores: tuple[Score, ...]
    samples: tuple[list[dict], ...] = ()
    """with `log_samples`: for each task, what was answered to each example (samples.py)"""

    def __repr__(self) -> str:
        return "\n".join(map(str, self.scores))


def evaluate(
    model,
    adapters,
    tasks: Iterable[EvalTask],
    *,
    tokenizer,
    limit: int | None = None,
    shuffle_prompts: bool = False,
    seed: int = 0,
    log_samples: bool = False,
) -> Report:
    """The score of each task, with one adapter for every example (or None: the backbone).

    Args:
        tasks: such as that of a run's data, from para_jax.evaluation.tasks.task_of_run.
        limit: score at most this many examples of each task, from its start.
        shuffle_prompts: give each example the factors that the adapter makes of another example's prompt; what is
            scored and written still follows its own. Prompts are permuted by `seed`; no example keeps its own.
        log_samples: also report each example's prompt, expected and given answer, and scores.

    Raises ValueError for what is no EvalTask, for an adapter of another backbone, for a limit below 1, for a task with
    one example if prompts are shuffled, and for an example that the model has no tokens or too few positions for.
    """
    require_backbone(model)
    require_tokenizer(tokenizer)
    if adapters is not None:
        require_adapter("evaluate", adapters, model.config)
    check_value("limit", limit, PositiveInt | None)
    check_value("seed", seed, Seed)
    given = listed(tasks)
    wrong = [tasks] if given is None else [task for task in given if not isinstance(task, EvalTask)]
    if given is None or wrong:
        raise ValueError(
            f"tasks: {shorten(wrong[0])} is no EvalTask; give a list, such as [task_of_run(config, 'test', tokenizer)]"
        )
    shuffle = seed if shuffle_prompts else None
    scores: dict[int, Score] = {}
    samples: dict[int, list[dict]] = {}
    for alike in sorted({(task.ranks, task.batch_size) for task in given}):  # tasks that share their programs
        members = [i for i, task in enumerate(given) if (task.ranks, task.batch_size) == alike]
        part = Tasks(model, tokenizer, [given[i] for i in members], limit)
        found = part.answer_one(adapters, shuffle=shuffle)
        for i, encoded, answers in zip(members, part.encoded.values(), found, strict=True):
            scores[i] = score_answers(encoded, answers)
            samples |= {i: logged_samples(encoded, answers)} if log_samples else {}
    return Report(tuple(scores[i] for i in range(len(given))), tuple(samples[i] for i in sorted(samples)))


class Tasks:
    """The tasks of many tenants (None: a tenant has none), in compiled shapes that are planned once, whoever is scored.
    All of them have one batch size."""

    def __init__(
        self,
        model,
        tokenizer,
        tasks: Sequence[EvalTask | None],
        limit: int | Sequence[int | None] | None = None,
        split: str = "evaluation",
    ):
        """
        Args:
            limit: score at most this many examples of each task, from its start. A list has a limit for each task.
            split: names the examples where the progress is shown.

        Raises ValueError for an example that the model has no tokens or too few positions for.
        """
        self.model, self.tokenizer, self.split = model, tokenizer, split
        limits = limit if isinstance(limit, Sequence) else [limit] * len(tasks)
        self.encoded = {i: encode_task(task, tokenizer, limits[i]) for i, task in enumerate(tasks) if task}
        for encoded in self.encoded.values():
            check_room(model.config, encoded)
        self.shapes = plan_shapes(list(self.encoded.values())) if self.encoded else None

    def scores(self, stack: Stack, slots: Mapping[int, int]) -> dict[int, Score]:
        """The scores of tenants, each with the adapter in its slot of the stack (-1: the backbone). Tenants without a
        task are left out."""
        scored = [tenant for tenant in slots if tenant in self.encoded]
        names = [None if slots[tenant] < 0 else slots[tenant] for tenant in scored]
        found = self._answers(StackBank(stack), scored, names)
        return {tenant: score_answers(self.encoded[tenant], one) for tenant, one in zip(scored, found, strict=True)}

    def answer_one(self, adapter, *, shuffle: int | None = None) -> list[list[Answer]]:
        """The answers to each task's questions with the same adapter; None: the backbone.

        Args:
            shuffle: the seed by which examples get the factors of each other's prompts.
        """
        bank = None if adapter is None else StackBank(stack_adapters([adapter]))
        name = None if adapter is None else 0
        return self._answers(bank, list(self.encoded), [name] * len(self.encoded), shuffle)

    def _answers(self, bank, tenants: list[int], names: list, shuffle: int | None = None) -> list[list[Answer]]:
        tasks = [self.encoded[tenant] for tenant in tenants]
        if not tasks:
            return []
        rows = tasks[0].task.batch_size
        answerer = Answerer(self.model, bank, self.tokenizer, rows=rows, shapes=self.shapes)
        what = f"scoring {sum(len(task.examples) for task in tasks)} {self.split} examples"
        return answer_tasks(answerer, list(zip(names, tasks, strict=True)), shuffle, what)


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
