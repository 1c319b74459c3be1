"""Tasks as questions for any adapter: our own files, the tests of runs, and lm-eval's tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from ..config import ModelConfig, RunConfig
from ..data.rows import split_file
from ..data.tenants import OWN_FILE, with_own_fields
from ..io.checks import shorten
from .adapter_passes import PLACES
from .metrics import LABEL_METRICS
from .options import EvalOptions
from .questions import Answer, Question
from .results import task_record
from .samples import logged_samples
from .scoring import other_prompts
from .task_file import INSTALL, no_data, task_parts
from .tasks import (
    EncodedTask,
    EvalTask,
    check_room,
    encode_task,
    file_task,
    rows_task,
    say_long,
    task_of_run,
    with_metrics_in_names,
)

#: Gives the recorded answer to a question; None if it was not recorded.
Lookup = Callable[[Question], Answer | None]


class TaskQuestions(NamedTuple):
    """A task, ours or lm-eval's, as questions for any adapter."""

    names: tuple[str, ...]
    """under which it gives results: an lm-eval group has several"""
    questions: list[Question]
    results: Callable[[Lookup], dict]
    """the task's part of an adapter's record, from that adapter's answers. Its `samples` go elsewhere"""
    owner: str | None = None
    """the only tenant that is asked, next to the base model; None: all are"""
    encoded: EncodedTask | None = None
    """None: a task of lm-eval"""
    scored_by: str = ""
    """what the scores depend on in addition to the answers, as text"""


def read_tasks(tasks: Any, tokenizer, config: ModelConfig, options: EvalOptions) -> list[TaskQuestions]:
    """The questions of what `evaluate` takes as tasks. This needs only the model's config, so a wrong name is found
    before weights are loaded.

    Several metrics of one file are separate tasks, named TASK:METRIC.
    """
    own, names = list[EvalTask](), list[str]()
    for name, task in named_tasks(tasks):
        if isinstance(task, RunConfig):
            task = run_task(task, options.split, tokenizer, config)
        elif isinstance(task, PLACES):
            task = file_task(str(task), tokenizer, config, split=options.split, limit=options.limit) or str(task)
        elif not isinstance(task, EvalTask):
            task, name = rows_task(name or "rows", task, tokenizer, config, limit=options.limit), None
        if isinstance(task, EvalTask):
            own.append(task._replace(name=name or task.name))
        elif name:
            raise ValueError(f"tasks[{name!r}]: {task} is no file or folder; lm-eval's tasks keep their names")
        else:
            names.append(task)
    questions = [questions_of(task, tokenizer, config, options) for task in with_metrics_in_names(own)]
    questions += questions_of_harness(names, tokenizer, config, options) if names else []
    times = Counter(name for one in questions for name in one.names)
    if twice := [name for name in times if times[name] > 1]:
        raise ValueError(
            f"--tasks: {', '.join(twice)} is given more than once, and its scores have one name\nscore them in two "
            "calls, each with its own --output"
        )
    return questions


def named_tasks(tasks: Any) -> list[tuple[str | None, Any]]:
    """(Its name, if the caller gave one; the task) of each task: a path or name, a RunConfig, an EvalTask, or rows."""
    if isinstance(tasks, Mapping):
        return list(tasks.items())
    several = isinstance(tasks, list | tuple) and not isinstance(tasks, EvalTask)
    if not several or (tasks and isinstance(tasks[0], Mapping)):
        return [(None, tasks)]
    rows = [one for one in tasks if not isinstance(one, (*PLACES, RunConfig, EvalTask))]
    if rows or not tasks:
        said = f"{shorten(rows[0])} in a list is no path or task" if rows else "the list is empty"
        raise ValueError(f"tasks: {said}; give paths, names of lm-eval's tasks, or {{name: rows}}")
    return [(None, one) for one in tasks]


def run_task(config: RunConfig, split: str, tokenizer, model: ModelConfig) -> EvalTask:
    """A split of a run's data as a task. Raises ValueError for a run without one."""
    task = task_of_run(config, split, tokenizer, model=model)
    if task is None:
        raise no_data(config, split)
    say_long(split, [task])
    return task


def own_configs(text: str, tenants: Sequence[str], config: RunConfig) -> dict[str, RunConfig]:
    """How each tenant that has training data or a tenant.yaml in a folder of tenants' data is scored: as a run with
    this config scores it.

    Args:
        text: [TASK=]FOLDER[:METRIC].
    """
    task, folder, metric = task_parts(text)
    if folder is None:
        return {}
    section = replace(config.data, validation=None, test=None, tenants=None, **({"task": task} if task else {}))
    configs = {}
    for tenant in tenants:
        data = folder / tenant
        if split_file(data, "train") is None and not (data / OWN_FILE).is_file():
            continue
        own = with_own_fields(replace(config, data=replace(section, train=str(data))), data)
        configs[tenant] = replace(own, eval=replace(own.eval, metric=metric, also=())) if metric else own
    return configs


def read_own_tasks(
    text: str,
    tenants: Sequence[str],
    tokenizer,
    config: ModelConfig,
    options: EvalOptions,
    configs: Mapping[str, RunConfig],
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
        raise ValueError(
            f"--own: {folder} has no {options.split}.jsonl for {', '.join(missing[:5])}\nadd it, or name "
            "adapters by their data: --adapters NAME=DIR"
        )
    tasks, of_runs = [], []
    for tenant in tenants:
        task = None
        if own := configs.get(tenant):
            labels = metric in LABEL_METRICS  # few are ranked, as by TASKS:METRIC without --own
            task = task_of_run(own, options.split, tokenizer, model=config, rank_labels=labels)
            of_runs.append(task)
        if task is None:
            text = (f"{name}=" if name else "") + str(folder / tenant) + (f":{metric}" if metric else "")
            task = file_task(text, tokenizer, config, split=options.split, limit=options.limit)
            assert task is not None, "the file is there"
        tasks.append(questions_of(task._replace(name=tenant), tokenizer, config, options)._replace(owner=tenant))
    say_long(options.split, of_runs)
    return tasks


def questions_of(task: EvalTask, tokenizer, config: ModelConfig, options: EvalOptions) -> TaskQuestions:
    """One of our own tasks as questions."""
    encoded, original = encode_task(task, tokenizer, options.limit), len(task.records) + task.skipped
    check_room(config, encoded)
    questions = encoded.questions(other_prompts(encoded, options.seed if options.shuffle_prompts else None))

    def results(answer: Lookup) -> dict:
        answers = [found for found in map(answer, questions) if found is not None]
        samples = {"samples": {encoded.task.name: logged_samples(encoded, answers)}} if options.log_samples else {}
        return task_record(encoded, original, answers) | samples

    task = encoded.task
    scored_by = repr((task.metric, task.also, task.choices, original, [record.references for record in task.records]))
    return TaskQuestions((task.name,), questions, results, encoded=encoded, scored_by=scored_by)


def questions_of_harness(names: list[str], tokenizer, config: ModelConfig, options: EvalOptions) -> list[TaskQuestions]:
    """lm-eval's tasks of these names."""
    if options.shuffle_prompts:
        raise ValueError(f"--shuffle-prompts: {names[0]} is a task of lm-eval; only our own tasks can be shuffled")
    if find_spec("lm_eval") is None:
        raise ValueError(f"task {names[0]}: there is no such file or folder, and {INSTALL}")
    from .harness.tasks import load_tasks, record, replay

    folder = Path(options.include_path).expanduser() if options.include_path else None
    loaded = load_tasks(names, folder, limit=options.limit, fewshot=options.num_fewshot, chat=options.chat)
    asked = []
    for task in loaded:
        given = task, tokenizer, config.max_positions
        questions = record(*given, sampling_seed=options.seed)
        results = partial(replay, *given, sampling_seed=options.seed, samples=options.log_samples)
        asked.append(TaskQuestions(task.result_names, questions, results, scored_by=task.settings()))
    return asked
