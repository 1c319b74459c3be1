"""lm-eval's tasks for many adapters: record, answer, replay.

A recording LM collects a task's requests once. They are answered for all adapters in one pass. Then a replaying LM
hands each adapter's answers to lm-eval's own scorer. This module needs lm-eval.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import logging
import math
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import sanitize_list

from ...io.checks import shorten
from ...io.messages import warn
from ..questions import SEEDS, Answer, Likelihood, Question, Scored, Written
from .requests import NO_PROMPT, TokenLM

#: Draws of a bootstrapped standard error; that of a mean has a closed form.
BOOTSTRAP = 1000
#: Where an object is in memory, which its text may say.
ADDRESS = re.compile(r" at 0x[0-9a-f]+")
#: The types of requests that are computed here.
COMPUTED = ("loglikelihood", "generate_until")


class HarnessTask(NamedTuple):
    """A task, group or tag of lm-eval, and how its requests are made."""

    name: str
    loaded: Any
    """what TaskManager.load gives"""
    limit: int | None
    """ask at most this many documents"""
    chat: bool
    """whether contexts are put into the tokenizer's chat template"""

    @property
    def result_names(self) -> tuple[str, ...]:
        """The names of tasks and groups under which lm-eval gives results."""
        return tuple(name for part in ("tasks", "groups") for name in self.loaded.get(part, ()))

    def settings(self) -> str:
        """A hash of its tasks' configs and documents: with the answers, they give the scores. It does not cover the
        code of helper files."""
        made = hashlib.sha256()
        for name, task in self.loaded.get("tasks", {}).items():
            made.update(ADDRESS.sub("", repr((name, task.dump_config()))).encode())
            for document in islice(task.eval_docs, self.limit):
                made.update(repr(document).encode("utf-8", "backslashreplace"))
        return made.hexdigest()

    def run(self, lm: LM, **options) -> dict:
        """lm-eval's results for an LM; the requests are the same every time."""
        seed(self.loaded)
        chat = dict(apply_chat_template=self.chat, fewshot_as_multiturn=self.chat)
        return dict(evaluate(lm, self.loaded, limit=self.limit, **chat, **options) or {})


class Recorder(TokenLM):
    """Collects questions. Its answers are placeholders."""

    def __init__(self, tokenizer, max_length: int, seed: int, *, room: int | None = None):
        super().__init__(tokenizer, max_length, seed, room=room)
        self.questions: list[Question] = []

    def answered(self, questions: list[Question]) -> Sequence[Answer]:
        self.questions += questions
        return [Scored(0.0, False) if isinstance(one, Likelihood) else Written("", 0) for one in questions]


class Replay(TokenLM):
    """Answers from a recorded pass."""

    def __init__(self, tokenizer, max_length: int, seed: int, answer: Callable[[Question], Answer | None], task: str):
        super().__init__(tokenizer, max_length, seed)
        self.answer, self.task = answer, task
        self.lost = 0
        """log-likelihoods that are not numbers, because an adapter or a low precision overflows"""

    def answered(self, questions: list[Question]) -> Sequence[Answer]:
        found = [self.answer(one) for one in questions]
        if None in found:
            raise ValueError(
                f"task {self.task}: asks a second round of requests, which depend on earlier answers. They can't be "
                "answered for many adapters in one pass; run the task with `para-jax lm-eval`"
            )
        self.lost += sum(isinstance(one, Scored) and math.isnan(one.logprob) for one in found)
        return [answer for answer in found if answer is not None]


def load_tasks(
    names: Sequence[str], include_path: Path | None, *, limit: int | None, fewshot: int | None, chat: bool
) -> list[HarnessTask]:
    """lm-eval's tasks, groups or tags of these names.

    Args:
        include_path: a folder of further task files.
        fewshot: examples in each context, instead of each task's own number.

    Raises ValueError for an unknown name, with the nearest ones, and for a task that can't be loaded.
    """
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    manager = manager_of(names, include_path)
    tasks = []
    for name in names:
        if name not in manager.all_tasks:
            nearest = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"the nearest are {', '.join(nearest)}" if nearest else "`para-jax lm-eval ls tasks` lists them"
            raise ValueError(f"task {name}: not a file, a folder or a task of lm-eval; {hint}")
        seed_generators()  # for each, so that a task does not depend on those before it
        try:
            loaded: Any = manager.load([name])
        except Exception as error:  # a task brings its own code to load its data, which may raise anything
            raise ValueError(f"task {name}: can't be loaded: {shorten(error, 300)}") from error
        for part, task in loaded["tasks"].items():
            prepare(part, task, fewshot)
        tasks.append(HarnessTask(name, loaded, limit, chat))
    return tasks


def manager_of(names: Sequence[str], include_path: Path | None) -> TaskManager:
    """lm-eval's index of tasks. Its own ten thousand files take seconds to read, so they are read only if needed."""
    if include_path is None:
        return TaskManager()
    if not include_path.is_dir():
        raise ValueError(f"--include-path {include_path}: no such folder; give a folder of task files")
    local = TaskManager(include_path=str(include_path), include_defaults=False)
    return local if set(names) <= set(local.all_subtasks) else TaskManager(include_path=str(include_path))


def prepare(name: str, task, fewshot: int | None) -> None:
    """Sets the number of few-shot examples as lm-eval's simple_evaluate does: a task with 0 keeps it, and a warning
    says so."""
    own = task.get_config("num_fewshot")
    if own == 0 and fewshot:
        warn(f"task {name}: --num-fewshot {fewshot} is not used, because its file says num_fewshot: 0")
    task.set_config(key="num_fewshot", value=own or 0 if fewshot is None or own == 0 else fewshot)


def seed_generators() -> None:
    """Sets the seeds of lm-eval's command line. A task may shuffle its answers while it is loaded, as GPQA does."""
    random.seed(SEEDS["random_seed"])
    np.random.seed(SEEDS["numpy_seed"])


def seed(loaded) -> None:
    """Sets the seeds again, so that each round has the same few-shot examples."""
    seed_generators()
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=SEEDS["fewshot_seed"])


def record(task: HarnessTask, tokenizer, max_length: int, *, sampling_seed: int) -> list[Question]:
    """The questions that a task asks. Raises ValueError, with the task's name, for requests that are not computed
    here."""
    seed(task.loaded)
    recorder = Recorder(tokenizer, max_length, sampling_seed)
    by_kind: dict[str, list] = {}
    for name, instances in built(task, recorder):
        other = sorted({instance.request_type for instance in instances} - set(COMPUTED))
        if other:
            why = f"requests of type {', '.join(other)} are refused, because later ones may depend on answers"
            raise ValueError(f"task {name}: {NO_PROMPT if other == ['loglikelihood_rolling'] else why}")
        for one in instances:
            by_kind.setdefault(one.request_type, []).extend([one] * one.repeats)  # in the order in which lm-eval asks
    try:
        for kind, requests in by_kind.items():
            getattr(recorder, kind)(requests)
    except ValueError as error:
        raise ValueError(f"task {task.name}: {error}") from None
    return recorder.questions


def built(task: HarnessTask, lm: TokenLM) -> Iterator[tuple[str, list]]:
    """The requests of each task of a group, made as lm-eval's evaluate makes them."""
    chat = dict(apply_chat_template=task.chat, fewshot_as_multiturn=task.chat)
    chat |= dict(chat_template=lm.apply_chat_template, tokenizer_name=lm.tokenizer_name) if task.chat else {}
    for name, one in task.loaded["tasks"].items():
        if getattr(one, "MULTIMODAL", False):
            raise ValueError(f"task {name}: has images or sounds, which these backbones can't read")
        if getattr(one, "UNSAFE_CODE", False):
            raise ValueError(f"task {name}: runs code that the model writes; `para-jax lm-eval` can, if you confirm it")
        one.build_all_requests(limit=task.limit, rank=0, world_size=1, **chat)
        yield name, one.instances


def replay(
    task: HarnessTask, tokenizer, max_length: int, answer: Callable[[Question], Answer | None], *, sampling_seed: int,
    samples: bool = False,
) -> dict:  # fmt: skip
    """lm-eval's results of a task from recorded answers, in its layout.

    Args:
        answer: gives the answer to a question; None if it was not recorded.
        samples: whether to include every document with its requests and their answers, as lm-eval logs them.
    """
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its bootstrap would fork this process, which has JAX's threads
    lm = Replay(tokenizer, max_length, sampling_seed, answer, task.name)
    with redirect_stderr(io.StringIO()):  # the progress bars of building the same requests again
        found = task.run(lm, bootstrap_iters=BOOTSTRAP, log_samples=samples)
    if lm.lost:
        warn(f"task {task.name}: {lm.lost} log-likelihoods are not numbers; lm-eval answers with the first of them")
    if samples:
        found["samples"] = {name: [as_logged(one) for one in logged] for name, logged in found["samples"].items()}
    return found


def as_logged(sample: dict) -> dict:
    """A sample as lm-eval writes it to its files of samples (EvaluationTracker.save_results_samples)."""
    arguments = {
        f"gen_args_{i}": {f"arg_{j}": value for j, value in enumerate(one)} for i, one in enumerate(sample["arguments"])
    }
    resps = {name: sanitize_list(sample[name]) for name in ("resps", "filtered_resps")}
    return sample | resps | {"arguments": arguments, "target": str(sample["target"])}
