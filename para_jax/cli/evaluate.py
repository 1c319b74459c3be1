"""`para-jax evaluate`: an adapter on a config's test data, or many adapters on many tasks."""

from __future__ import annotations

import time
from pathlib import Path

from . import options as shared
from .names import named_adapters
from .results import write_results

#: Options that a CONFIG does not go with.
MANY_ALONE = (
    *("adapters", "output", "rows", "include_path", "num_fewshot", "chat", "seed"),
    *("dtype", "quantize", "attention", "allow_cpu", "no_compilation_cache"),
)


def add(commands) -> None:
    text = "score an adapter on a config's test data, or with --backbone many on many tasks"
    parser = commands.add_parser(
        "evaluate", help=text, description=text, parents=[shared.precision(), shared.runtime()]
    )
    parser.add_argument("config", type=shared.place, nargs="?", help="of a run; or --backbone, --adapters and --tasks")
    parser.add_argument("overrides", nargs="*", default=[], help=shared.RUN_FIELDS)
    parser.add_argument("--adapter", help="with CONFIG: an adapter folder or hub id; default: the backbone alone")
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--limit", type=int, help="the most examples scored, of each task")
    parser.add_argument(
        "--shuffle-prompts",
        action="store_true",
        help="with CONFIG: give each example the factors of another example's prompt",
    )
    parser.add_argument(
        "--results", type=shared.place, help="with CONFIG: write config, device and scores to this JSON file"
    )
    parser.add_argument(
        "--backbone", help="a folder, a hub id, a .gguf file, or smollm2-135m; it is scored beside --adapters"
    )
    parser.add_argument("--adapters", nargs="+", default=[], metavar="DIR", help="folders or hub ids, or NAME=DIR")
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="TASK",
        help="our own: [TASK=]FILE_OR_FOLDER[:METRIC] of JSON lines; or the names of lm-eval's tasks",
    )
    parser.add_argument(
        "--output", type=shared.place, help="folder of answers and results; the same command goes on there"
    )
    parser.add_argument("--rows", type=int, help="with --backbone: rows of a batch; default: 16")
    parser.add_argument("--include-path", type=shared.local, help="a folder of further task files for lm-eval")
    parser.add_argument("--num-fewshot", type=int, help="examples in each context of lm-eval's tasks")
    parser.add_argument("--chat", action="store_true", help="put lm-eval's contexts into the chat template")
    parser.add_argument("--seed", type=int, help="with --backbone: of sampled answers; default: 0")
    parser.set_defaults(run=run)


def run(options) -> None:
    from ..config import require

    require(options.limit is None or options.limit >= 1, "--limit", options.limit, "at least 1 example")
    if (options.config is None) == (options.backbone is None) or bool(options.backbone) != bool(options.tasks):
        raise ValueError("evaluate: expected the CONFIG of a run, or --backbone with --tasks (and --adapters)")
    stray = ["--" + name.replace("_", "-") for name in MANY_ALONE if is_given(getattr(options, name))]
    beside = "them beside --backbone and --tasks only; with CONFIG fields of the run, such as backbone.dtype=bfloat16"
    require(not (options.config and stray), "evaluate CONFIG", ", ".join(stray), beside)
    (run_many if options.backbone else run_config_task)(options)


def is_given(value: object) -> bool:
    """Whether an option stands on the command line, 0 too."""
    return value not in ([], None) and value is not False


def run_config_task(options) -> None:
    from .. import devices
    from ..adapters.files import load_adapter
    from ..backbone.load import load_backbone
    from ..config import load_config, require
    from ..data.tokenizer import load_tokenizer
    from ..evaluation.evaluate import evaluate, task_of_run
    from ..inspect import check_record_file

    shuffled = "to stand beside --adapter, whose factors are shuffled"
    require(options.adapter or not options.shuffle_prompts, "--shuffle-prompts", True, shuffled)
    config = load_config(options.config, options.overrides)
    if options.results:
        check_record_file("--results", options.results)
    devices.start(config.runtime)
    begun = time.monotonic()
    tokenizer = load_tokenizer(config.backbone.source)
    task = task_of_run(config, options.split, tokenizer)
    if task is None:
        raise ValueError(
            f"data.{options.split} is not set; expected a .jsonl file, {options.split}.jsonl in data.train's folder, "
            "or tfds:NAME" + ("; a tenant's own config is in its folder of the run's" if config.data.tenants else "")
        )
    model = load_backbone(**vars(config.backbone))
    adapter = load_adapter(options.adapter, model.config, model=model) if options.adapter else None
    shuffle, seed = options.shuffle_prompts, config.seed
    report = evaluate(
        model, adapter, [task], tokenizer=tokenizer, limit=options.limit, shuffle_prompts=shuffle, seed=seed
    )
    print(report)
    if options.results:
        write_results(options, config, {s.name: s.record() for s in report.scores}, time.monotonic() - begun)


def run_many(options) -> None:
    from .. import devices
    from ..adapters.bank import AdapterBank
    from ..adapters.files import load_adapter
    from ..backbone.load import load_backbone, load_model_config
    from ..config import require
    from ..data.tokenizer import load_tokenizer
    from ..evaluation.many import Settings, evaluate_many, read_tasks
    from ..hub import resolve_adapter

    rows, seed = 16 if options.rows is None else options.rows, options.seed or 0
    require(rows >= 1, "--rows", rows, "at least 1")
    require(0 <= seed < 2**32, "--seed", seed, "a whole number from 0 to 2**32 - 1")
    shots = options.num_fewshot
    require(shots is None or shots >= 0, "--num-fewshot", shots, "at least 0 examples")
    given = options.adapter or options.results or options.overrides or options.shuffle_prompts
    require(
        not given, "evaluate --backbone", given, "--adapters, and --output in place of --results; no fields of a run"
    )
    sources = named_adapters(options.adapters)
    shared.start_devices(options)
    settings = Settings(options.limit, rows, seed, options.include_path, shots, options.chat, options.split)
    tokenizer = load_tokenizer(options.backbone)
    tasks = read_tasks(options.tasks, tokenizer, load_model_config(options.backbone), settings)
    folders = {name: resolve_adapter(source) for name, source in sources.items()}
    model = load_backbone(options.backbone, **shared.model_options(options))
    held = {name: load_adapter(folder, model.config, model=model) for name, folder in folders.items()}
    bank = AdapterBank.holding(held, model.config) if held else None
    about = {"backbone": options.backbone, "quantize": options.quantize, "command": options.command_line}
    output = options.output or Path("runs/evaluation")
    try:
        print(evaluate_many(model, bank, tokenizer, tasks, output, settings, sources, about))
    except KeyboardInterrupt:
        devices.say(f"the answers so far are in {output}; the same command goes on there")
        raise
    devices.say(f"wrote {output}")
