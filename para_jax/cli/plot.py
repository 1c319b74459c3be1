"""`para-jax plot`: learning curves, the factors of prompts, or how much they differ."""

from __future__ import annotations

from . import options as shared


def add(commands) -> None:
    text = "draw runs' learning curves, the factors of prompts, or how much they differ"
    parser = commands.add_parser("plot", help=text, description=text, parents=[shared.backbone(), shared.runtime()])
    parser.add_argument("runs", nargs="*", type=shared.place, metavar="RUN", help="run folders: their learning curves")
    parser.add_argument(
        "--adapter", action="append", default=[], help="an adapter folder or hub id; with --data one or more"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--prompt", action="append", default=[], help="whose factors are drawn; of two also the difference"
    )
    parser.add_argument(
        "--data", type=shared.place, help="a .jsonl file with prompts: how much the factors differ over them"
    )
    parser.add_argument("--limit", type=int, default=100, help="the most prompts of --data")
    parser.add_argument("--output", type=shared.place, required=True, help="the picture: .png, .pdf or .svg")
    parser.set_defaults(run=run)


def run(options) -> None:
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
    from ..adapters.files import load_adapter
    from ..backbone.load import load_backbone
    from ..data.records import read_prompts
    from ..data.tokenizer import load_tokenizer
    from ..evaluation.factors import factor_spread, factors_of
    from ..plots import factors_plot, run_names, spread_plot

    given = read_prompts(options.data)[: options.limit] if options.data else []
    shared.start_devices(options)
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
