"""`para-jax plot`: learning curves, the factors of prompts, or how much they differ."""

from __future__ import annotations

from ..config.bounds import PositiveInt
from ..io.checks import expanded
from ..io.figures import FORMATS
from . import options as shared


def add(commands) -> None:
    text = "draw learning curves of runs, the factors of prompts, or how much factors differ"
    example = "runs/mine runs/other --output runs/curves.png"
    parents = [shared.backbone(), shared.dtype(), shared.runtime()]
    parser = shared.add_command(commands, "plot", text, example, parents)
    parser.add_argument("runs", nargs="*", type=shared.place, metavar="RUN", help="run folders: their learning curves")
    text = "the picture: .png, .pdf or .svg"
    shared.option(parser, "--output", text, expanded, metavar="FILE", required=True)
    group = parser.add_argument_group("factors")
    text = "a folder or hub id; with --data, may be given several times"
    shared.repeated(group, "--adapter", text, "DIR", type=shared.filled)
    shared.repeated(group, "--prompt", "draw its factors; with two, also the difference", "TEXT")
    text = "a data file: draw how much the factors differ over its prompts"
    shared.option(group, "--data", text, expanded, metavar="FILE")
    shared.option(group, "--limit", "prompts of --data", PositiveInt, 100)
    parser.set_defaults(run=run)


def run(options) -> None:
    from .checks import check_adapters, chosen_backbone

    if options.output.suffix not in FORMATS:
        raise ValueError(f"--output {options.output} is no picture\ngive a file that ends in {' or '.join(FORMATS)}")
    adapters, prompts = len(options.adapter), len(options.prompt)
    curves = options.runs and not (adapters or prompts or options.data)
    maps = adapters == 1 and prompts in (1, 2) and not (options.runs or options.data)
    spread = adapters and options.data and not (options.runs or prompts)
    if not (curves or maps or spread):
        raise ValueError(
            "plot draws one of three things\ngive RUN... (learning curves), one --adapter with one or two --prompt "
            "(factors), or --adapter once or more with --data FILE (how much factors differ)"
        )
    if not curves:
        check_adapters(options.adapter)
        require_factors(options.adapter)
        options.backbone = chosen_backbone(options.backbone, options.adapter)
    from ..reports.plots import curves_plot, save

    save(curves_plot(options.runs) if curves else factors_figure(options), options.output)
    print(f"wrote {options.output}")


def require_factors(sources: list[str]) -> None:
    """Raises ValueError for an adapter on this host that makes no factors."""
    from ..adapters.files import read_adapter_config
    from ..io.hub import local_adapter

    for source in sources:
        folder = local_adapter(source)
        method = folder and read_adapter_config(folder).method
        if method and method.carries != "factors":
            raise ValueError(
                f"--adapter {source} is a {method.label} adapter, which makes {method.carries}, no factors\n"
                "give an adapter of PARA or (IA)^3"
            )


def factors_figure(options):
    """The factors of --prompt, or the spread over --data, which is also printed."""
    from ..adapters.files import load_adapter
    from ..backbone.load import load_backbone
    from ..data.records import read_prompts
    from ..data.tokenizer import load_tokenizer
    from ..evaluation.factors import factor_spread, factors_of
    from ..reports.plots import factors_plot, run_names, spread_plot

    data = read_prompts(options.data)[: options.limit] if options.data else []
    shared.start_devices(options)
    model, tokenizer = load_backbone(options.backbone, dtype=options.dtype), load_tokenizer(options.backbone)
    adapters = {
        name: load_adapter(source, model.config, model=model)
        for name, source in zip(run_names(options.adapter), options.adapter, strict=True)
    }
    if not options.data:
        (adapter,) = adapters.values()
        prompts = named_prompts([shared.with_newlines(text) for text in options.prompt])
        factors = {name: factors_of(model, adapter, prompt, tokenizer) for name, prompt in prompts.items()}
        return factors_plot(factors, f"Factors of {options.adapter[0]} on {options.backbone}", input_notes(adapters))
    spreads = {name: factor_spread(model, adapter, data, tokenizer) for name, adapter in adapters.items()}
    for name, spread in spreads.items():
        print(f"{name}: spread over {spread.prompts} prompts / size of the mean of l - 1\n{spread}\n")
    title = f"How much factors differ over {len(data)} prompts of {options.data}, on {options.backbone}"
    return spread_plot(spreads, title, input_notes(adapters))


def named_prompts(prompts: list[str]) -> dict[str, str]:
    """Each prompt by its text, which is shortened; with a number if two would have one name."""
    names = [repr(text) if len(text) <= 36 else repr(f"{text[:22]} ... {text[-9:]}") for text in prompts]
    if len(set(names)) < len(names):
        names = [f"{i}. {name}" for i, name in enumerate(names, 1)]
    return dict(zip(names, prompts, strict=True))


def input_notes(adapters: dict) -> dict[str, str]:
    """What to write under a site that holds another one's factors: (IA)^3's on down_proj's input (adapters/ia3.py)."""
    scaled = [name for name, one in adapters.items() if "down_proj" in getattr(one.config, "feedforward_modules", ())]
    whose = "" if len(scaled) == len(adapters) else f" in {', '.join(scaled)}"
    return {"up_proj": f"(factors of down_proj's input{whose})"} if scaled else {}
