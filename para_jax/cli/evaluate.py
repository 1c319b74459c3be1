"""`para-jax evaluate`: one adapter or many on a config's data, on files, or on lm-eval's tasks."""

from __future__ import annotations

import argparse
import re
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

from ..adapters.names import named_adapters
from ..config import load_config
from ..config.bounds import PositiveInt, Seed
from ..evaluation.options import EvalOptions
from ..io.checks import expanded
from ..io.messages import say
from ..io.storage.bucket import Place
from . import options as shared

EXAMPLES = """
examples:
  para-jax evaluate runs/mine/config.yaml --adapter runs/mine/adapter
  para-jax evaluate --backbone smollm2-135m --adapters runs/a/adapter runs/b/adapter --tasks data/a data/b hellaswag
  para-jax evaluate --backbone smollm2-135m --adapters runs/tenants --tasks data/tenants --own

Each prints a table. With --adapters, --tasks, --output or --log-samples, answers and results go to a folder too. The
same command resumes there after a stop.
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
    text = "a run's config: its backbone, and its data as the task"
    model.add_argument("config", type=shared.place, nargs="?", metavar="CONFIG", help=text)
    shared.add_overrides(model)
    text = (
        "instead of CONFIG: a folder, a hub id, a .gguf file, or smollm2-135m (default: what the first adapter names)"
    )
    shared.option(model, "--backbone", text, metavar="SOURCE")
    text = "score this adapter: a folder or hub id; default: the base model"
    shared.option(model, "--adapter", text, metavar="DIR")
    text = (
        "score each of these adapters, and the base model: folders or hub ids, NAME=DIR, the folder of a run of many "
    )
    text += "tenants, or a pattern in quotes, such as 'runs/*/adapter'"
    shared.repeated(model, "--adapters", text, "DIR", nargs="+")
    shared.add_adapters_from(model)
    shared.add_adapter_memory(model, "they are evaluated in passes")
    data = parser.add_argument_group("the tasks")
    text = "a data file or folder, as [TASK=]PATH[:METRIC], or a task of lm-eval; default: the data of CONFIG"
    shared.repeated(data, "--tasks", text, "TASK", nargs="+")
    shared.add_fields(data, EvalOptions, "own")
    text = "which split of CONFIG's data and of folders to score"
    shared.option(data, "--split", text, Literal["validation", "test"], "test")
    shared.add_chat_template_kwargs(data)
    shared.add_fields(data, EvalOptions, "limit")
    shared.option(data, "--rows", "rows per batch; default: eval.batch_size of CONFIG, or 16", PositiveInt)
    shared.add_prefill_tokens(data)
    text = "for sampled answers and shuffled prompts; default: the seed of CONFIG, or 0"
    shared.option(data, "--seed", text, Seed, metavar="SEED")
    shared.add_fields(data, EvalOptions, "shuffle_prompts")
    harness = parser.add_argument_group("lm-eval's tasks")
    text = "a folder of further task files"
    shared.option(harness, "--include-path", text, expanded, metavar="FOLDER")
    shared.add_fields(harness, EvalOptions, "num_fewshot", "chat")
    output = parser.add_argument_group("output")
    shared.add_shard(output, "for one part of the adapters, chosen by a hash of their files")
    text = "the folder for answers, results and the table; default: runs/evaluation"
    shared.option(output, "--output", text, expanded, metavar="FOLDER")
    shared.add_fields(output, EvalOptions, "log_samples")
    shared.add_results(output)
    return parser


def run(options) -> None:
    check_options(options)
    config = config_of(options)
    if options.results:
        from ..io.record_file import check_record_file

        check_record_file("--results", options.results)
    begun, output = time.monotonic(), output_of(options)
    try:
        results = evaluated(options, config, output)
    except KeyboardInterrupt:
        if output is not None:
            say(f"the answers so far are in {output}; the same command resumes")
        raise
    if options.results:
        scores = {name: record["results"] for name, record in results.records.items()}
        shared.write_results(options, config, scores, time.monotonic() - begun)
    print(results.table())
    if output is not None:
        say(f"wrote {output}")


def check_options(options) -> None:
    """Takes the first override for what it is where there is no CONFIG. Raises ValueError for two backbones."""
    given = str(options.config)
    if re.match(r"[a-z_]+(\.\w+)* *=", given) and not expanded(given).exists():
        options.config, options.overrides = None, [given, *options.overrides]
    if options.config is not None and options.backbone is not None:
        both = f"{options.config}, {options.backbone}"
        raise ValueError(f"evaluate: CONFIG and --backbone are both given ({both}); give one of them")


def eval_options(options, **known: Any) -> EvalOptions:
    """How to evaluate, from the flags of the same names, and from what is known already."""
    flags = {one.name: getattr(options, one.name, None) for one in fields(EvalOptions)}
    return EvalOptions(**given(flags) | known)


def many(options) -> bool:
    """Whether adapters are scored together with the base model, with results in a folder."""
    return bool(options.adapters or options.adapters_from)


def output_of(options) -> Place | None:
    """The folder for the results; None if the table is only printed."""
    needed = many(options) or options.tasks or options.log_samples
    return options.output or (Path("runs/evaluation") if needed else None)


def sources_of(options) -> dict[str, str]:
    """{name: folder or hub id} of all adapters."""
    return named_adapters([*filter(None, [options.adapter]), *options.adapters], options.adapters_from)


def config_of(options):
    """The config with what the options change: backbone, precision, runtime, rows and seed."""
    config = load_config(options.config, options.overrides)
    if options.config is None and not any(text.startswith("backbone.source") for text in options.overrides):
        options.backbone = shared.chosen_backbone(options.backbone, sources_of(options).values())
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


def evaluated(options, config, output: Place | None):
    """The Results, into a folder if one is given. A wrong task or adapter is found before weights are read."""
    from ..backbone.load import load_model_config
    from ..data.tokenizer import run_tokenizer
    from ..evaluation.evaluate import plan_evaluation, run_evaluation
    from ..runtime import devices

    devices.start(replace(config.runtime, coordinator=None, num_processes=None, process_id=None))
    tokenizer, model_config = run_tokenizer(config), load_model_config(config.backbone.source)
    run = config
    if options.config is None:
        run = replace(config, data=replace(config.data, max_seq_length=None, truncate="left"))
    base = many(options) or not options.adapter
    how = eval_options(options, rows=config.eval.batch_size, seed=config.seed, base=base)
    plan = plan_evaluation(model_config, sources_of(options), options.tasks or config, tokenizer, how, run)
    model = shared.load_model(options, **vars(config.backbone))
    about = {"backbone": config.backbone.source, "quantize": config.backbone.quantize, "command": options.command_line}
    return run_evaluation(model, plan, tokenizer, output, how, about)
