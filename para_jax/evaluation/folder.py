"""Many adapters and the base model on many tasks in one pass, into a folder of answers, results and a table.

The questions of all tasks are collected once and answered for all adapters. Our own tasks are scored here, lm-eval's by
lm-eval. Each answer is in the folder's journal as soon as it is there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from .. import atomic, devices
from ..adapters.bank import AdapterBank
from ..config import ModelConfig, RunConfig
from ..data.row_files import split_file
from ..messages import say
from ..shards import SHARD_FILE, Part, begin_part, write_part
from .answers import Answerer, tokens_to_write
from .evaluate import other_prompts
from .journal import Journal
from .questions import Answer, Generation, Question, backbone_content, writing_content
from .results import (
    ANSWERS_FILE,
    check_results,
    csv_table,
    described_work,
    file_names,
    markdown_table,
    names_of_samples,
    run_record,
    task_record,
    versions,
    work_of,
)
from .samples import logged_samples, write_samples
from .shard_part import ShardOfAdapters, settings_of
from .task_file import INSTALL, task_parts
from .tasks import (
    EncodedTask,
    EvalTask,
    FileTask,
    check_room,
    encode_task,
    file_task,
    say_long,
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
    scored_by: str = ""
    """what the scores depend on in addition to the answers, as text"""


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
    require_distinct([*names, *own_names], files)
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
    tasks, of_runs = [], []
    for tenant in tenants:
        task = task_of_run(configs[tenant], options.split, tokenizer) if configs and tenant in configs else None
        if task is not None:
            of_runs.append(task)
            asked = questions_of_run(task._replace(name=tenant), tokenizer, config, options)
            tasks.append(asked._replace(owner=tenant))
            continue
        own = (f"{name}=" if name else "") + str(folder / tenant) + (f":{metric}" if metric else "")
        found = file_task(own, tokenizer, config, split=options.split, limit=options.limit)
        if found is not None:
            encoded = found.encoded._replace(task=found.encoded.task._replace(name=tenant))
            tasks.append(questions_of(encoded, found.original, options)._replace(owner=tenant))
    say_long(options.split, of_runs)
    return tasks


def questions_of_run(task: EvalTask, tokenizer, config: ModelConfig, options: Options) -> TaskQuestions:
    """A run's task as questions."""
    encoded = encode_task(task, tokenizer, options.limit)
    check_room(config, encoded)
    return questions_of(encoded, len(task.records) + task.skipped, options)


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

    task = encoded.task
    scored_by = repr((task.metric, task.also, task.choices, original, [record.references for record in task.records]))
    return TaskQuestions((task.name,), questions, results, scored_by=scored_by)


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


def require_distinct(names: Sequence[str], files: Sequence[FileTask] = ()) -> None:
    """Raises ValueError for tasks with one name. A file gives its task its own name, and a folder gives it the
    folder's."""
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        alike = sorted({str(one.file) for one in files if one.encoded.task.name in twice})
        advice = f"\n{alike[0]} and {alike[1]} have one name: give the folder of one, or rename it" if alike[1:] else ""
        raise ValueError(f"--tasks: {', '.join(twice)} is given more than once{advice or '; give each name once'}")


def evaluate_to_folder(
    model,
    bank: AdapterBank | None,
    tokenizer,
    tasks: Sequence[TaskQuestions],
    output: Path,
    options: Options,
    sources: Mapping[str, str],
    about: dict,
    *,
    base: bool = True,
    passes: Iterable[Sequence[str]] | None = None,
    part: ShardOfAdapters | None = None,
) -> tuple[str, dict[str, dict]]:
    """Evaluates every tenant of the bank, and the base model, on tasks. Returns the Markdown table and each tenant's
    record.

    The folder `output` gets answers.jsonl as they come, and at the end a JSON file per tenant, in lm-eval's layout,
    table.md and table.csv, and samples if the options say so. The same call on the same folder resumes a killed one.

    Args:
        tasks: as read_tasks gives them, with the same options.
        sources, about: for the records: where each tenant comes from, and what was asked for.
        base: whether to evaluate the base model too.
        passes: names of tenants, which the bank holds when they are taken from here (adapter_passes.py); default: all
            tenants of the bank in one pass.
        part: evaluate only this shard's adapters, which `passes` must then give. Shard 0 has the base model too; a
            task that is one tenant's own is asked of the base model in that tenant's shard. A file in the folder
            describes the shard, and merge.py joins the folders.
    """
    everyone = [*(part.digests if part else sources if passes is not None else bank.names if bank is not None else ())]
    if BASE in everyone:
        raise ValueError(f"tenant {BASE!r}: this is the name of the base model; choose another name")
    here = part.names if part else everyone
    base = base or bank is None
    asks = partial(is_asked, here=set(here), alone=part is not None and part.shard.index != 0)
    base_here = base and any(asks(one, None) for one in tasks)
    content = backbone_content(model)
    files = file_names([*([BASE] if base else []), *everyone])
    files = {name: files[name] for name in (*([BASE] if base_here else []), *here)}
    check_results(output, list(files.values()), content)
    parts = [(name, task) for name in (BASE, *everyone) for one in tasks for task in one.names]
    sample_files = names_of_samples(parts) if options.log_samples else {}
    begin_part(output / SHARD_FILE, output, part.shard if part else None)
    journal = Journal(output / ANSWERS_FILE)
    written = (one for of_task in tasks for one in of_task.questions if isinstance(one, Generation))
    longest = max(map(tokens_to_write, written), default=0)
    given = {"rows": options.rows, "journal": journal, "backbone": content, "longest": longest}
    answerer = Answerer(model, bank, tokenizer, **given)
    limits = {"limit": options.limit, "rows": options.rows, "seed": options.seed}
    libraries, found = versions(), None
    if part is not None:
        asked_for = limits | {"shuffle_prompts": options.shuffle_prompts, "samples": options.log_samples, "base": base}
        asked = ((one.names, one.owner, one.questions, one.scored_by) for one in tasks)
        writing = writing_content(tokenizer, answerer.stop_ids)
        settings = settings_of(content, writing, asked, part.digests, libraries, asked_for)
        found = Part(output, part.shard, settings, False, {})
        write_part(output / SHARD_FILE, found)
    begun = time.time()
    if options.shuffle_prompts:
        about = about | {"shuffle_prompts": True}
    by_tenant: dict[str, dict] = {}
    white_space: dict[str, list[Stripped]] = {}
    samples_written: list[str] = []
    for number, names in enumerate(passes if passes is not None else [here]):
        tenants = [*([None] if base_here and number == 0 else []), *names]
        pairs = [(who, one) for task in tasks for one in task.questions for who in tenants if asks(task, who)]
        answers = dict(zip(pairs, answerer.answer(pairs), strict=True))
        for tenant in tenants:
            name, made = tenant or BASE, {}
            for one in tasks:
                if asks(one, tenant):
                    for section, values in one.results(partial(answer_of, answers, tenant)).items():
                        made.setdefault(section, {}).update(values)
            for task, samples in made.pop("samples", {}).items():
                write_samples(output / sample_files[name, task], name, task, samples)
                samples_written.append(sample_files[name, task])
            for task, stripped in made.pop("white_space", {}).items():
                white_space.setdefault(task, []).append(stripped)
            made |= run_record(answerer, tenant, about | {"adapter": sources.get(name)}, limits, begun)
            by_tenant[name] = made
    for name, made in by_tenant.items():
        made |= work_of(answerer)  # of all passes
        atomic.write_text(output / files[name], json.dumps(made, indent=2, default=str) + "\n")
    warn_of_white_space(white_space)
    others = sorted({path.name for path in output.glob("*.json")} - {*files.values(), SHARD_FILE})
    if others:
        say(f"{output} also holds results of earlier calls, which are not in table.md: {', '.join(others)}")
    own = {one.owner: one.names[0] for one in tasks if one.owner is not None and one.owner in here}
    computed = described_work(answerer.tokens, answerer.seconds, options.rows, devices.describe_devices())
    shown = {"limit": options.limit, "seed": options.seed, "shuffled": options.shuffle_prompts, "own": own}
    text = markdown_table(by_tenant, computed, libraries, **shown)
    atomic.write_text(output / "table.md", text + "\n")
    atomic.write_text(output / "table.csv", csv_table(by_tenant))
    if found is not None and part is not None:
        held = {"files": files, "samples": samples_written, "answers": len(answerer.asked)}
        if part.shard.index == 0:  # once is enough: the same for all shards
            names = [name for one in tasks for name in one.names]
            owners = {one.owner: one.names[0] for one in tasks if one.owner is not None}
            held |= {"names": [*([BASE] if base else []), *everyone], "tasks": names, "own": owners}
        write_part(output / SHARD_FILE, found._replace(ended=True, content=held))
    return text, by_tenant


def is_asked(task: TaskQuestions, tenant: str | None, *, here: Collection[str], alone: bool) -> bool:
    """Whether a task is asked of a tenant, or of the base model (None), in a shard with these adapters.

    Args:
        alone: another shard asks the base model what belongs to no tenant.
    """
    if task.owner is None:
        return tenant is not None or not alone
    return task.owner == tenant or (tenant is None and task.owner in here)


def answer_of(answers: dict, tenant: str | None, question: Question) -> Answer | None:
    return answers.get((tenant, question))
