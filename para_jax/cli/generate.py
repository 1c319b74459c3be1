"""`para-jax generate`: answers to --prompt in one batch, or to a file of requests."""

from __future__ import annotations

from ..storage.bucket import Place
from . import options as shared
from .names import BASE, adapters_of, named_adapters, tenants_of


def add(commands) -> None:
    text = "answer prompts in one batch"
    parents = [shared.backbone(), shared.precision(), shared.sampling(), shared.runtime()]
    parser = commands.add_parser("generate", help=text, description=text, parents=parents)
    parser.add_argument("--adapter", help="an adapter folder or hub id, for every prompt")
    parser.add_argument(
        "--adapters",
        nargs="+",
        default=[],
        metavar="NAME=DIR",
        help="tenants: names, and their adapter folders or hub ids (without NAME= the run's or folder's own name); or "
        "the folder of a run of many tenants, for all of them",
    )
    parser.add_argument(
        "--tenant", action="append", default=[], help="whose adapter answers: once, or once a prompt; base: no adapter"
    )
    parser.add_argument("--prompt", action="append", default=[], help="\\n is a newline; may be given several times")
    parser.add_argument(
        "--input",
        type=shared.place,
        help="requests, one JSON object per line: prompt or messages, tenant, sampling, n, id; a file or a pipe",
    )
    parser.add_argument(
        "--output",
        type=shared.place,
        help="answers to --input, where the same command goes on after a stop; or a pipe, which holds nothing to go on "
        "from. Exit code: 0 if all lines were answered, 1 if some answers are errors, 2 if the job was not run to its "
        "end",
    )
    parser.add_argument("--slots", type=int, default=8, help="rows that decode together for --input")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens per row for --input, prompt and answer")
    parser.add_argument("--chat", action="store_true", help="each --prompt is a user's turn for the chat template")
    parser.set_defaults(run=run)


def run(options) -> int | None:
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
        return answer_prompts(options, *loaded(options, sources), tenants=tenants)
    check_input(options.input)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with Answers(options.output) as answers:  # its mistakes are found, and others kept out, before anything is loaded
        return answer_file(options, *loaded(options, sources), tenants=tenants, answers=answers)


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
    from ..backbone.load import load_backbone
    from ..data.tokenizer import load_tokenizer
    from ..hub import resolve_adapter

    shared.start_devices(options)
    sources = {name: str(resolve_adapter(source)) for name, source in sources.items()}
    options.adapter = options.adapter and str(resolve_adapter(options.adapter))
    model = load_backbone(options.backbone, **shared.model_options(options))
    return model, load_tokenizer(options.backbone), adapters_of(options, sources, model)


def sampling_of(options) -> dict:
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    stop = tuple(text.replace("\\n", "\n") for text in options.stop)
    return {name: getattr(options, name) for name in names} | {"stop": stop}


def answer_prompts(options, model, tokenizer, adapters, tenants) -> None:
    from ..inference.generate import generate

    prompts = [prompt.replace("\\n", "\n") for prompt in options.prompt]
    asked = [[{"role": "user", "content": prompt}] for prompt in prompts] if options.chat else prompts
    texts = generate(model, asked, tokenizer=tokenizer, adapters=adapters, tenants=tenants, **sampling_of(options))
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        by = f"[{tenants[i] or BASE}] " if tenants else ""
        print(text if len(texts) == 1 else f"> {by}{prompt}\n{text}\n")


def answer_file(options, model, tokenizer, bank, tenants, answers) -> int:
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
