"""`para-jax generate`: answers to --prompt in one batch, or to a file of requests."""

from __future__ import annotations

from ..adapters.names import name_and_source, named_adapters, unknown
from ..config import BASE
from ..io.checks import expanded, nearest
from ..io.messages import say
from . import options as shared


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
    loaded, for options that do not go together, and for a missing input."""
    if bool(options.prompt) == bool(options.input) or bool(options.input) != bool(options.output):
        raise ValueError("generate takes prompts or a file\ngive --prompt TEXT, or --input FILE with --output FILE")
    if options.input and not options.input.exists():
        raise ValueError(f"--input {options.input}: no such file{nearest(options.input)}")
    sources = named_adapters(options.adapters, options.adapters_from)
    if options.adapter:
        if sources or options.tenant:
            raise ValueError(
                f"--adapter {options.adapter} excludes --adapters and --tenant\nleave it out, or both of the others"
            )
        # A bank of this adapter alone, whose tenant answers all prompts.
        name, source = name_and_source(options.adapter)
        name = "adapter" if name == BASE else name  # in the lines of a file, base is the base model
        sources, options.tenant = {name: source}, [name]
    options.backbone = shared.chosen_backbone(options.backbone, sources.values())
    return sources, tenants_of_prompts(options, sources)


def tenants_of_prompts(options, sources: dict[str, str]) -> list[str | None] | None:
    """A tenant's name for each prompt, or None for the base model. With --input, the one name for lines without."""
    names, prompts = options.tenant, len(options.prompt) or 1
    if not names and (options.input or not sources):
        return None
    if len(names) not in (1, prompts):
        advice = f"give it once, or once for each; {BASE} is no adapter"
        raise ValueError(f"--tenant is given {len(names)} times for {prompts} prompts\n{advice}")
    if strangers := [name for name in names if name != BASE and name not in sources]:
        raise ValueError(f"--tenant: {unknown(strangers[0], tuple(sources))}")
    tenants = [None if name == BASE else name for name in names]
    return tenants if len(tenants) == prompts else tenants * prompts


def load(options, sources: dict[str, str]) -> tuple:
    """The model, the tokenizer, and the bank of the adapters, or None for the base model alone."""
    from ..adapters.preview import load_previewed, previews
    from ..backbone.load import load_model_config
    from ..data.tokenizer import load_tokenizer

    shared.start_devices(options)
    # a wrong adapter is found before weights are read
    found = dict(zip(sources, previews(sources.values(), load_model_config(options.backbone)), strict=True))
    model = shared.load_model(options, source=options.backbone, **shared.model_options(options))
    load = lambda name: load_previewed(found[name], model.config, model=model)  # noqa: E731
    bank = shared.bank_within_memory(options, found, model.config, load)
    return model, load_tokenizer(options.backbone, options.chat_template_kwargs), bank


def sampling_of(options) -> dict:
    """The options of `sampling`, checked, as arguments of generate and Request."""
    from ..inference.sampling import Sampling

    stop = [shared.with_newlines(text) for text in options.stop]
    beams = options.num_beams, options.length_penalty
    drawn = options.temperature, options.top_k, options.top_p, options.seed
    return vars(Sampling(options.max_new_tokens, *drawn, stop, *beams))


def answer_prompts(options, model, tokenizer, bank, tenants) -> None:
    from ..inference.generate import generate

    prompts = [shared.prompt_of(options, prompt) for prompt in options.prompt]
    answers = generate(model, prompts, tokenizer=tokenizer, adapters=bank, tenants=tenants, **sampling_of(options))
    if len(answers) == 1:
        print(answers[0])
        return
    for i, (prompt, answer) in enumerate(zip(options.prompt, answers, strict=True)):
        tenant = f"[{tenants[i] or BASE}] " if tenants and not options.adapter else ""
        print(f"> {tenant}{shared.with_newlines(prompt)}\n{answer}\n")


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
        max_length=shared.engine_length(options, model.config),
        max_prefill_tokens=options.max_prefill_tokens,
        kv_cache_bytes=shared.bytes_of(options.kv_cache_gb),
        max_logprobs=20,  # for beams
    )
    return engine, Request("", tenants[0] if tenants else None, **sampling_of(options))
