"""Many adapters and the base model on many tasks in one pass, into a folder of answers, results and a table.

The questions of all tasks are collected once and answered for all adapters. Our own tasks are scored here, lm-eval's by
lm-eval. Each answer is in the folder's journal as soon as it is there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import NamedTuple

from ..adapters.bank import AdapterBank
from ..backbone.content import backbone_content
from ..config import BASE
from ..inference.content import writing_content
from ..io import atomic
from ..io.messages import say
from ..io.shards import SHARD_FILE, Shard, ShardOutput, begin_part, write_part
from ..io.storage.bucket import Place
from ..runtime import devices
from .answers import Answerer, tokens_to_write
from .journal import AnswerJournal
from .options import EvalOptions
from .questions import Generation
from .results import (
    ANSWERS_FILE,
    Results,
    check_results,
    csv_table,
    described_work,
    file_names,
    markdown_table,
    names_of_samples,
    run_record,
    versions,
    work_of,
)
from .samples import write_samples
from .shapes import PlannedShapes, plan_shapes
from .shard_part import ShardOfAdapters, settings_of
from .task_questions import TaskQuestions
from .white_space import Stripped, warn_of_white_space

#: Whether a task is asked of a tenant, or of the base model (None).
Asks = Callable[[TaskQuestions, str | None], bool]


def evaluate_to_folder(
    model,
    bank: AdapterBank | None,
    tokenizer,
    tasks: Sequence[TaskQuestions],
    output: Place,
    options: EvalOptions,
    sources: Mapping[str, str | None],
    about: dict,
    *,
    base: bool,
    passes: Iterable[Sequence[str]],
    part: ShardOfAdapters | None,
) -> Results:
    """Evaluates every tenant of the bank, and the base model, on tasks.

    The folder `output` gets answers.jsonl as they come, and at the end a JSON file per tenant, in lm-eval's layout,
    table.md and table.csv, and samples if the options say so. The same call on the same folder resumes a killed one.

    Args:
        sources, about: for the records: where each tenant comes from, by name (those of other shards too), and what
            was asked for.
        base: whether to evaluate the base model too.
        passes: names of tenants, which the bank holds when they are taken from here (adapter_passes.py).
        part: evaluate only this shard's adapters, which `passes` must then give. Shard 0 has the base model too; a
            task that is one tenant's own is asked of the base model in that tenant's shard. A file in the folder
            describes the shard, and merge.py joins the folders. None: all tenants.
    """
    everyone = list(sources)
    here = part.names if part else everyone
    asks = partial(is_asked, here=set(here), alone=part is not None and part.shard.index != 0)
    base_here = base and any(asks(one, None) for one in tasks)
    all_names = [*([BASE] if base else []), *everyone]
    named = file_names(all_names)
    files = {name: named[name] for name in (*([BASE] if base_here else []), *here)}
    content = backbone_content(model)
    earlier = check_results(output, list(files.values()), content)
    parts = [(name, task) for name in (BASE, *everyone) for one in tasks for task in one.names]
    sample_files = names_of_samples(parts) if options.log_samples else {}
    samples: list[str] = []

    def keep(name: str, task: str, lines: list[dict]) -> None:
        samples.append(sample_files[name, task])
        write_samples(output / samples[-1], name, task, lines)

    begin_part(output / SHARD_FILE, output, part.shard if part else None)
    if part is not None:
        require_no_others(output, part.shard, [file for name, file in named.items() if name not in files])
    with closing(AnswerJournal(output / ANSWERS_FILE)) as journal:
        given = {"rows": options.rows, "prefill_tokens": options.max_prefill_tokens, "journal": journal}
        given |= {"backbone": content, "shapes": shapes_of_tenants(tasks), "longest": longest_answer(tasks)}
        answerer = Answerer(model, bank, tokenizer, **given)
        libraries = versions()
        began = None if part is None else describe_part(output, part, answerer, tasks, libraries, options, base=base)
        found = answer_passes(answerer, tasks, passes, asks, keep, sources, about, options, base=base_here)
        text = write_results(output, files, earlier, found, samples, tasks, answerer, options, libraries)
        if began is not None:
            held = {"files": files, "samples": samples, "answers": len(answerer.asked)}
            if began.shard.index == 0:  # once is enough: the same for all shards
                names = [name for one in tasks for name in one.names]
                held |= {"names": all_names, "tasks": names, "own": owners(tasks)}
            write_part(output / SHARD_FILE, began._replace(ended=True, content=held))
        return Results(found.records, text, {})


def evaluate_in_memory(
    model,
    bank: AdapterBank | None,
    tokenizer,
    tasks: Sequence[TaskQuestions],
    options: EvalOptions,
    sources: Mapping[str, str | None],
    about: dict,
    *,
    base: bool,
    passes: Iterable[Sequence[str]],
) -> Results:
    """As evaluate_to_folder, without a folder. If all tasks are our own, they share few compiled shapes, as in a
    run."""
    encoded = [one.encoded for one in tasks if one.encoded is not None]
    shapes = plan_shapes(encoded) if len(encoded) == len(tasks) else None
    sizes = {"rows": options.rows, "prefill_tokens": options.max_prefill_tokens, "longest": longest_answer(tasks)}
    answerer = Answerer(model, bank, tokenizer, shapes=shapes, **sizes)
    samples: dict[str, dict[str, list[dict]]] = {}

    def keep(name: str, task: str, lines: list[dict]) -> None:
        samples.setdefault(name, {})[task] = lines

    asks = partial(is_asked, here=set(sources), alone=False)
    found = answer_passes(answerer, tasks, passes, asks, keep, sources, about, options, base=base)
    return Results(found.records, finished(found, tasks, answerer, options, versions()), samples)


class PassResults(NamedTuple):
    """What the passes gave."""

    records: dict[str, dict]
    """by name: of each tenant, and of the base model"""
    white_space: dict[str, list[Stripped]]
    """by task"""


def answer_passes(
    answerer: Answerer,
    tasks: Sequence[TaskQuestions],
    passes: Iterable[Sequence[str]],
    asks: Asks,
    keep: Callable[[str, str, list[dict]], None],
    sources: Mapping[str, str | None],
    about: dict,
    options: EvalOptions,
    *,
    base: bool,
) -> PassResults:
    """Asks the tenants of each pass, and in the first one the base model if `base`.

    Args:
        keep: takes the samples of an adapter and a task.
    """
    begun, found = time.time(), PassResults({}, {})
    limits = {"limit": options.limit, "rows": options.rows, "seed": options.seed}
    about = about | ({"shuffle_prompts": True} if options.shuffle_prompts else {})
    for number, names in enumerate(passes):
        tenants = [*([None] if base and number == 0 else []), *names]
        for tenant, made in answered(answerer, tasks, tenants, asks):
            name = tenant or BASE
            for task, samples in made.pop("samples", {}).items():
                keep(name, task, samples)
            for task, stripped in made.pop("white_space", {}).items():
                found.white_space.setdefault(task, []).append(stripped)
            adapter = {"adapter": sources.get(name)}
            found.records[name] = made | run_record(answerer, tenant, about | adapter, limits, begun)
    return found


def require_no_others(output: Place, shard: Shard, files: Sequence[str]) -> None:
    """Raises ValueError for a folder that is no shard's and has results that a shard would leave out of its tables.

    Args:
        files: the results that the shard does not have.
    """
    held = {file.name for file in output.iterdir()} if output.is_dir() else set()
    other = next((file for file in files if file in held), None)
    if other and SHARD_FILE not in held:
        raise ValueError(f"{output} has {other}, which shard {shard} does not have; choose another output")


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


def write_results(
    output: Place,
    files: Mapping[str, str],
    earlier: Mapping[str, set[str]],
    found: PassResults,
    samples: Sequence[str],
    tasks: Sequence[TaskQuestions],
    answerer: Answerer,
    options: EvalOptions,
    libraries: dict,
) -> str:
    """Writes each record and the tables. Returns the Markdown table.

    Args:
        earlier: the tasks of the files that these replace.
        samples: the files of samples.
    """
    replaced = {
        task for name, made in found.records.items() for task in earlier.get(files[name], set()) - set(made["results"])
    }
    if replaced:
        say(f"{output}: replaced its results of {', '.join(sorted(replaced))}; the answers are still in {ANSWERS_FILE}")
    text = finished(found, tasks, answerer, options, libraries)
    for name, made in found.records.items():
        atomic.write_text(output / files[name], json.dumps(made, indent=2, default=str) + "\n")
    others = sorted({path.name for path in output.glob("*.json")} - {*files.values(), SHARD_FILE})
    others += sorted({path.name for path in output.glob("samples_*.jsonl")} - {*samples})
    if others:
        say(f"{output} also holds results of earlier calls, which are not in table.md: {', '.join(others)}")
    atomic.write_text(output / "table.md", text + "\n")
    atomic.write_text(output / "table.csv", csv_table(found.records))
    return text


def finished(
    found: PassResults, tasks: Sequence[TaskQuestions], answerer: Answerer, options: EvalOptions, libraries: dict
) -> str:
    """The Markdown table, when all passes are answered. Each record gets the work of all."""
    for made in found.records.values():
        made |= work_of(answerer)
    warn_of_white_space(found.white_space)
    own = {tenant: task for tenant, task in owners(tasks).items() if tenant in found.records}
    computed = described_work(answerer.tokens, answerer.seconds, options.rows, devices.describe_devices(answerer.model))
    shown = {"limit": options.limit, "seed": options.seed, "shuffled": options.shuffle_prompts, "own": own}
    return markdown_table(found.records, computed, libraries, **shown)


def describe_part(
    output: Place,
    part: ShardOfAdapters,
    answerer: Answerer,
    tasks: Sequence[TaskQuestions],
    libraries: dict,
    options: EvalOptions,
    *,
    base: bool,
) -> ShardOutput:
    """The description of a shard that begins, which is written to its folder."""
    asked = ((one.names, one.owner, one.questions, one.scored_by) for one in tasks)
    writing = writing_content(answerer.tokenizer, answerer.stop_ids)
    device = devices.describe_devices(answerer.model)
    how = {"limit": options.limit, "rows": options.rows, "seed": options.seed}
    how |= {"shuffle_prompts": options.shuffle_prompts, "samples": options.log_samples, "base": base}
    settings = settings_of(answerer.backbone, device, writing, asked, part.digests, libraries, how)
    found = ShardOutput(output, part.shard, settings, False, {})
    write_part(output / SHARD_FILE, found)
    return found


def shapes_of_tenants(tasks: Sequence[TaskQuestions]) -> PlannedShapes | None:
    """The few shapes that all tenants' own tasks share, whichever of them this shard asks; None for other tasks."""
    own = [one.encoded for one in tasks if one.owner is not None and one.encoded is not None]
    return plan_shapes(own) if own else None


def longest_answer(tasks: Sequence[TaskQuestions]) -> int:
    """The maximum number of tokens of a context and the answer that is written to it."""
    written = (one for of_task in tasks for one in of_task.questions if isinstance(one, Generation))
    return max(map(tokens_to_write, written), default=0)


def owners(tasks: Sequence[TaskQuestions]) -> dict[str, str]:
    """The task of each tenant that has one of its own."""
    return {one.owner: one.names[0] for one in tasks if one.owner is not None}


def is_asked(task: TaskQuestions, tenant: str | None, *, here: Collection[str], alone: bool) -> bool:
    """Whether a task is asked of a tenant, or of the base model (None), in a shard with these adapters.

    Args:
        alone: another shard asks the base model what belongs to no tenant.
    """
    if task.owner is None:
        return tenant is not None or not alone
    return task.owner == tenant or (tenant is None and task.owner in here)
