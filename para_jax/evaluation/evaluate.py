"""evaluate: the scores of one adapter or of thousands on held-out examples, in one call."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from .. import __version__
from ..backbone.content import backbone_content
from ..config import BASE, ModelConfig, RunConfig, load_config
from ..inference.content import ANSWERS_VERSION, writing_content
from ..io.checks import expanded
from ..io.shards import SHARD_FILE, ShardOutput, begin_part, parse_shard, write_part
from ..io.storage.bucket import Place
from ..runtime import devices
from .adapter_passes import PLACES, Adapters, bank_and_passes, find_adapters
from .answers import Answerer, tokens_to_write
from .journal import AnswerJournal
from .options import EvalOptions
from .questions import Generation
from .results import (
    ANSWERS_FILE,
    Results,
    check_results,
    described_work,
    file_names,
    markdown_table,
    names_of_samples,
    run_record,
    versions,
    work_of,
    write_results,
)
from .samples import write_samples
from .shapes import PlannedShapes, plan_shapes
from .task_questions import TaskQuestions, own_configs, read_own_tasks, read_tasks

DEFAULTS = EvalOptions()
#: Whether a task is asked of a tenant, or of the base model (None).
Asks = Callable[[TaskQuestions, str | None], bool]


def evaluate(
    model,
    adapters: Any,
    tasks: Any,
    *,
    tokenizer,
    output: Place | str | None = None,
    options: EvalOptions = DEFAULTS,
) -> Results:
    """The scores of adapters on tasks. All adapters answer all questions in one pass, or in several if they need more
    memory than `options.adapter_memory`::

        results = evaluate(model, "runs/*/adapter", ["data/mine", "hellaswag"], tokenizer=tokenizer)
        print(results.table())

    The factors are made from an example's prompt and never see an answer that is ranked.

    Args:
        adapters: one adapter; an AdapterBank; {name: adapter or folder}; or a folder or hub id, the folder of a run of
            many tenants, a pattern of folders, or a list of these. None: the base model alone.
        tasks: one task, a list, or {name: task}. A task is a data file or folder, as [TASK=]PATH[:METRIC]; the name of
            a task of lm-eval; a RunConfig, for a run's own data; or rows: a list of dicts with prompt and completion, a
            DataFrame or a datasets.Dataset.
        output: a folder for answers, results and the tables, on disk or in a bucket. A stopped evaluation resumes
            there. None: all stays in memory.

    Raises ValueError, naming the value, for anything that can't be evaluated.

    >>> tasks = {"greetings": [{"prompt": "Hello", "completion": "w9"}]}
    >>> results = evaluate(model, {"mine": adapter}, tasks, tokenizer=tokenizer)
    >>> sorted(results.records)
    ['mine']
    """
    try:
        plan = plan_evaluation(model.config, adapters, tasks, tokenizer, options)
    except ValueError as error:  # it names the command's flags, which are arguments here
        text = re.sub(r"--(adapters|tasks|own|shuffle-prompts)\b", lambda flag: flag[1].replace("-", "_"), str(error))
        raise ValueError(text) from error
    return run_evaluation(model, plan, tokenizer, output, options)


class Evaluation(NamedTuple):
    """What is evaluated. All shards share it, and none of it needs the model's weights."""

    tasks: list[TaskQuestions]
    adapters: Adapters


def plan_evaluation(
    config: ModelConfig, adapters: Any, tasks: Any, tokenizer, options: EvalOptions, run: RunConfig | None = None
) -> Evaluation:
    """Reads the tasks and looks at the adapters.

    Args:
        run: with `options.own`, the config by which tenants with training data are scored. Default: a run's default,
            but long prompts lose their start.
    """
    found = find_adapters(adapters, config)
    names = list(found.sources)
    if BASE in names:
        raise ValueError(f"tenant {BASE!r}: this is the name of the base model; choose another name")
    if options.shuffle_prompts and not names:
        raise ValueError("--shuffle-prompts requires an adapter: the base model makes no factors")
    if not options.own:
        return Evaluation(read_tasks(tasks, tokenizer, config, options), found)
    folders = [tasks] if isinstance(tasks, PLACES) else tasks
    if not names or not isinstance(folders, list | tuple) or len(folders) != 1:
        raise ValueError("--own requires --adapters and one folder as --tasks")
    text = str(folders[0])
    if run is None:
        run = load_config(None, [])
        run = replace(run, data=replace(run.data, max_seq_length=None, truncate="left"))
    configs = own_configs(text, names, run)
    return Evaluation(read_own_tasks(text, names, tokenizer, config, options, configs), found)


def run_evaluation(
    model,
    plan: Evaluation,
    tokenizer,
    output: Place | str | None,
    options: EvalOptions,
    about: dict[str, Any] | None = None,
) -> Results:
    """Evaluates what was planned with the same options, or a shard of it.

    A folder gets answers.jsonl as they come, and at the end a JSON file per tenant, in lm-eval's layout, table.md and
    table.csv, and samples if the options say so. The same call on the same folder resumes a killed one. A shard also
    leaves a file that describes it, and merge.py joins the folders.

    Args:
        about: what the records say about the call.
    """
    tasks, adapters = plan
    shard = parse_shard(str(options.shard)) if options.shard else None
    if shard and not output:
        raise ValueError(f"shard {shard} requires an output of its own; `para-jax merge` joins the outputs")
    everyone = list(adapters.sources)
    here = [name for name in everyone if shard is None or shard.has_content(adapters.digests[name])]
    base = len(everyone) != 1 if options.base is None else options.base or not everyone
    asks = partial(is_asked, here=set(here), alone=shard is not None and shard.index != 0)
    base_here = base and any(asks(one, None) for one in tasks)
    folder = expanded(str(output)) if isinstance(output, str | Path) else output
    names = [*([BASE] if base else []), *everyone]
    files = {name: file for name, file in file_names(names).items() if name in here or (name == BASE and base_here)}
    content = "" if folder is None else backbone_content(model)
    if folder is not None:
        check_results(folder, files.values(), content)
        begin_part(folder / SHARD_FILE, folder, shard)
    who = f"shard {shard}: " if shard else ""
    bank, passes = bank_and_passes(adapters, here, model, int(options.adapter_memory * 1e9), who)
    with closing(passes), closing(AnswerJournal(folder and folder / ANSWERS_FILE)) as journal:
        answerer = Answerer(
            model,
            bank,
            tokenizer,
            rows=options.rows,
            prefill_tokens=options.max_prefill_tokens,
            shapes=shared_shapes(tasks, in_memory=folder is None),
            journal=None if folder is None else journal,
            backbone=content,
            longest=longest_answer(tasks),
        )
        begun, part, records = time.time(), None, {}
        if shard and folder is not None:
            part = ShardOutput(folder, shard, shard_settings(answerer, plan, options, base), False, {})
            write_part(folder / SHARD_FILE, part)
        samples: dict[str, dict[str, list[dict]]] = {}
        parts = [(name, task) for name in (BASE, *everyone) for one in tasks for task in one.names]
        sample_files, written = names_of_samples(parts) if options.log_samples else {}, []
        about = (about or {}) | ({"shuffle_prompts": True} if options.shuffle_prompts else {})
        for number, names_of_pass in enumerate(passes):
            tenants = [*([None] if base_here and number == 0 else []), *names_of_pass]
            for tenant, record in answered(answerer, tasks, tenants, asks):
                name = tenant or BASE
                for task, lines in record.pop("samples", {}).items():
                    if folder is None:
                        samples.setdefault(name, {})[task] = lines
                    else:
                        written.append(sample_files[name, task])
                        write_samples(folder / written[-1], name, task, lines)
                given = about | {"adapter": adapters.sources.get(name)}
                records[name] = record | run_record(answerer, tenant, given, options, begun)
        for record in records.values():
            record |= work_of(answerer)
        own = {tenant: task for tenant, task in owners(tasks).items() if tenant in records}
        work = described_work(answerer.tokens, answerer.seconds, options.rows, devices.describe_devices(model))
        text = markdown_table(records, work, versions(), vars(options), own)
        if folder is not None:
            write_results(folder, records, files, text)
        if part is not None:
            held = {"files": files, "samples": written}
            if part.shard.index == 0:  # once is enough: the same for all shards
                tasks_in_order = [name for one in tasks for name in one.names]
                held |= {"names": names, "tasks": tasks_in_order, "own": owners(tasks)}
            write_part(part.output / SHARD_FILE, part._replace(ended=True, content=held))
    return Results(records, text, samples)


def answered(
    answerer: Answerer, tasks: Sequence[TaskQuestions], tenants: Sequence[str | None], asks: Asks
) -> Iterable[tuple[str | None, dict]]:
    """Asks these tenants in one pass. Each tenant with the parts of its record that its tasks give."""
    pairs = [(who, one) for task in tasks for one in task.questions for who in tenants if asks(task, who)]
    answers = dict(zip(pairs, answerer.answer(pairs), strict=True))
    for tenant in tenants:
        made: dict[str, dict] = {}
        for one in tasks:
            if asks(one, tenant):
                for section, values in one.results(lambda question, who=tenant: answers.get((who, question))).items():
                    made.setdefault(section, {}).update(values)
        yield tenant, made


def is_asked(task: TaskQuestions, tenant: str | None, *, here: Collection[str], alone: bool) -> bool:
    """Whether a task is asked of a tenant, or of the base model (None), in a shard with these adapters.

    Args:
        alone: another shard asks the base model what belongs to no tenant.
    """
    if task.owner is None:
        return tenant is not None or not alone
    return task.owner == tenant or (tenant is None and task.owner in here)


def shared_shapes(tasks: Sequence[TaskQuestions], *, in_memory: bool) -> PlannedShapes | None:
    """The few shapes that our own tasks share, as in a run. In a folder, where an answer must not depend on the list of
    tasks, only tenants' own tasks share them, whichever of them this shard asks. None: the shapes are open."""
    own = [one.encoded for one in tasks if one.encoded is not None and (in_memory or one.owner is not None)]
    return plan_shapes(own) if len(own) == len(tasks) else None


def longest_answer(tasks: Sequence[TaskQuestions]) -> int:
    """The maximum number of tokens of a context and the answer that is written to it."""
    written = (one for of_task in tasks for one in of_task.questions if isinstance(one, Generation))
    return max(map(tokens_to_write, written), default=0)


def owners(tasks: Sequence[TaskQuestions]) -> dict[str, str]:
    """The task of each tenant that has one of its own."""
    return {one.owner: one.names[0] for one in tasks if one.owner is not None}


def shard_settings(answerer: Answerer, plan: Evaluation, options: EvalOptions, base: bool) -> dict[str, Any]:
    """What all shards of an evaluation must share, so that their answers and scores are those of one worker."""
    names = "limit", "rows", "seed", "shuffle_prompts", "log_samples"
    asked = [[one.names, one.owner, one.scored_by, *one.questions] for one in plan.tasks]
    return {
        "version": [__version__, ANSWERS_VERSION],
        "libraries": versions(),
        "device": devices.describe_devices(answerer.model),
        "backbone": answerer.backbone,
        "tokenizer": writing_content(answerer.tokenizer, answerer.stop_ids),
        **{name: getattr(options, name) for name in names},
        "base": base,
        "tasks": hash_of(asked),  # after the options: an error names the first difference
        "adapters": [len(plan.adapters.digests), hash_of(plan.adapters.digests.items())],
    }


def hash_of(parts: Iterable[Iterable[Any]]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        for value in part:
            digest.update(repr(value).encode() + b"\n")
    return digest.hexdigest()
