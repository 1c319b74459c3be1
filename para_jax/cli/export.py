"""`para-jax export`: an adapter as a folder that Hugging Face PEFT loads."""

from __future__ import annotations

from ..io.checks import expanded
from . import options as shared

HELP = """PARA makes other factors for each prompt, so its export is an (IA)^3 adapter for the one prompt of --prompt.
LoRA and (IA)^3 folders are in PEFT's format already: they are copied, and name the hub id of their base model. Of the
scopes other than `all`, PEFT has one: LoRA with adapter.alora_invocation_tokens."""


def add(commands) -> None:
    text = "write an adapter for Hugging Face PEFT"
    example = "runs/mine/adapter --prompt 'Text: I sent it back.\\nTeam:' --output runs/mine/peft"
    parents = [shared.dtype(), shared.runtime()]
    parser = shared.add_command(commands, "export", text, example, parents)
    parser.description = f"{parser.description}\n\n{HELP}"
    parser.add_argument("adapter", type=shared.place, metavar="DIR", help="the adapter: a folder or a hub id")
    text = "for PARA: the prompt that the export is for; \\n is a newline"
    shared.option(parser, "--prompt", text, metavar="TEXT")
    shared.add_chat(parser)
    shared.add_chat_template_kwargs(parser)
    shared.option(parser, "--output", "the folder to write", expanded, metavar="FOLDER", required=True)
    text = "for PARA: a folder, a hub id or a .gguf file (default: the adapter's own)"
    shared.option(parser, "--backbone", text, metavar="SOURCE")
    text = "the name that PEFT looks for (default: the adapter's own)"
    parser.add_argument("--base-model", default="", metavar="HUB_ID", help=text)
    parser.set_defaults(run=run)


def run(options) -> None:
    from ..adapters.files import copy_for_peft, read_adapter_config
    from ..adapters.method import acts_everywhere, require_peft_fits
    from ..io.hub import resolve_adapter

    folder = resolve_adapter(options.adapter)
    found = read_adapter_config(folder)
    if not acts_everywhere(found.config):
        require_peft_fits(str(options.adapter), found.method, found.config)
    if found.method.in_peft:
        copy_for_peft(folder, options.output, base_model=options.base_model)
    elif options.prompt is None:
        raise ValueError(
            f"{options.adapter}: a {found.method.label} adapter reads the prompt, and PEFT's adapters do not\n"
            "give --prompt TEXT, the prompt that the export is for"
        )
    elif options.output.resolve() in (options.adapter.resolve(), folder.resolve()):
        raise ValueError(f"--output {options.output} is the adapter itself, which would be lost\ngive another folder")
    else:
        export_factors(options, folder, found.base_model)
    print(f"wrote {options.output}")


def export_factors(options, folder, base_model: str) -> None:
    """Exports an adapter that makes factors, as it computes them on its backbone."""
    from ..adapters.files import load_adapter
    from ..backbone.load import load_backbone
    from ..data.tokenizer import load_tokenizer
    from ..inference.export import export_ia3
    from ..io.hub import backbone_of

    source = options.backbone or backbone_of(folder)
    if not source:
        raise ValueError(f"{options.adapter} names no base model\ngive --backbone SOURCE")
    shared.start_devices(options)
    model = load_backbone(source, dtype=options.dtype)
    tokenizer = load_tokenizer(source, options.chat_template_kwargs)
    adapter = load_adapter(folder, model.config, model=model)
    named, prompt = options.base_model or base_model or source, shared.prompt_of(options, options.prompt)
    export_ia3(adapter, model, prompt, options.output, tokenizer=tokenizer, base_model=named)
