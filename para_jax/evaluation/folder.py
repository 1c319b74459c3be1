"""Many adapters and the base model on many tasks in one pass, into a folder of answers, results and a table.

The questions of all tasks are collected once and answered for all adapters. Our own tasks are scored here, lm-eval's by
lm-eval. Each answer is in the folder's journal as soon as it is there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from .. import atomic
from ..adapters.bank import AdapterBank
from ..config import ModelConfig, RunConfig
from ..data.row_files import split_file
from ..messages import say
from .answers import Answerer
from .evaluate import other_prompts
from .journal import Journal
from .questions import Answer, Question, backbone_content
from .results import (
    ANSWERS_FILE,
    check_results,
    csv_table,
    file_names,
    markdown_table,
    names_of_samples,
    run_record,
    task_record,
)
from .samples import logged_samples, write_samples
from .task_file import INSTALL, task_parts
from .tasks import (
    EncodedTask,
    EvalTask,
    check_room,
    encode_task,
    file_task,
    task_of_run,
    with_metrics_in_names,
)
from .white_space import Stripped, warn_of_white_space

#: The name of the base model among the tenants.
BASE = "base"


class Options(NamedTuple):
    """How tasks are asked."""

    limit: int | None = None
    """ask at most this many examples of each task, from its start"""
    rows: int = 16
    """of a batch"""
    seed: int = 0
    """of sampled answers, and of shuffled prompts"""
    include_path: Path | None = None
    """a folder of further task files for lm-eval"""
    fewshot: int | None = None
    """examples in each context of lm-eval's tasks; default: each task's own number"""
    chat: bool = False
    """put lm-eval's contexts into the tokenizer's chat template"""
    split: str = "test"
    """of our own tasks: the file of a folder"""
    shuffle_prompts: bool = False
    """make the factors of each example of our own tasks from another example's prompt"""
    log_samples: bool = False
    """write what was answered to each example"""


#: Gives the recorded answer to a question; None if it was not recorded.
Lookup = Callable[[Question], Answer | None]


class TaskQuestions(NamedTuple):
    """A task, ours or lm-eval's, as questions for any adapter."""

    names: tuple[str, ...]
    """under which it gives results: an lm-eval group has several"""
    questions: list[Question]
    results: Callable[[Lookup], dict]
    """the task's part of an adapter's record, from that adapter's answers. Its `samples` and `white_space` go
    elsewhere"""
    owner: str | None = None
    """the only tenant that is asked, next to the base model; None: all are"""


def read_tasks(tasks: Sequence[str], tokenizer, config: ModelConfig, options: Options) -> list[TaskQuestions]:
    """The tasks' questions. This needs only the model's config, so a wrong name is found before weights are loaded.

    Args:
        tasks: [TASK=]FILE_OR_FOLDER[:METRIC], our own, or names of lm-eval's tasks. Several metrics of one file are
            separate tasks, named TASK:METRIC.
    """
    found = [file_task(text, tokenizer, config, split=options.split, limit=options.limit) for text in tasks]
    names = [text for text, one in zip(tasks, found, strict=True) if one is None]
    files = with_metrics_in_names([one for one in found if one is not None])
    own = [questions_of(one.encoded, one.original, options) for one in files]
    own_names = [name for one in own for name in one.names]
    require_distinct([*names, *own_names])
    if not names:
        return own
    loaded = questions_of_harness(names, tokenizer, config, options)
    theirs = dict.fromkeys([*names, *(name for one in loaded for name in one.names)])
    require_distinct([*theirs, *own_names])
    return [*own, *loaded]


def read_own_tasks(
    text: str,
    tenants: Sequence[str],
    tokenizer,
    config: ModelConfig,
    options: Options,
    configs: Mapping[str, RunConfig] | None = None,
) -> list[TaskQuestions]:
    """Each tenant's own task: the file of its name in a folder of tenants' data, asked of it and the base model.

    Args:
        text: [TASK=]FOLDER[:METRIC], of every tenant's file.
        configs: of the tenants that are scored as a run on their folder scores them, whatever `text` says.
    """
    name, folder, metric = task_parts(text)
    if folder is None or not folder.is_dir():
        raise ValueError(f"--tasks {text}: not a folder\nwith --own, give the folder that has a folder for each tenant")
    missing = [tenant for tenant in tenants if split_file(folder / tenant, options.split) is None]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(
            f"--own: {folder} has no {options.split}.jsonl for {', '.join(missing[:5])}{more}\nadd "
            f"{folder / missing[0] / options.split}.jsonl, or name adapters by their data: --adapters NAME=DIR"
        )
    tasks = []
    for tenant in tenants:
        task = task_of_run(configs[tenant], options.split, tokenizer) if configs and tenant in configs else None
        if task is not None:
            asked = questions_of_run(task._replace(name=tenant), tokenizer, config, options)
            tasks.append(asked._replace(owner=tenant))
            continue
        own = (f"{name}=" if name else "") + str(folder / tenant) + (f":{metric}" if metric else "")
        found = file_task(own, tokenizer, config, split=options.split, limit=options.limit)
        if found is not None:
            encoded = found.encoded._replace(task=found.encoded.task._replace(name=tenant))
            tasks.append(questions_of(encoded, found.original, options)._replace(owner=tenant))
    return tasks


def questions_of_run(task: EvalTask, tokenizer, config: ModelConfig, options: Options) -> TaskQuestions:
    """A run's task as questions."""
    encoded = encode_task(task, tokenizer, options.limit)
    check_room(config, encoded)
    return questions_of(encoded, len(task.records), options)


def questions_of(encoded: EncodedTask, original: int, options: Options) -> TaskQuestions:
    """One of our own tasks as questions.

    Args:
        original: how many examples its file has.
    """
    questions = encoded.questions(other_prompts(encoded, options.seed if options.shuffle_prompts else None))

    def results(answer: Lookup) -> dict:
        answers = [found for found in map(answer, questions) if found is not None]
        samples = {"samples": {encoded.task.name: logged_samples(encoded, answers)}} if options.log_samples else {}
        return task_record(encoded, original, answers) | samples

    return TaskQuestions((encoded.task.name,), questions, results)


def questions_of_harness(names: list[str], tokenizer, config: ModelConfig, options: Options) -> list[TaskQuestions]:
    """lm-eval's tasks of these names."""
    if options.shuffle_prompts:
        raise ValueError(f"--shuffle-prompts: {names[0]} is a task of lm-eval; only our own tasks can be shuffled")
    if find_spec("lm_eval") is None:
        raise ValueError(f"task {names[0]}: there is no such file or folder, and {INSTALL}")
    from .harness.tasks import load_tasks, record, replay

    loaded = load_tasks(names, options.include_path, limit=options.limit, fewshot=options.fewshot, chat=options.chat)
    asked = []
    for task in loaded:
        given = task, tokenizer, config.max_positions
        questions = record(*given, sampling_seed=options.seed)
        results = partial(replay, *given, sampling_seed=options.seed, samples=options.log_samples)
        asked.append(TaskQuestions(task.result_names, questions, results))
    return asked


def require_distinct(names: Sequence[str]) -> None:
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise ValueError(f"--tasks: {', '.join(twice)} is given more than once; give each name once")


def evaluate_to_folder(
    model,
    bank: AdapterBank | None,
    tokenizer,
    tasks: Sequence[TaskQuestions],
    output: Path,
    options: Options,
    sources: dict[str, str],
    about: dict,
    *,
    base: bool = True,
) -> tuple[str, dict[str, dict]]:
    """Evaluates every tenant of the bank, and the base model, on tasks. Returns the Markdown table and each tenant's
    record.

    The folder `output` gets answers.jsonl as they come, and at the end a JSON file per tenant, in lm-eval's layout,
    table.md and table.csv, and samples if the options say so. The same call on the same folder resumes a killed one.

    Args:
        tasks: as read_tasks gives them, with the same options.
        sources, about: for the records: where each tenant comes from, and what was asked for.
        base: whether to evaluate the base model too.
    """
    tenants = [*([None] if base or bank is None else []), *(bank.names if bank is not None else ())]
    if BASE in tenants:
        raise ValueError(f"tenant {BASE!r}: this is the name of the base model; choose another name")
    content, files = backbone_content(model), file_names([tenant or BASE for tenant in tenants])
    check_results(output, list(files.values()), content)
    parts = [(tenant or BASE, name) for tenant in tenants for one in tasks for name in one.names]
    sample_files = names_of_samples(parts) if options.log_samples else {}
    journal = Journal(output / ANSWERS_FILE)
    answerer = Answerer(model, bank, tokenizer, rows=options.rows, journal=journal, backbone=content)
    asked = [
        (tenant, question)
        for one in tasks
        for question in one.questions
        for tenant in tenants
        if one.owner is None or tenant in (None, one.owner)
    ]
    begun = time.time()
    answers = dict(zip(asked, answerer.answer(asked), strict=True))
    if options.shuffle_prompts:
        about = about | {"shuffle_prompts": True}
    by_tenant: dict[str, dict] = {}
    white_space: dict[str, list[Stripped]] = {}
    limits = {"limit": options.limit, "rows": options.rows, "seed": options.seed}
    for tenant in tenants:
        made: dict = {}
        for one in tasks:
            if one.owner is None or tenant in (None, one.owner):
                for part, values in one.results(partial(answer_of, answers, tenant)).items():
                    made.setdefault(part, {}).update(values)
        for task, samples in made.pop("samples", {}).items():
            write_samples(output / sample_files[tenant or BASE, task], tenant or BASE, task, samples)
        for task, found in made.pop("white_space", {}).items():
            white_space.setdefault(task, []).append(found)
        made |= run_record(answerer, tenant, about | {"adapter": sources.get(tenant or BASE)}, limits, begun)
        by_tenant[tenant or BASE] = made
    for name, made in by_tenant.items():
        atomic.write_text(output / files[name], json.dumps(made, indent=2, default=str) + "\n")
    warn_of_white_space(white_space)
    others = sorted({path.name for path in output.glob("*.json")} - set(files.values()))
    if others:
        say(f"{output} also holds results of earlier calls, which are not in table.md: {', '.join(others)}")
    own = {one.owner: one.names[0] for one in tasks if one.owner is not None}
    text = markdown_table(by_tenant, answerer, **limits, shuffled=options.shuffle_prompts, own=own)
    atomic.write_text(output / "table.md", text + "\n")
    atomic.write_text(output / "table.csv", csv_table(by_tenant))
    return text, by_tenant


def answer_of(answers: dict, tenant: str | None, question: Question) -> Answer | None:
    return answers.get((tenant, question))
