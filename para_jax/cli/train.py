"""`para-jax train`: one adapter, or many in one run."""

from __future__ import annotations

import time

from . import options as shared
from .results import write_results


def add(commands) -> None:
    text = "train the adapter of a config; the same command resumes"
    parser = commands.add_parser("train", help=text, description=text, parents=[shared.run_config()])
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check the config and print its sizes, without weights and a run folder",
    )
    parser.add_argument(
        "--topology", help="with --dry-run: compile the step for a TPU slice such as v5e:4x4, without the slice"
    )
    parser.add_argument("--results", type=shared.place, help="write config, device and scores to this JSON file")
    parser.set_defaults(run=run)


def run(options) -> int | None:
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
        return run_many(options, config)
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


def run_many(options, config) -> int | None:
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
