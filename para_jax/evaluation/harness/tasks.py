"""lm-eval's tasks for many adapters: record, run, replay. A recording LM collects a task's requests once; they are
answered for all adapters in one pass (mixed.py); a replaying LM hands each adapter's answers to lm-eval's own scorer.

This module needs lm-eval.
"""

from __future__ import annotations

import difflib
import io
import logging
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from ...config import require, shorten
from ..many import SEEDS
from ..questions import Answer, Asked, Likelihood, Scored, Written
from .requests import NO_PROMPT, TokenLM

#: Draws of a standard error that is bootstrapped; means have a closed form.
BOOTSTRAP = 1000
COMPUTED = ("loglikelihood", "generate_until")


class HarnessTask(NamedTuple):
    """A task, group or tag of lm-eval, with how its requests are made."""

    name: str
    loaded: Any
    """what TaskManager.load gives"""
    limit: int | None
    chat: bool

    def run(self, lm: LM, **options) -> dict:
        """lm-eval's results of an LM; the requests are the same every time."""
        seed(self.loaded)
        chat = dict(apply_chat_template=self.chat, fewshot_as_multiturn=self.chat)
        return dict(evaluate(lm, self.loaded, limit=self.limit, **chat, **options) or {})


class Recorder(TokenLM):
    """Collects questions, and answers none of them."""

    def __init__(self, tokenizer, max_length: int, seed: int, *, room: int | None = None):
        super().__init__(tokenizer, max_length, seed, room=room)
        self.asked: list[Asked] = []

    def answered(self, asked: list[Asked]) -> Sequence[Answer]:
        self.asked += asked
        return [Scored(0.0, False) if isinstance(one, Likelihood) else Written("", 0) for one in asked]


class SecondRound(ValueError):
    """Requests that were not recorded, for they depend on answers."""


class Replay(TokenLM):
    """Answers from a recorded pass."""

    def __init__(self, tokenizer, max_length: int, seed: int, answer: Callable[[Asked], Answer | None], task: str):
        super().__init__(tokenizer, max_length, seed)
        self.answer, self.task = answer, task

    def answered(self, asked: list[Asked]) -> Sequence[Answer]:
        found = [self.answer(one) for one in asked]
        if None in found:
            raise SecondRound(
                f"task {self.task}: asks a second round of requests, which depend on answers, and can't be answered "
                "for many adapters in one pass; run it with `para-jax lm-eval`"
            )
        return [answer for answer in found if answer is not None]


def load_tasks(
    names: Sequence[str], include_path: Path | None, *, limit: int | None, fewshot: int | None, chat: bool
) -> list[HarnessTask]:
    """lm-eval's tasks, groups or tags of these names.

    Args:
        include_path: a folder of further task files.
        fewshot: examples in each context, in place of the tasks' own number.

    Raises ValueError for an unknown name, with the nearest, and for a task whose data can't be had.
    """
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    manager = manager_of(names, include_path)
    tasks = []
    for name in names:
        if name not in manager.all_tasks:
            nearest = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"the nearest are {', '.join(nearest)}" if nearest else "`para-jax lm-eval ls tasks` lists them"
            raise ValueError(
                f"task {name}: neither a file or folder nor a task of lm-eval; {hint}{damaged(include_path)}"
            )
        try:
            loaded: Any = manager.load([name])
        except Exception as error:  # of many kinds: a task's data come from anywhere, by code of its own
            raise ValueError(f"task {name}: can't be loaded: {first_line(error)}") from error
        for task in loaded["tasks"].values():
            prepare(task, fewshot)
        tasks.append(HarnessTask(name, loaded, limit, chat))
    return tasks


def manager_of(names: Sequence[str], include_path: Path | None) -> TaskManager:
    """lm-eval's index of tasks; of its own ten thousand files, read in seconds, only where they are needed."""
    if include_path is None:
        return TaskManager()
    require(include_path.is_dir(), "--include-path", str(include_path), "a folder of task files")
    local = TaskManager(include_path=str(include_path), include_defaults=False)
    return local if set(names) <= set(local.all_subtasks) else TaskManager(include_path=str(include_path))


def damaged(folder: Path | None) -> str:
    """A sentence that names the first task file of a folder that lm-eval can't read, for it says nothing of it."""
    for file in sorted(folder.glob("**/*.yaml")) if folder else ():
        try:
            load_yaml(file, resolve_func=False)
        except Exception as error:
            return f". {file} can't be read: {first_line(error)}"
    return ""


def first_line(error: Exception) -> str:
    """What foreign code raised, for a line of ours: the type, and what it says first."""
    said = str(error).strip().splitlines()[:1]
    return type(error).__name__ + "".join(f": {shorten(line, 300)}" for line in said)


def prepare(task, fewshot: int | None) -> None:
    """Sets the number of few-shot examples, as lm-eval's simple_evaluate does: a task that says 0 keeps it."""
    own = task.get_config("num_fewshot")
    task.set_config(key="num_fewshot", value=own or 0 if fewshot is None or own == 0 else fewshot)


def seed(loaded) -> None:
    """The seeds of lm-eval's command line, set anew, so that each round has the same few-shot examples."""
    random.seed(SEEDS["random_seed"])
    np.random.seed(SEEDS["numpy_seed"])
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=SEEDS["fewshot_seed"])


def record(task: HarnessTask, tokenizer, max_length: int, *, sampling_seed: int) -> list[Asked]:
    """The questions that a task asks. Raises ValueError, naming the task, for requests that are not computed here."""
    seed(task.loaded)
    recorder = Recorder(tokenizer, max_length, sampling_seed)
    by_kind: dict[str, list] = {}
    for name, instances in built(task, recorder):
        other = sorted({instance.request_type for instance in instances} - set(COMPUTED))
        if other:
            why = f"requests of type {', '.join(other)}, of which a second may follow from an answer, are refused"
            raise ValueError(f"task {name}: {NO_PROMPT if other == ['loglikelihood_rolling'] else why}")
        for one in instances:
            by_kind.setdefault(one.request_type, []).extend([one] * one.repeats)
    try:
        for kind, requests in by_kind.items():
            getattr(recorder, kind)(requests)
    except ValueError as error:
        raise ValueError(f"task {task.name}: {error}") from None
    except Exception as error:
        raise ValueError(f"task {task.name}: {first_line(error)}") from error
    return recorder.asked


def built(task: HarnessTask, lm: TokenLM) -> Iterator[tuple[str, list]]:
    """The requests of each task of a group, made as lm-eval's evaluate makes them."""
    chat = dict(apply_chat_template=task.chat, fewshot_as_multiturn=task.chat)
    chat |= dict(chat_template=lm.apply_chat_template, tokenizer_name=lm.tokenizer_name) if task.chat else {}
    for name, one in task.loaded["tasks"].items():
        if getattr(one, "MULTIMODAL", False):
            raise ValueError(f"task {name}: has images or sounds, which the backbones here do not read")
        if getattr(one, "UNSAFE_CODE", False):
            raise ValueError(f"task {name}: runs code that the model writes; `para-jax lm-eval` can, if you confirm it")
        try:
            one.build_all_requests(limit=task.limit, rank=0, world_size=1, **chat)
        except Exception as error:  # of many kinds: a task's templates and functions are code of its own
            raise ValueError(f"task {name}: its requests can't be made: {first_line(error)}") from error
        yield name, one.instances


def replay(
    task: HarnessTask, tokenizer, max_length: int, answer: Callable[[Asked], Answer | None], *, sampling_seed: int,
    samples: bool = False,
) -> dict:  # fmt: skip
    """lm-eval's results of a task from recorded answers, in its layout.

    Args:
        answer: the answer to a question; None where it was not recorded.
        samples: with every document, its requests and their answers.
    """
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its bootstrap would fork a process that has JAX's threads
    lm = Replay(tokenizer, max_length, sampling_seed, answer, task.name)
    try:
        with redirect_stderr(io.StringIO()):  # the bars of building the same requests again
            return task.run(lm, bootstrap_iters=BOOTSTRAP, log_samples=samples)
    except SecondRound:
        raise
    except Exception as error:  # of many kinds: its filters and metrics are code of its own, of packages that may lack
        raise ValueError(f"task {task.name}: lm-eval can't score its answers: {first_line(error)}") from error
