"""para-jax: the command line. A user's mistake gives one or two lines and exit code 2, never a traceback."""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import os
import select
import shlex
import sys
import time
from pathlib import Path

from ..config import ATTENTION, printable, shorten
from ..storage.bucket import BucketPath, Place, address

LONGEST_LINE, LONGEST_ERROR = 4000, 1900  # characters of a report's line, and of an error's, which has two at most
BASE = "base"  # the tenant that is the base model
#: Options of evaluate that a CONFIG does not go with.
MANY_ALONE = (
    *("adapters", "output", "rows", "include_path", "num_fewshot", "chat", "seed"),
    *("dtype", "quantize", "attention", "allow_cpu", "no_compilation_cache"),
)
RUN_FIELDS = "fields of the config, such as train.learning_rate=3e-3 or 'data.prompt={question}\\n' (text is literal)"


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {printable(message)} (see {self.prog} --help)\n")


def place(text: str) -> Place:
    """A path, also one in a bucket, of an argument."""
    try:
        return address(text) or Path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def local(text: str) -> Path:
    """A path of this host, of an argument."""
    if isinstance(place(text), BucketPath):
        raise argparse.ArgumentTypeError(f"{text}: expected a path on this host")
    return Path(text)


def main(arguments: list[str] | None = None) -> int:
    """Runs one command. Its exit code: 0; 1 if the quickstart fell short, a tenant's loss was not finite, or some lines
    of a job were answered with errors; 2 for a user's mistake; 130 for Ctrl-C; 141 if the reader of the output has
    closed it, as `head` does."""
    try:
        try:
            return run(sys.argv[1:] if arguments is None else arguments)
        finally:  # of --help too
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where what is left of it goes at the exit
        return 141


def run(arguments: list[str]) -> int:
    options = parse(arguments)
    options.command_line = shlex.join(["para-jax", *arguments])
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        return options.run(options) or 0
    except (ValueError, OSError) as error:
        if os.environ.get("PARA_JAX_TRACEBACK") or (isinstance(error, BrokenPipeError) and output_is_closed()):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        print("para-jax: error: " + "\n".join(printable(line, LONGEST_ERROR) for line in lines[:2]), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("para-jax: interrupted", file=sys.stderr)
        return 130


def output_is_closed() -> bool:
    """Whether it is standard output, and no other pipe, that nobody reads any more."""
    if not hasattr(select, "poll"):  # Windows
        return True
    asked = select.poll()
    asked.register(sys.stdout.fileno(), 0)
    return bool(asked.poll(0))


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options; overrides may stand before and after flags, which argparse by itself does not take."""
    if arguments[:1] == ["lm-eval"]:  # whose arguments are lm-eval's to read
        return argparse.Namespace(run=run_lm_eval, arguments=arguments[1:])
    options, rest = parser().parse_known_args(arguments)
    overrides = [text for text in rest if hasattr(options, "overrides") and not text.startswith("-")]
    if len(overrides) < len(rest):
        parser().error(f"unknown argument {shorten(next(text for text in rest if text not in overrides))}")
    if overrides:
        options.overrides = [*options.overrides, *overrides]
    return options


def installed_version() -> str:
    try:
        return importlib.metadata.version("para_jax")
    except importlib.metadata.PackageNotFoundError:
        return "of a source folder that is not installed"


def parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="para-jax", description="Fine-tune and serve one frozen language model for many tenants with PARA."
    )
    top.add_argument("--version", action="version", version=f"para-jax {installed_version()}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)

    def command(name: str, run, help: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help, description=help)
        made.set_defaults(run=run)
        return made

    made = command("quickstart", run_quickstart, "train three small tenants on the built-in backbone, and serve them")
    made.add_argument("overrides", nargs="*", default=[], help=RUN_FIELDS)

    made = command("train", run_train, "train the adapter of a config; the same command resumes")
    made.add_argument("config", type=place)
    made.add_argument("overrides", nargs="*", default=[], help=RUN_FIELDS)
    made.add_argument(
        "--dry-run",
        action="store_true",
        help="check the config and print its sizes, without weights and a run folder",
    )
    made.add_argument(
        "--topology", help="with --dry-run: compile the step for a TPU slice such as v5e:4x4, without the slice"
    )
    made.add_argument("--results", type=place, help="write config, device and scores to this JSON file")

    made = command(
        "evaluate", run_evaluate, "score an adapter on a config's test data, or with --backbone many on many tasks"
    )
    made.add_argument("config", type=place, nargs="?", help="of a run; or --backbone, --adapters and --tasks")
    made.add_argument("overrides", nargs="*", default=[], help=RUN_FIELDS)
    made.add_argument("--adapter", help="with CONFIG: an adapter folder or hub id; default: the backbone alone")
    made.add_argument("--split", default="test", choices=("validation", "test"))
    made.add_argument("--limit", type=int, help="the most examples scored, of each task")
    made.add_argument(
        "--shuffle-prompts",
        action="store_true",
        help="with CONFIG: give each example the factors of another example's prompt",
    )
    made.add_argument("--results", type=place, help="with CONFIG: write config, device and scores to this JSON file")
    made.add_argument(
        "--backbone", help="a folder, a hub id, a .gguf file, or smollm2-135m; it is scored beside --adapters"
    )
    made.add_argument("--adapters", nargs="+", default=[], metavar="DIR", help="folders or hub ids, or NAME=DIR")
    made.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="TASK",
        help="our own: [TASK=]FILE_OR_FOLDER[:METRIC] of JSON lines; or the names of lm-eval's tasks",
    )
    made.add_argument("--output", type=place, help="folder of answers and results; the same command goes on there")
    made.add_argument("--rows", type=int, help="with --backbone: rows of a batch; default: 16")
    made.add_argument("--include-path", type=local, help="a folder of further task files for lm-eval")
    made.add_argument("--num-fewshot", type=int, help="examples in each context of lm-eval's tasks")
    made.add_argument("--chat", action="store_true", help="put lm-eval's contexts into the chat template")
    made.add_argument("--seed", type=int, help="with --backbone: of sampled answers; default: 0")
    made.add_argument("--dtype", choices=("float32", "bfloat16"))
    made.add_argument("--quantize", choices=("int8",))
    made.add_argument("--attention", choices=ATTENTION, help="the kernel for whole sequences; default: auto")
    made.add_argument("--allow-cpu", action="store_true", help="run on the CPU although the machine has an accelerator")
    made.add_argument("--no-compilation-cache", action="store_true")

    command("lm-eval", run_lm_eval, "lm-eval's own command line, with the model `para` (backbone=..., adapter=...)")

    made = command("generate", run_generate, "answer prompts in one batch")
    made.add_argument("--backbone", default="smollm2-135m", help="a folder, a hub id, a .gguf file, or smollm2-135m")
    made.add_argument("--dtype", choices=("float32", "bfloat16"))
    made.add_argument("--quantize", choices=("int8",))
    made.add_argument("--attention", choices=ATTENTION, help="the kernel for whole sequences; default: auto")
    made.add_argument("--adapter", help="an adapter folder or hub id, for every prompt")
    made.add_argument(
        "--adapters",
        nargs="+",
        default=[],
        metavar="NAME=DIR",
        help="tenants: names, and their adapter folders or hub ids (without NAME= the run's or folder's own name); or "
        "the folder of a run of many tenants, for all of them",
    )
    made.add_argument(
        "--tenant", action="append", default=[], help="whose adapter answers: once, or once a prompt; base: no adapter"
    )
    made.add_argument("--prompt", action="append", default=[], help="\\n is a newline; may be given several times")
    made.add_argument(
        "--input",
        type=place,
        help="requests, one JSON object per line: prompt or messages, tenant, sampling, n, id; a file or a pipe",
    )
    made.add_argument(
        "--output",
        type=place,
        help="answers to --input, where the same command goes on after a stop; or a pipe, which holds nothing to go on "
        "from. Exit code: 0 if all lines were answered, 1 if some answers are errors, 2 if the job was not run to its "
        "end",
    )
    made.add_argument("--slots", type=int, default=8, help="rows that decode together for --input")
    made.add_argument("--max-length", type=int, default=1024, help="tokens per row for --input, prompt and answer")
    made.add_argument("--chat", action="store_true", help="each --prompt is a user's turn for the chat template")
    made.add_argument("--max-new-tokens", type=int, default=64)
    made.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    made.add_argument("--top-k", type=int, default=0)
    made.add_argument("--top-p", type=float, default=1.0)
    made.add_argument(
        "--seed",
        type=int,
        default=0,
        help="prompt i is drawn with SEED + i; a line of --input without a seed gets one that is derived from SEED and "
        "the line's number",
    )
    made.add_argument(
        "--stop", action="append", default=[], help="a text that ends an answer; may be given several times"
    )
    made.add_argument("--allow-cpu", action="store_true", help="run on the CPU although the machine has an accelerator")
    made.add_argument("--no-compilation-cache", action="store_true")

    made = command("inspect", run_inspect, "show an adapter folder, a run folder, or a config's data as tokens")
    made.add_argument("target", type=place, help="a folder, or with --data a config")
    made.add_argument("overrides", nargs="*", default=[], help=RUN_FIELDS)
    made.add_argument(
        "--data", action="store_true", help="print three examples as tokens: prompt, loss, last prompt token"
    )

    made = command("convert", run_convert, "write a .gguf file as a Hugging Face folder")
    made.add_argument("gguf", type=local)
    made.add_argument("folder", type=local)

    made = command("prepare", run_prepare, "download a public data set for data.train=tfds:NAME")
    made.add_argument("source", help="tfds:NAME or tfds:NAME/CONFIG, a data set of tensorflow_datasets")
    made.add_argument("--data-dir", help="where to; default: tensorflow_datasets' own folder")

    made = command("plot", run_plot, "draw runs' learning curves, the factors of prompts, or how much they differ")
    made.add_argument("runs", nargs="*", type=place, metavar="RUN", help="run folders: their learning curves")
    made.add_argument(
        "--adapter", action="append", default=[], help="an adapter folder or hub id; with --data one or more"
    )
    made.add_argument("--backbone", default="smollm2-135m", help="a folder, a hub id, a .gguf file, or smollm2-135m")
    made.add_argument("--dtype", choices=("float32", "bfloat16"))
    made.add_argument(
        "--prompt", action="append", default=[], help="whose factors are drawn; of two also the difference"
    )
    made.add_argument("--data", type=place, help="a .jsonl file with prompts: how much the factors differ over them")
    made.add_argument("--limit", type=int, default=100, help="the most prompts of --data")
    made.add_argument("--output", type=place, required=True, help="the picture: .png, .pdf or .svg")
    made.add_argument("--allow-cpu", action="store_true", help="run on the CPU although the machine has an accelerator")
    made.add_argument("--no-compilation-cache", action="store_true")

    measured = "load, decode, serve, evaluate, train, packing or tenants"
    made = command("bench", run_bench, f"measure on this machine: {measured}")
    made.add_argument("name")
    made.add_argument("--backbone", default="smollm2-135m")
    made.add_argument("--output", type=local, help="write the measurement to this JSON file")
    made.add_argument("--rows", help="rows of a batch; decode: sizes such as 1,8,32; tenants: of each tenant")
    made.add_argument("--context", type=int, help="decode: tokens that each row holds")
    made.add_argument("--rounds", type=int, help="how often each side is measured")
    made.add_argument("--random", action="store_true", help="decode, train: random weights of the backbone's shape")
    made.add_argument("--packed", type=int, help="train: examples a row, of 64 tokens each")
    made.add_argument("--remat", help="train: what is compared, such as none,dots,block; packing: one of them")
    made.add_argument("--data", help="packing (which needs it): a .jsonl file or a folder with train.jsonl")
    made.add_argument("--length", type=int, help="packing: tokens of a packed row")
    return top


# ------------------------------------------------------------------------------------------------------------ commands
# Modules are imported when their command runs, so that --help and mistakes answer at once.


def run_quickstart(options) -> int:
    from ..quickstart import quickstart

    return 0 if quickstart(options.overrides) else 1


def run_train(options) -> int | None:
    from ..config import load_config, require
    from ..inspect import check_record_file, dry_run
    from ..processes import is_first
    from ..runs.train import train
    from ..training.metrics_file import read_metrics

    config = load_config(options.config, options.overrides)
    require(options.topology is None or options.dry_run, "--topology", options.topology, "to stand beside --dry-run")
    if options.dry_run:
        print(dry_run(config, options.topology))
        return
    if options.results and config.runtime.coordinator is None:  # of several hosts, one alone writes it
        check_record_file("--results", options.results)
    if config.many:
        return run_train_tenants(options, config)
    begun = time.monotonic()
    result = train(config)
    best = (
        ""
        if result.best_score is None
        else f", best validation score {result.best_score:.4f} at step {result.best_step}"
    )
    if not is_first():
        return
    print(f"{result.step} steps{best}; the adapter is in {result.output_dir / 'adapter'}")
    if options.results:
        rows = list(read_metrics(result.output_dir / "metrics.jsonl"))
        scores = {key: value for row in rows for key, value in row.items() if key.startswith(("test_", "validation_"))}
        write_results(options, config, scores, time.monotonic() - begun)


def run_train_tenants(options, config) -> int | None:
    from ..inspect import tenants_table
    from ..processes import is_first
    from ..runs.train import train_tenants

    begun = time.monotonic()
    result = train_tenants(config)
    code = int(any(entry["ended"] == "not finite" for entry in result.tenants.values()))
    if not is_first():
        return code
    print(f"{tenants_table(result.tenants)}\n\nthe adapters are in {result.output_dir}/NAME/adapter")
    if config.sweep:
        from ..plots import curves_plot, save

        try:
            drawn = [result.output_dir / name for name, entry in result.tenants.items() if entry["steps"] > 0]
            save(curves_plot(drawn), result.output_dir / "curves.png")
            print(f"the curves are in {result.output_dir / 'curves.png'}")
        except ValueError as error:  # matplotlib is not installed, or nothing was logged
            print(f"no picture of the curves: {error}")
    if options.results:
        write_results(options, config, result.tenants, time.monotonic() - begun)
    return code


def run_evaluate(options) -> None:
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


def run_many(options) -> None:
    from .. import devices
    from ..adapters.bank import AdapterBank
    from ..adapters.files import load_adapter
    from ..backbone.load import load_backbone, load_model_config
    from ..config import RuntimeSection, require
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
    devices.start(RuntimeSection(compilation_cache=not options.no_compilation_cache, allow_cpu=options.allow_cpu))
    settings = Settings(options.limit, rows, seed, options.include_path, shots, options.chat, options.split)
    tokenizer = load_tokenizer(options.backbone)
    tasks = read_tasks(options.tasks, tokenizer, load_model_config(options.backbone), settings)
    folders = {name: resolve_adapter(source) for name, source in sources.items()}
    model = load_backbone(options.backbone, **model_options(options))
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


def run_lm_eval(options) -> None:
    from importlib.util import find_spec

    from ..evaluation.many import INSTALL

    if find_spec("lm_eval") is None:
        raise ValueError(INSTALL)
    from ..evaluation.harness.lm import harness_command

    harness_command(options.arguments)


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


def run_generate(options) -> int | None:
    from ..config import require
    from ..serving.answers import Answers
    from ..serving.request import Request, check_request

    if bool(options.prompt) == bool(options.input) or bool(options.input) != bool(options.output):
        raise ValueError("generate: expected --prompt, once or more, or --input FILE with --output FILE")
    if options.input and options.chat:
        raise ValueError("--chat: expected beside --prompt; for the chat template a line of --input has `messages`")
    sources = named_adapters(options.adapters)
    if options.input and options.adapter:  # the tenant of all lines that name none
        require(
            not sources and not options.tenant, "--adapter", options.adapter, "no --adapters and --tenant beside it"
        )
        sources, options.adapter = named_adapters([options.adapter]), None
        options.tenant = list(sources)
    tenants = tenants_of(options, sources)
    sampling = sampling_of(options)
    for prompt in options.prompt or ["a"]:
        check_request(Request(prompt, **sampling))
    if not options.input:
        return run_prompts(options, *loaded(options, sources), tenants=tenants)
    check_input(options.input)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with Answers(options.output) as answers:  # its mistakes are found, and others kept out, before anything is loaded
        return run_requests(options, *loaded(options, sources), tenants=tenants, answers=answers)


def check_input(source: Place) -> None:
    """Raises ValueError, before anything is loaded, if there is nothing to answer. A pipe is not touched."""
    from ..serving.answers import MAX_LINE, bounded_lines

    if source.is_dir() or not source.exists():
        raise ValueError(f"--input {source}: {'a folder' if source.is_dir() else 'no such file'}")
    if source.is_file():
        with source.open("rb") as stream:
            if not any(line is None or line.strip() for line in bounded_lines(stream, MAX_LINE)):
                raise ValueError(f"--input {source}: no line there; expected a request per line")


def loaded(options, sources: dict[str, str]) -> tuple:
    """The model, the tokenizer, and the adapters (see adapters_of)."""
    from .. import devices
    from ..backbone.load import load_backbone
    from ..config import RuntimeSection
    from ..data.tokenizer import load_tokenizer
    from ..hub import resolve_adapter

    devices.start(RuntimeSection(compilation_cache=not options.no_compilation_cache, allow_cpu=options.allow_cpu))
    sources = {name: str(resolve_adapter(source)) for name, source in sources.items()}
    options.adapter = options.adapter and str(resolve_adapter(options.adapter))
    model = load_backbone(options.backbone, **model_options(options))
    return model, load_tokenizer(options.backbone), adapters_of(options, sources, model)


def model_options(options) -> dict:
    attention = options.attention or "auto"
    return {"dtype": options.dtype, "quantize": options.quantize, "attention": attention}


def adapters_of(options, sources: dict[str, str], model):
    """None, one adapter, or the bank of --adapters."""
    from .. import devices
    from ..adapters.bank import AdapterBank
    from ..adapters.files import load_adapter

    if not sources:
        return load_adapter(options.adapter, model.config, model=model) if options.adapter else None
    held = {name: load_adapter(source, model.config, model=model) for name, source in sources.items()}
    bank = AdapterBank.holding(held, model.config)
    devices.say(str(bank))
    return bank


def sampling_of(options) -> dict:
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    stop = tuple(text.replace("\\n", "\n") for text in options.stop)
    return {name: getattr(options, name) for name in names} | {"stop": stop}


def run_prompts(options, model, tokenizer, adapters, tenants) -> None:
    from ..inference.generate import generate

    prompts = [prompt.replace("\\n", "\n") for prompt in options.prompt]
    asked = [[{"role": "user", "content": prompt}] for prompt in prompts] if options.chat else prompts
    texts = generate(model, asked, tokenizer=tokenizer, adapters=adapters, tenants=tenants, **sampling_of(options))
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        by = f"[{tenants[i] or BASE}] " if tenants else ""
        print(text if len(texts) == 1 else f"> {by}{prompt}\n{text}\n")


def run_requests(options, model, tokenizer, bank, tenants, answers) -> int:
    from ..devices import say
    from ..serving.engine import Engine
    from ..serving.jobs import answer_lines
    from ..serving.request import Request

    engine = Engine(model, bank, tokenizer, slots=options.slots, max_length=options.max_length)
    default = Request("", tenants[0] if tenants else None, **sampling_of(options))
    try:
        errors = answer_lines(engine, options.input, answers, default)
    except KeyboardInterrupt:
        if answers.regular:
            say(f"the answers so far are in {options.output}; the same command goes on there")
        raise
    say(f"wrote {options.output}")
    if errors:
        kinds = ", ".join(f"{count} {kind}" for kind, count in errors.most_common(10))
        say(f"{errors.total()} answers are errors: {kinds}{' ...' if len(errors) > 10 else ''}")
    return int(bool(errors))


def named_adapters(given: list[str]) -> dict[str, str]:
    """{name: folder or hub id} of --adapters DIR or NAME=DIR; a folder is called by its own name, that of a run
    (RUN/adapter) by the run's, and a run of many tenants stands for all of them."""
    from ..config import expanded

    sources: dict[str, str] = {}
    for text in itertools.chain.from_iterable(tenants_of_run(one) or [one] for one in given):
        name, equals, source = text.partition("=")
        if not equals or expanded(text).is_dir():
            folder = expanded(text)
            called = folder.resolve().parent if folder.resolve().name == "adapter" else folder.resolve()
            name, source = called.name if folder.is_dir() else text, text
        if not name or not source or name in sources or name == BASE:
            raise ValueError(
                f"--adapters {text!r}: the name {name!r} is taken or missing ({BASE} is the base model); give NAME=DIR"
            )
        sources[name] = source
    return sources


def tenants_of_run(folder: str) -> list[str]:
    """NAME=DIR for each tenant of a run of many; none for another text."""
    from ..config import expanded

    if "=" in folder or not (expanded(folder) / "tenants.json").is_file():
        return []
    found = [f"{path.parent.name}={path}" for path in sorted(expanded(folder).glob("*/adapter"))]
    if not found:
        raise ValueError(f"--adapters {folder}: no tenant of this run has an adapter yet")
    return found


def tenants_of(options, sources: dict[str, str]) -> list[str | None] | None:
    """A tenant's name, or None for the base model, for each prompt; with --input one for the lines that name none."""
    from ..adapters.bank import unknown

    names, prompts = options.tenant, len(options.prompt) or 1
    if not names and (options.input or not sources):
        return None
    if options.adapter or not sources:
        raise ValueError("--tenant chooses among --adapters NAME=DIR...; --adapter DIR serves every prompt alone")
    if len(names) not in (1, prompts):
        each = "" if options.input else f", or once for each of the {prompts} prompts"
        raise ValueError(
            f"--tenant: given {len(names)} times; expected once{each}: {', '.join(sources)}, or {BASE} for no adapter"
        )
    wrong = [name for name in names if name != BASE and name not in sources]
    if wrong:
        raise ValueError(f"--tenant: {unknown(wrong[0], tuple(sources))}")
    held = [None if name == BASE else name for name in names]
    return held if len(held) == prompts else held * prompts


def run_inspect(options) -> None:
    from ..config import load_config
    from ..inspect import data_report, folder_report

    found = (
        data_report(load_config(options.target, options.overrides)) if options.data else folder_report(options.target)
    )
    print("\n".join(printable(line, LONGEST_LINE) for line in found.splitlines()))  # what others wrote is in it


def run_convert(options) -> None:
    from ..data.tokenizer import load_tokenizer
    from ..gguf.file import convert_gguf

    convert_gguf(options.gguf, options.folder, load_tokenizer(options.gguf))
    print(f"wrote {options.folder}")


def run_prepare(options) -> None:
    from ..data.tfds import describe, prepare

    folder = prepare(options.source, options.data_dir)
    use = f"data.train={options.source}" + (f" data.data_dir={options.data_dir}" if options.data_dir else "")
    print(f"{folder}: {describe(folder)}; train on them with {use}")


def run_plot(options) -> None:
    from ..plots import FORMATS, curves_plot, save

    if options.output.suffix not in FORMATS:
        raise ValueError(f"--output {options.output}: expected a file that ends in {' or '.join(FORMATS)}")
    if not options.output.absolute().parent.is_dir():
        raise ValueError(f"--output {options.output}: no such folder; make it first")
    if options.limit < 2:
        raise ValueError(f"--limit {options.limit}: expected at least 2 prompts")
    adapters, prompts, data = len(options.adapter), len(options.prompt), options.data is not None
    curves = bool(options.runs) and not (adapters or prompts or data)
    maps = adapters == 1 and prompts in (1, 2) and not (options.runs or data)
    spread = adapters >= 1 and data and not (options.runs or prompts)
    if not (curves or maps or spread):
        raise ValueError(
            "plot: expected RUN... for learning curves, or one --adapter with --prompt, once or twice, for its "
            "factors, or --adapter, once or more, with --data FILE for how much they differ"
        )
    save(curves_plot(options.runs) if curves else factors_figure(options), options.output)
    print(f"wrote {options.output}")


def factors_figure(options):
    """The factors of --prompt, or the spread over --data, which is printed too."""
    from .. import devices
    from ..adapters.files import load_adapter
    from ..backbone.load import load_backbone
    from ..config import RuntimeSection
    from ..data.records import read_prompts
    from ..data.tokenizer import load_tokenizer
    from ..evaluation.factors import factor_spread, factors_of
    from ..plots import factors_plot, run_names, spread_plot

    given = read_prompts(options.data)[: options.limit] if options.data else []
    devices.start(RuntimeSection(compilation_cache=not options.no_compilation_cache, allow_cpu=options.allow_cpu))
    model, tokenizer = load_backbone(options.backbone, dtype=options.dtype), load_tokenizer(options.backbone)
    adapters = {
        name: load_adapter(source, model.config, model=model)
        for name, source in zip(run_names(options.adapter), options.adapter, strict=True)
    }
    if not options.data:
        asked = dict(zip("AB", (prompt.replace("\\n", "\n") for prompt in options.prompt), strict=False))
        adapter = next(iter(adapters.values()))
        made = {name: factors_of(model, adapter, prompt, tokenizer) for name, prompt in asked.items()}
        title = [f"{name}: {prompt!r:.90}" for name, prompt in asked.items()]
        return factors_plot(made, "\n".join([f"Factors of {options.adapter[0]} on {options.backbone}", *title]))
    spreads = {name: factor_spread(model, adapter, given, tokenizer) for name, adapter in adapters.items()}
    for name, spread in spreads.items():
        print(f"{name}: spread over {spread.prompts} prompts / size of the mean of l - 1\n{spread}\n")
    return spread_plot(
        spreads, f"How much factors differ over {len(given)} prompts of {options.data}, on {options.backbone}"
    )


def run_bench(options) -> None:
    from ..bench import run
    from ..config import require

    numbers = ("context", "rounds", "packed", "length")
    given = {name: getattr(options, name) for name in (*numbers, "data") if getattr(options, name) is not None}
    given |= {"random": True} if options.random else {}
    if options.rows:
        sizes = options.rows.split(",")
        require(all(size.isdecimal() and int(size) for size in sizes), "--rows", options.rows, "sizes such as 1,8,32")
        given["rows"] = tuple(map(int, sizes))
    require(all(given.get(name, 1) >= 1 for name in numbers), "bench", given, "numbers of at least 1")
    if options.remat:
        given["remat"] = tuple(options.remat.split(",")) if options.name == "train" else options.remat
    run(options.name, options.backbone, options.output, **given)


def write_results(options, config, scores: dict, seconds: float) -> None:
    from ..inspect import results, write_record

    write_record(options.results, results(options.command_line, config, scores, seconds))
    print(f"wrote {options.results}")
