"""`para-jax generate`: answers to --prompt in one batch, or to a file of requests."""

from __future__ import annotations

from ..adapters.names import name_and_source, named_adapters
from ..config import BASE
from ..io.checks import expanded, nearest
from ..io.messages import say, warn
from ..io.storage.bucket import BucketPath, Place
from . import options as shared
from .names import adapters_of, tenants_of_prompts


def add(commands) -> None:
    text = "answer prompts in one batch, or a file of requests"
    example = "--adapters runs/mine/adapter runs/other/adapter --tenant mine --prompt 'A fine film.'"
    parents = [requests(), shared.sampling(), shared.backbone(), shared.precision(), shared.runtime()]
    shared.add_command(commands, "generate", text, example, parents).set_defaults(run=run)


def requests() -> shared.Parser:
    """The options of this command alone; their groups come first in its help."""
    parser = shared.Parser(add_help=False)
    group = parser.add_argument_group("adapters")
    shared.option(group, "--adapter", "a folder or hub id, for every prompt (default: none)", metavar="DIR")
    shared.add_tenants(group)
    shared.add_adapter_memory(group, "each is loaded when a line needs it")
    text = f"the tenant whose adapter answers; give it once, or once per prompt; {BASE}: no adapter"
    shared.repeated(group, "--tenant", text, "NAME")
    group = parser.add_argument_group("prompts")
    shared.repeated(group, "--prompt", "\\n is a newline; may be given several times", "TEXT")
    shared.add_chat(group)
    shared.add_chat_template_kwargs(group)
    text = "Exit code: 0 if all lines were answered, 1 if some answers are errors, 2 if the job failed."
    group = parser.add_argument_group("a file of requests", text)
    text = "requests, one JSON object per line: OpenAI's batch format, or prompt or messages, tenant, sampling, n, "
    shared.option(group, "--input", text + "custom_id; a file or a pipe", expanded, metavar="FILE")
    text = "the file of answers; if stopped, the same command continues it. A pipe works too, but can't be resumed"
    shared.option(group, "--output", text, expanded, metavar="FILE")
    shared.add_shard(group, "every N-th line of the file, starting with line I, counted from 0")
    shared.add_engine_size(group)
    return parser


def run(options) -> int | None:
    sources, tenants = checked(options)
    if not options.input:
        return answer_prompts(options, *load(options, sources), tenants=tenants)
    from ..serving.answers import Answers

    with Answers(options.output) as answers:  # opened first: a wrong or locked file fails before anything is loaded
        errors = answer_file(options, *load(options, sources), tenants=tenants, answers=answers)
    return reported(options, errors)


def checked(options) -> tuple[dict[str, str], list[str | None] | None]:
    """The adapters by name, and the tenant of each prompt (see tenants_of_prompts). Raises ValueError, before JAX is
    loaded, for options that are wrong or do not go together, and for what is not there."""
    from ..serving.request import Request, check_request
    from .checks import check_adapters, check_new_folder, chosen_backbone

    if bool(options.prompt) == bool(options.input) or bool(options.input) != bool(options.output):
        raise ValueError("generate takes prompts or a file\ngive --prompt TEXT, or --input FILE with --output FILE")
    if options.shard and not options.input:
        raise ValueError(f"--shard {options.shard} goes with --input, not with --prompt\nleave it out")
    shared.require_chat(options)
    if options.input and options.chat:
        raise ValueError(
            "--chat goes with --prompt, not with --input\nin the file, give `messages` in place of `prompt`"
        )
    if options.chat_template_kwargs and options.prompt and not options.chat:
        warn("--chat-template-kwargs: not used without --chat, since the prompts are text")
    if options.prompt and not options.temperature and (options.top_k or options.top_p != 1):
        warn("--temperature is 0, which takes the most probable token: --top-k and --top-p change nothing")
    sources = named_adapters(options.adapters, options.adapters_from)
    if options.input and options.adapter:  # it answers the lines that name no tenant
        if sources or options.tenant:
            raise ValueError(
                f"--adapter {options.adapter} excludes --adapters and --tenant\nleave it out, or both of the others"
            )
        name, source = name_and_source(options.adapter)
        name = "adapter" if name == BASE else name  # in the lines, base is the base model
        sources, options.adapter, options.tenant = {name: source}, None, [name]
    adapters = [*sources.values(), *([options.adapter] if options.adapter else [])]
    check_adapters(adapters)
    tenants = tenants_of_prompts(options, sources)
    for prompt in options.prompt or ["a"]:
        check_request(Request(prompt, **sampling_of(options)))
    options.backbone = chosen_backbone(options.backbone, adapters)
    if options.input:
        check_input(options.input)
        if str(options.output) == "-":
            raise ValueError("--output -: give /dev/stdout for the standard output")
        if not isinstance(options.output, BucketPath) and options.output.is_dir():  # there, answers come in a folder
            raise ValueError(f"--output {options.output}: a folder\ngive the path of a file in it")
        check_new_folder("--output", options.output.parent)
    return sources, tenants


def check_input(source: Place) -> None:
    """Raises ValueError, before anything is loaded, if there is nothing to answer. A pipe is not touched."""
    if str(source) == "-":
        raise ValueError("--input -: give /dev/stdin for the standard input")
    if source.is_dir() or not source.exists():
        problem = "a folder" if source.is_dir() else f"no such file{nearest(source)}"
        raise ValueError(f"--input {source}: {problem}\ngive a file with one JSON request per line")
    if source.is_file():
        with source.open("rb") as stream:
            if any(map(bytes.strip, stream)):
                return
        raise ValueError(f"--input {source}: no line there\nwrite one request per line")


def load(options, sources: dict[str, str]) -> tuple:
    """The model, the tokenizer, and the adapters (see adapters_of)."""
    from ..adapters.preview import previews
    from ..backbone.load import load_model_config
    from ..data.tokenizer import load_tokenizer
    from ..io.hub import resolve_adapter

    shared.start_devices(options)
    found = {}
    if sources:  # a wrong adapter is found before weights are read
        found = dict(zip(sources, previews(sources.values(), load_model_config(options.backbone)), strict=True))
    if options.input:
        options.max_length = shared.engine_length(options)
    options.adapter = options.adapter and str(resolve_adapter(options.adapter))
    model = shared.load_model(options, source=options.backbone, **shared.model_options(options))
    return model, load_tokenizer(options.backbone, options.chat_template_kwargs), adapters_of(options, found, model)


def sampling_of(options) -> dict:
    """The options of `sampling`, checked, as arguments of generate and Request."""
    from ..inference.sampling import Sampling

    stop = [shared.with_newlines(text) for text in options.stop]
    return vars(Sampling(options.max_new_tokens, options.temperature, options.top_k, options.top_p, options.seed, stop))


def answer_prompts(options, model, tokenizer, adapters, tenants) -> None:
    from ..inference.generate import generate

    texts = [shared.with_newlines(prompt) for prompt in options.prompt]
    prompts = [shared.turns(options, text) for text in texts] if options.chat else texts
    answers = generate(model, prompts, tokenizer=tokenizer, adapters=adapters, tenants=tenants, **sampling_of(options))
    if len(answers) == 1:
        print(answers[0])
        return
    for i, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        tenant = f"[{tenants[i] or BASE}] " if tenants else ""
        print(f"> {tenant}{text}\n{answer}\n")


def answer_file(options, model, tokenizer, bank, tenants, answers) -> int:
    from ..server.batch import batch_request
    from ..serving.jobs import answer_lines

    engine, default = engine_of(options, model, tokenizer, bank, tenants)
    try:
        return answer_lines(engine, options.input, answers, default, options.shard, batch_request)
    except KeyboardInterrupt:
        if answers.regular:
            say(f"the answers so far are in {options.output}; the same command resumes")
        raise


def reported(options, errors: int) -> int:
    """The exit code of a job that has ended, after lines about its output."""
    none = f"{options.input} has no line of shard {options.shard}, so {options.output} is not written"
    say(f"wrote {options.output}" if options.output.exists() else none)
    if errors:
        say("1 answer is an error" if errors == 1 else f"{errors} answers are errors")
    return int(bool(errors))


def engine_of(options, model, tokenizer, bank, tenants) -> tuple:
    """The engine of a job, and the request with what its lines leave out."""
    from ..serving.engine import Engine
    from ..serving.request import Request

    engine = Engine(
        model,
        bank,
        tokenizer,
        slots=options.slots,
        max_length=options.max_length,
        max_prefill_tokens=options.max_prefill_tokens,
    )
    return engine, Request("", tenants[0] if tenants else None, **sampling_of(options))
