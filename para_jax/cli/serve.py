"""`para-jax serve`: the engine over HTTP, as OpenAI's API has it."""

from __future__ import annotations

import json
import secrets
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Annotated

from ..adapters.names import named_adapters
from ..config.bounds import Bounds, NonNegativeFloat, PositiveInt
from ..io.checks import expanded
from ..io.messages import say
from ..server.config import ServerConfig, require_packages
from . import options as shared


def add(commands) -> None:
    text = "serve tenants over HTTP, as OpenAI's API has it"
    example = "--backbone smollm2-135m --adapters acme=runs/a/adapter globex=runs/b/adapter --port 8000"
    parents = [served(), shared.backbone(), shared.precision(), shared.runtime()]
    shared.add_command(commands, "serve", text, example, parents).set_defaults(run=run)


def served() -> shared.Parser:
    """The options of this command alone; their groups come first in its help."""
    parser = shared.Parser(add_help=False)
    group = parser.add_argument_group("adapters")
    shared.add_tenants(group)
    text = "each is loaded when a request needs it. With --adapter-root all stay in memory"
    shared.add_adapter_memory(group, text)
    shared.add_fields(group, ServerConfig, "served_model_name", "adapter_root", "allow_hub")
    group = parser.add_argument_group("adapters that join later, with --adapter-root")
    shared.option(group, "--methods", "their methods (default: para,ia3 and those of --adapters)", metavar="M,M")
    text = "the sites that they may change (default: q_proj,v_proj,up_proj and those of --adapters)"
    shared.option(group, "--sites", text, metavar="S,S")
    shared.option(group, "--max-r", "their largest rank (default: 16, or that of --adapters)", PositiveInt)
    shared.option(group, "--capacity", "the maximum number of tenants (default: 1024)", PositiveInt)
    group = parser.add_argument_group("engine")
    shared.add_engine_size(group)
    shared.add_chat_template_kwargs(group)
    text = "memory for the prefixes that prompts share (default: half of what the slots take)"
    shared.option(group, "--prefix-cache-gb", text, NonNegativeFloat, metavar="GB")
    text = "alternatives per token that a request may ask for; 0: no log-probabilities"
    shared.option(group, "--max-logprobs", text, Annotated[int, Bounds(at_least=0)], 20)
    text = "tokens that may be drafted from a prompt and its answer so far, for one pass to verify; 0: none"
    shared.option(group, "--speculative-tokens", text, Annotated[int, Bounds(at_least=0)], 0)
    shared.option(group, "--queue-limit", "answers that may wait in the queue", PositiveInt, 1024)
    text = "answers of each tenant that may wait (default: no limit)"
    shared.option(group, "--queue-limit-per-tenant", text, PositiveInt)
    group = parser.add_argument_group("server")
    names = "host", "port", "api_key_file", "timeout", "drain_seconds", "max_body", "log_prompts"
    shared.add_fields(group, ServerConfig, *names)
    return parser


def run(options) -> None:
    from ..server.address import bound

    sources, config = checked(options)
    with bound(config.host, config.port) as taken:
        serve_at(options, sources, config, taken)


def checked(options) -> tuple[dict[str, str], ServerConfig]:
    """{name: folder or hub id} of the tenants, and the server's config with the base model's name. Raises ValueError
    for what can be seen before anything is loaded."""
    require_packages("serve")
    if options.adapter_root and not Path(options.adapter_root).expanduser().is_dir():
        raise ValueError(f"--adapter-root {options.adapter_root}: no such folder\ngive the folder of the adapters")
    sources = named_adapters(options.adapters, options.adapters_from)
    options.backbone = shared.chosen_backbone(options.backbone, sources.values())
    options.served_model_name = base = options.served_model_name or base_name(options.backbone)
    if base in sources:
        raise ValueError(f"--adapters: {base} is the base model's name\ngive the tenant or --served-model-name another")
    config = ServerConfig(**{one.name: getattr(options, one.name) for one in fields(ServerConfig)})
    if config.api_key_file:
        from ..server.api_keys import read_keys

        read_keys(config.api_key_file)
    return sources, config


def serve_at(options, sources: dict[str, str], config: ServerConfig, taken) -> None:
    """Loads everything, and serves at a socket."""
    from ..server.serve import serve

    engine = engine_of(options, sources)
    say("compiling; requests are taken as soon as that is done")
    example = next(iter(sources), str(config.served_model_name))
    keyed = config.api_key_file is not None
    ready = lambda url: print(greeting(url, example, keyed), flush=True)  # noqa: E731
    serve(engine, config, sources=sources, on_ready=ready, taken=taken)


def engine_of(options, sources: dict[str, str]):
    """The engine, with everything loaded. Requests without a seed are drawn differently in each process, so that
    replicas write different answers."""
    from ..adapters.preview import previews
    from ..backbone.load import load_model_config
    from ..data.tokenizer import load_tokenizer
    from ..serving.engine import Engine

    shared.start_devices(options)
    # a wrong adapter is found before weights are read
    found = dict(zip(sources, previews(sources.values(), load_model_config(options.backbone)), strict=True))
    model = shared.load_model(options, source=options.backbone, **shared.model_options(options))
    return Engine(
        model,
        bank_of(options, found, model),
        load_tokenizer(options.backbone, options.chat_template_kwargs),
        slots=options.slots,
        max_length=shared.engine_length(options, model.config),
        max_prefill_tokens=options.max_prefill_tokens,
        speculative_tokens=options.speculative_tokens,
        queue_limit=options.queue_limit,
        queue_limit_per_tenant=options.queue_limit_per_tenant,
        seed=secrets.randbits(32),
        max_logprobs=options.max_logprobs,
        kv_cache_bytes=shared.bytes_of(options.kv_cache_gb),
        prefix_cache_bytes=shared.bytes_of(options.prefix_cache_gb),
    )


def base_name(backbone: str) -> str:
    """The base model's name: a folder's or file's own name, and a hub id as it is."""
    path = expanded(backbone)
    return path.resolve().name if isinstance(path, Path) and path.exists() else backbone


def bank_of(options, found: dict, model):
    """The bank of the adapters, or None for the base model alone. With updates it holds all of them, and has room for
    others. Without, one that is dropped from memory is loaded again as it is then: it may have been trained further.

    Args:
        found: the previews of the adapters by name.
    """
    from ..adapters.bank import AdapterBank
    from ..adapters.files import load_adapter

    def load(name: str):
        return load_adapter(found[name].place, model.config, model=model)

    if not options.adapter_root:
        return shared.bank_within_memory(options, found, model.config, load)
    configs = [one.config for one in found.values()]
    fitting = [AdapterBank.fitting(configs, model.config, capacity=len(found))] if found else []
    there = [AdapterBank(model.config), *fitting]
    bank = AdapterBank(
        model.config,
        capacity=options.capacity or max(one.capacity for one in there),
        max_r=options.max_r or max(one.max_r for one in there),
        methods=names_in(options.methods) or tuple({name for one in there for name in one.methods}),
        sites=names_in(options.sites) or tuple({site for one in there for site in one.sites}),
    )
    bank.expected = tuple(dict.fromkeys(configs))  # clients may unload all adapters of a kind, and load one again
    for name in found:  # one by one, because a loaded adapter is on the device until the bank has it
        bank.add(name, load(name))
    say(str(bank))
    return bank


def names_in(text: str | None) -> tuple[str, ...]:
    return tuple(text.split(",")) if text else ()


def greeting(url: str, model: str, keyed: bool) -> str:
    """The URL, and a command that shows how to ask."""
    body = json.dumps({"model": model, "prompt": "Hello", "max_tokens": 16})
    key = '-H "authorization: Bearer $KEY" ' if keyed else ""
    example = f"curl {url}/v1/completions {key}-H 'content-type: application/json' -d {shlex.quote(body)}"
    return f"serving at {url}\n  {example}"
