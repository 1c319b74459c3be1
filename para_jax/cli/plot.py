"""`para-jax plot`: learning curves of runs, or the factors of prompts."""

from __future__ import annotations

from ..io.checks import expanded
from . import options as shared


def add(commands) -> None:
    text = "draw learning curves of runs, or the factors of prompts"
    example = "runs/mine runs/other --output runs/curves.png"
    parents = [shared.backbone(), shared.dtype(), shared.runtime()]
    parser = shared.add_command(commands, "plot", text, example, parents)
    parser.add_argument("runs", nargs="*", type=shared.place, metavar="RUN", help="run folders: their learning curves")
    text = "the picture: .png, .pdf or .svg"
    shared.option(parser, "--output", text, expanded, metavar="FILE", required=True)
    group = parser.add_argument_group("factors")
    shared.option(group, "--adapter", "the folder or hub id of an adapter of PARA or (IA)^3", metavar="DIR")
    shared.repeated(group, "--prompt", "draw its factors; with two, also the difference", "TEXT")
    parser.set_defaults(run=run)


def run(options) -> None:
    if bool(options.runs) == bool(options.adapter) or bool(options.adapter) != bool(options.prompt):
        raise ValueError("plot draws one of two things\ngive RUN... (learning curves), or --adapter and --prompt")
    from ..reports.plots import curves_plot, save

    save(curves_plot(options.runs) if options.runs else factors_figure(options), options.output)
    print(f"wrote {options.output}")


def factors_figure(options):
    """The factors of --prompt."""
    from ..adapters.files import load_adapter
    from ..backbone.load import load_backbone
    from ..data.tokenizer import load_tokenizer
    from ..evaluation.factors import factors_of
    from ..reports.plots import factors_plot

    options.backbone = shared.chosen_backbone(options.backbone, [options.adapter])
    shared.start_devices(options)
    model, tokenizer = load_backbone(options.backbone, dtype=options.dtype), load_tokenizer(options.backbone)
    adapter = load_adapter(options.adapter, model.config, model=model)
    prompts = [shared.with_newlines(text) for text in options.prompt]
    factors = {repr(prompt): factors_of(model, adapter, prompt, tokenizer) for prompt in prompts}
    return factors_plot(factors, f"Factors of {options.adapter} on {options.backbone}")
