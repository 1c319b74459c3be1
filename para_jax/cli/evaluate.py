"""`para-jax evaluate`: one adapter or many on a config's data, on files, or on lm-eval's tasks."""

from __future__ import annotations

import argparse
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ..config import expanded, load_config
from ..messages import say, warn
from ..storage.bucket import BucketPath, Place
from . import options as shared
from .names import named_adapters
from .results import write_results

EXAMPLES = """
examples:
  para-jax evaluate runs/mine/config.yaml --adapter runs/mine/adapter
  para-jax evaluate --backbone smollm2-135m --adapters runs/a/adapter runs/b/adapter --tasks data/a data/b hellaswag
  para-jax evaluate --backbone smollm2-135m --adapters runs/tenants --tasks data/tenants --own

The first prints a line with the score. With --adapters, --tasks, --output or --log-samples, answers and results go to a
folder, and a table is printed. The same command resumes there after a stop.
"""


def add(commands) -> None:
    commands.add_parser(
        "evaluate",
        help="score adapters on a config's data, on files, or on lm-eval's tasks",
        description="Score adapters and the base model on held-out data.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[scored(), shared.precision(), shared.runtime()],
    ).set_defaults(run=run)


def scored() -> shared.Parser:
    """The options of this command alone; their groups come first in its help."""
    parser = shared.Parser(add_help=False)
    model = parser.add_argument_group("the model")
    model.add_argument(
        "config",
        type=shared.place,
        nargs="?",
        metavar="CONFIG",
        help="a run's config: its backbone, and its data as the task",
    )
    shared.add_overrides(model)
    model.add_argument(
        "--backbone",
        type=shared.filled,
        metavar="SOURCE",
        help="instead of CONFIG: a folder, a hub id, a .gguf file, or smollm2-135m (default: what the first adapter "
        "names)",
    )
    model.add_argument(
        "--adapter",
        type=shared.filled,
        metavar="DIR",
        help="score this adapter: a folder or hub id; default: the base model",
    )
    model.add_argument(
        "--adapters",
        type=shared.filled,
        nargs="+",
        default=[],
        metavar="DIR",
        help="score each of these adapters, and the base model: folders or hub ids, NAME=DIR, the folder of a run of "
        "many tenants, or a pattern in quotes, such as 'runs/*/adapter'",
    )
    shared.add_adapters_from(model)
    shared.add_adapter_memory(model, "they are evaluated in passes")
    data = parser.add_argument_group("the tasks")
    data.add_argument(
        "--tasks",
        type=shared.filled,
        nargs="+",
        default=[],
        metavar="TASK",
        help="a data file or folder, as [TASK=]PATH[:METRIC], or a task of lm-eval; default: the data of CONFIG",
    )
    data.add_argument(
        "--own",
        action="store_true",
        help="--tasks is a folder of tenants' data: score each adapter on its own test file, the base model on all",
    )
    data.add_argument(
        "--split",
        default="test",
        choices=("validation", "test"),
        help="which split of CONFIG's data and of folders to score; default: test",
    )
    shared.add_chat_template_kwargs(data)
    data.add_argument("--limit", type=int, metavar="N", help="score the first N examples of each task; default: all")
    data.add_argument("--rows", type=int, metavar="N", help="rows per batch; default: eval.batch_size of CONFIG, or 16")
    shared.add_prefill_tokens(data)
    data.add_argument(
        "--seed", type=int, help="for sampled answers and shuffled prompts; default: the seed of CONFIG, or 0"
    )
    data.add_argument(
        "--shuffle-prompts",
        action="store_true",
        help="give each example the factors of another example's prompt (not for lm-eval's tasks)",
    )
    harness = parser.add_argument_group("lm-eval's tasks")
    harness.add_argument("--include-path", type=shared.local, metavar="FOLDER", help="a folder of further task files")
    harness.add_argument(
        "--num-fewshot", type=int, metavar="N", help="examples in each context; default: the task's own number"
    )
    harness.add_argument("--chat", action="store_true", help="format contexts with the chat template")
    output = parser.add_argument_group("output")
    shared.add_shard(output, "for one part of the adapters, chosen by a hash of their files")
    output.add_argument(
        "--output",
        type=shared.place,
        metavar="FOLDER",
        help="the folder for answers, results and the table; default: runs/evaluation",
    )
    output.add_argument(
        "--log-samples",
        action="store_true",
        help="also write each example's prompt, expected and given answer, and scores: samples_ADAPTER_TASK.jsonl",
    )
    output.add_argument(
        "--results", type=shared.place, metavar="FILE", help="write config, device and scores to this JSON file"
    )
    return parser


def run(options) -> None:
    check_options(options)
    config = config_of(options)
    if options.results:
        from ..record_file import check_record_file

        check_record_file("--results", options.results)
    check_sources(options, config)
    output = output_of(options)
    if output is None:
        one_score(options, config)
    else:
        into_folder(options, config, output)


def check_options(options) -> None:
    """Raises ValueError for options that are missing, out of range or do not go together."""
    given = str(options.config)
    if re.match(r"[a-z_]+(\.\w+)* *=", given) and not expanded(given).exists():  # the first field, without CONFIG
        options.config, options.overrides = None, [str(options.config), *options.overrides]
    if options.config is not None and options.backbone is not None:
        both = f"{options.config}, {options.backbone}"
        raise ValueError(f"evaluate: CONFIG and --backbone are both given ({both}); give one of them")
    if options.config is None and not (options.tasks or any(text.startswith("data.") for text in options.overrides)):
        raise ValueError("evaluate: no task is given; give the CONFIG of a run, or --backbone with --tasks")
    if options.adapter and many(options):
        raise ValueError("evaluate: --adapter and --adapters are both given; put all adapters into --adapters")
    if options.shard and not (many(options) and options.output):
        raise ValueError(f"--shard {options.shard} requires --adapters or --adapters-from, and an --output of its own")
    if options.shuffle_prompts and not (options.adapter or many(options)):
        raise ValueError("--shuffle-prompts requires --adapter or --adapters: the base model makes no factors")
    if options.own and (len(options.tasks) != 1 or not (options.adapter or many(options))):
        raise ValueError("--own requires --adapters and one folder as --tasks\ngive --tasks FOLDER --own")
    for name, least in (("limit", 1), ("rows", 1), ("num_fewshot", 0), ("seed", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value}: give a whole number of at least {least}")
    if options.seed is not None and options.seed >= 2**32:
        raise ValueError(f"--seed {options.seed}: give a whole number below 2**32")
    for name in ("include_path", "num_fewshot", "chat"):
        if not options.tasks and getattr(options, name) not in (None, False):
            raise ValueError(f"--{name.replace('_', '-')} requires --tasks: it changes how lm-eval's tasks are asked")


def many(options) -> bool:
    """Whether adapters are scored together with the base model, with results in a folder."""
    return bool(options.adapters or options.adapters_from)


def output_of(options) -> Place | None:
    """The folder for the results; None where one score is printed."""
    needed = many(options) or options.tasks or options.log_samples
    return options.output or (Path("runs/evaluation") if needed else None)


def sources_of(options) -> dict[str, str]:
    """{name: folder or hub id} of all adapters."""
    return named_adapters([options.adapter] if options.adapter else options.adapters, options.adapters_from)


def check_sources(options, config) -> None:
    """Raises ValueError, before JAX is loaded, for a backbone, an adapter or data that is not there."""
    from ..data.sources import open_split
    from ..record_file import check_results_folder, check_writable
    from .checks import check_adapters, check_backbone, check_data, check_new_folder, check_tasks, is_elsewhere

    output = output_of(options)
    if output is not None:
        check_new_folder("--output", output)
        if not isinstance(output, BucketPath):
            check_results_folder(output)
            check_writable("--output", output, output)
    check_backbone(config.backbone.source)
    sources = sources_of(options)
    check_adapters(sources.values())
    if not options.own:
        check_tasks(options.tasks, options.split)
        warn_of_unused(options, config)
    if not options.tasks:
        check_data(config, [options.split])
        if not is_elsewhere(config.data, options.split) and open_split(config.data, options.split) is None:
            raise no_data(options, config)


def warn_of_unused(options, config) -> None:
    """Warns of settings that --tasks makes useless: a config's templates, overrides of its data and metric, and,
    without a task of lm-eval, its options."""
    from ..evaluation.task_file import named_file

    if not options.tasks:
        return
    fields = [text.partition("=")[0] for text in options.overrides]
    used = ("eval.batch_size", "data.chat_template_kwargs")
    unused = [name for name in fields if name.startswith(("data.", "eval.")) and name not in used]
    unused += [f"data.{name}" for name in ("prompt", "completion") if getattr(config.data, name) is not None]
    if unused:
        advice = f"give data.{options.split} in place of --tasks"
        warn(f"{', '.join(dict.fromkeys(unused))}: not used, since --tasks replaces the config's data; {advice}")
    if all(named_file(text, options.split) for text in options.tasks):
        for name, advice in (("include_path", ""), ("num_fewshot", ""), ("chat", "; give rows with messages")):
            if getattr(options, name) not in (None, False):
                warn(f"--{name.replace('_', '-')}: not used, since none of --tasks is lm-eval's{advice}")


def config_of(options):
    """The config with what the options change: backbone, precision, runtime, rows and seed."""
    from .checks import chosen_backbone

    config = load_config(options.config, options.overrides)
    if options.config is None and not any(text.startswith("backbone.source") for text in options.overrides):
        options.backbone = chosen_backbone(options.backbone, sources_of(options).values())
    backbone = {name: getattr(options, name) for name in ("dtype", "quantize", "attention")}
    runtime = {"allow_cpu": options.allow_cpu or config.runtime.allow_cpu}
    runtime |= {"compilation_cache": config.runtime.compilation_cache and not options.no_compilation_cache}
    return replace(
        config,
        backbone=replace(config.backbone, **given({"source": options.backbone, **backbone})),
        runtime=replace(config.runtime, **runtime),
        data=replace(config.data, **given({"chat_template_kwargs": options.chat_template_kwargs})),
        eval=replace(config.eval, **given({"batch_size": options.rows})),
        **given({"seed": options.seed}),
    )


def given(values: dict) -> dict:
    return {name: value for name, value in values.items() if value is not None}


def run_task(options, config, tokenizer):
    """The config's own data as a task."""
    from ..evaluation.tasks import say_long, task_of_run

    task = task_of_run(config, options.split, tokenizer)
    if task is None:
        raise no_data(options, config)
    say_long(options.split, [task])
    return task


def no_data(options, config) -> ValueError:
    from ..data.sources import open_split

    open_split(config.data, "train")  # a ValueError where it should be but is not: the split would be next to it
    return ValueError(
        f"data.{options.split} is not set: give a .jsonl file, {options.split}.jsonl in data.train's folder, or "
        "tfds:NAME or hf:NAME" + ("; a tenant's own config is in its folder of the run" if config.data.tenants else "")
    )


def own_configs(options, config, tenants, model_config):
    """How `--own` scores each tenant that has training data or a tenant.yaml: as a run on its folder does. Without
    CONFIG, long prompts lose their start."""
    from ..data.row_files import split_file
    from ..data.tenant_file import with_own_fields
    from ..data.tenants import OWN_FILE
    from ..evaluation.task_file import task_parts

    task, folder, metric = task_parts(options.tasks[0])
    section = replace(config.data, validation=None, test=None, tenants=None, **given({"task": task}))
    if options.config is None:
        section = replace(section, max_seq_length=model_config.max_positions, truncate="left")
    made = {}
    for tenant in tenants if folder else ():
        data = folder / tenant
        if split_file(data, "train") is None and not (data / OWN_FILE).is_file():
            continue
        own = with_own_fields(replace(config, data=replace(section, train=str(data))), data)
        made[tenant] = replace(own, eval=replace(own.eval, metric=metric, also=())) if metric else own
    return made


def one_score(options, config) -> None:
    """Prints the score of one adapter, or of the base model, on the config's data."""
    from .. import devices
    from ..adapters.files import load_adapter
    from ..data.tokenizer import run_tokenizer
    from ..evaluation.scoring import evaluate

    devices.start(replace(config.runtime, coordinator=None, num_processes=None, process_id=None))  # a pod's run too
    begun = time.monotonic()
    tokenizer = run_tokenizer(config)
    task = run_task(options, config, tokenizer)
    model = shared.load_model(options, **vars(config.backbone))
    adapter = load_adapter(options.adapter, model.config, model=model) if options.adapter else None
    if adapter is None:
        say("no --adapter is given: these are the base model's scores")
    how = dict(limit=options.limit, shuffle_prompts=options.shuffle_prompts, seed=config.seed)
    report = evaluate(model, adapter, [task], tokenizer=tokenizer, **how)
    if options.results:
        scores = {score.name: score.record() for score in report.scores}
        write_results(options, config, scores, time.monotonic() - begun)
    print(report)


def into_folder(options, config, output: Place) -> None:
    """Scores adapters on tasks, with answers and results in a folder, and prints the table."""
    begun = time.monotonic()
    loaded = load(options, config)
    try:
        table, records = evaluate_part(options, config, loaded, options.shard, output)
    except KeyboardInterrupt:
        say(f"the answers so far are in {output}; the same command resumes")
        raise
    if options.results:
        scores = {name: record["results"] for name, record in records.items()}
        write_results(options, config, scores, time.monotonic() - begun)
    print(table)
    say(f"wrote {output}")


class Loaded(NamedTuple):
    """What all shards of an evaluation use."""

    model: Any
    tokenizer: Any
    tasks: list
    how: Any
    """evaluation.task_questions.Options"""
    sources: dict[str, str]
    """{name: folder or hub id} of all adapters"""
    found: dict[str, Any]
    """their previews"""


def load(options, config) -> Loaded:
    """Starts the devices and loads everything but the adapters. A wrong task or adapter is found before weights are
    read."""
    from .. import devices
    from ..adapters.preview import previews
    from ..backbone.load import load_model_config
    from ..data.tokenizer import run_tokenizer
    from ..evaluation.task_questions import Options, questions_of_run, read_own_tasks, read_tasks

    if config.runtime.coordinator is not None:  # each host would write the same files
        raise ValueError(
            f"runtime.coordinator {config.runtime.coordinator}: evaluate with --adapters, --tasks, --output or "
            "--log-samples runs on one host; set runtime.coordinator=null"
        )
    sources = sources_of(options)
    devices.start(config.runtime)
    how = Options(
        limit=options.limit,
        rows=config.eval.batch_size,
        prefill_tokens=options.max_prefill_tokens,
        seed=config.seed,
        include_path=options.include_path,
        fewshot=options.num_fewshot,
        chat=options.chat,
        split=options.split,
        shuffle_prompts=options.shuffle_prompts,
        log_samples=options.log_samples,
    )
    tokenizer, model_config = run_tokenizer(config), load_model_config(config.backbone.source)
    if options.own:
        configs = own_configs(options, config, list(sources), model_config)
        tasks = read_own_tasks(options.tasks[0], list(sources), tokenizer, model_config, how, configs)
    elif options.tasks:
        tasks = read_tasks(options.tasks, tokenizer, model_config, how)
    else:
        tasks = [questions_of_run(run_task(options, config, tokenizer), tokenizer, model_config, how)]
    found = dict(zip(sources, previews(sources.values(), model_config), strict=True))
    model = shared.load_model(options, **vars(config.backbone))
    return Loaded(model, tokenizer, tasks, how, sources, found)


def evaluate_part(options, config, loaded: Loaded, shard, output) -> tuple[str, dict[str, dict]]:
    """Evaluates a shard's adapters, or all (None), into a folder. Returns the table and each adapter's record."""
    from ..adapters.bank import AdapterBank
    from ..adapters.preview import load_previewed
    from ..evaluation.adapter_passes import adapters_at_once, described_passes, in_passes
    from ..evaluation.folder import evaluate_to_folder
    from ..evaluation.shard_part import ShardOfAdapters

    model, tokenizer, tasks, how, sources, found = loaded
    part = ShardOfAdapters(shard, {name: preview.digest for name, preview in found.items()}) if shard else None
    names = part.names if part else list(sources)
    bank, passes = None, None
    if sources:
        configs = [preview.config for preview in found.values()]
        bank = AdapterBank.fitting(configs, model.config, capacity=2 * len(sources))
        largest = max(preview.nbytes for preview in found.values())
        most = adapters_at_once(largest, int(options.adapter_memory * 1e9))
        say((f"shard {shard}: " if part else "") + described_passes(bank, names, len(sources), most, largest))

        def load_one(name: str):
            return load_previewed(found[name], model.config, model=model)

        passes = in_passes(bank, names, load_one, most)
    about = {"backbone": config.backbone.source, "quantize": config.backbone.quantize, "command": options.command_line}
    try:
        return evaluate_to_folder(
            model,
            bank,
            tokenizer,
            tasks,
            output,
            how,
            sources,
            about,
            base=not options.adapter,
            passes=passes,
            part=part,
        )
    finally:
        if passes is not None:
            passes.close()
