"""evaluate: the scores of one adapter or of thousands on held-out examples, in one call."""

from __future__ import annotations

import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ..config import BASE, ModelConfig, RunConfig, load_config
from ..data.examples import require_tokenizer
from ..io.checks import expanded
from ..io.shards import parse_shard
from ..io.storage.bucket import Place
from ..model.adapted import require_backbone
from .adapter_passes import PLACES, Adapters, bank_and_passes, find_adapters
from .folder import evaluate_in_memory, evaluate_to_folder
from .options import EvalOptions
from .results import Results
from .shard_part import ShardOfAdapters
from .task_questions import TaskQuestions, own_configs, read_own_tasks, read_tasks

DEFAULTS = EvalOptions()


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
    memory than `options.adapter_memory`.

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
    """
    require_backbone(model)
    require_tokenizer(tokenizer)
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

    Args:
        about: what the records say about the call.
    """
    tasks, adapters = plan
    if options.shard and not output:
        raise ValueError(f"shard {options.shard} requires an output of its own; `para-jax merge` joins the outputs")
    part = ShardOfAdapters(parse_shard(str(options.shard)), adapters.digests) if options.shard else None
    names = part.names if part else list(adapters.sources)
    base = len(adapters.sources) != 1 if options.base is None else options.base or not adapters.sources
    who = f"shard {options.shard}: " if part else ""
    bank, passes = bank_and_passes(adapters, names, model, int(options.adapter_memory * 1e9), who)
    with closing(passes):
        given = {"base": base, "passes": passes}
        what = options, adapters.sources, about or {}
        if output is None:
            return evaluate_in_memory(model, bank, tokenizer, tasks, *what, **given)
        folder = expanded(str(output)) if isinstance(output, str | Path) else output
        return evaluate_to_folder(model, bank, tokenizer, tasks, folder, *what, **given, part=part)
