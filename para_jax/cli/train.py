"""`para-jax train`: one adapter, or many in one run."""

from __future__ import annotations

import time

from ..config import load_config
from . import options as shared


def add(commands) -> None:
    text = "train the adapter of a config; the same command resumes"
    example = "own-data data.train=data/mine output_dir=runs/mine"
    parser = shared.add_command(commands, "train", text, example)
    parser.add_argument("config", type=shared.place, metavar="CONFIG", help="a .yaml file, or a shipped config's name")
    shared.add_overrides(parser)
    text = "check the config and print its sizes; nothing is written"
    parser.add_argument("--dry-run", action="store_true", help=text)
    text = "a dry run that compiles the step for a TPU slice, such as v5e:4x4"
    shared.option(parser, "--topology", text, metavar="SLICE")
    shared.add_results(parser)
    parser.set_defaults(run=run)


def run(options) -> int | None:
    config = load_config(options.config, options.overrides)
    if options.dry_run or options.topology:
        from ..reports.inspect import dry_run

        print(dry_run(config, options.topology))
        return
    if options.results and config.runtime.coordinator is None:  # of several hosts, only one writes the file
        from ..io.record_file import check_record_file

        check_record_file("--results", options.results)
    if config.sweep.method:
        return train_methods(options, config)
    return train_many(options, config) if config.many else train_one(options, config)


def train_one(options, config) -> None:
    from ..runs.train import train
    from ..runtime.processes import is_first

    begun = time.monotonic()
    result = train(config)
    if not is_first():
        return
    if options.results:
        shared.write_results(options, config, scores_of(result), time.monotonic() - begun)
    report = result.report()
    print(f"{report}\n" if report else "", end="\n" if report else "")
    print(f"{result.step} steps, {result.best}; the adapter is in {result.output_dir / 'adapter'}")
    if result.warning:
        print(f"warning: {result.warning}")


def scores_of(result) -> dict[str, float]:
    """The scores of the kept adapter, and the base model's test scores, by their names in the run's log."""
    found = {}
    for name, logged in (("validation", "validation"), ("test_base", "test_before"), ("test", "test_after")):
        values = result.scores.get(name, {}).get("values", {})
        found |= {f"{logged}_{metric}": value for metric, value in values.items()}
    return found


def train_many(options, config) -> int:
    from ..runs.train import train_tenants
    from ..runtime.processes import is_first
    from ..training.scores_file import warning_lines

    begun = time.monotonic()
    result = train_tenants(config)
    code = int(any(entry["ended"] == "not finite" for entry in result.tenants.values()))
    if not is_first():
        return code
    if options.results:
        shared.write_results(options, config, result.tenants, time.monotonic() - begun)
    print(f"{result.report()}\n\nthe adapters are in {result.output_dir}/NAME/adapter")
    for line in warning_lines(result.tenants):
        print(line)
    if config.sweep:
        for line in best_combination(result.tenants):
            print(line)
    return code


def train_methods(options, config) -> int:
    from ..runs.compare import compare_methods
    from ..runtime.processes import is_first

    begun = time.monotonic()
    result = compare_methods(config)
    code = int(any(row.ended == "not finite" for row in result.methods))
    if not is_first():
        return code
    if options.results:
        scores = {"methods": [row._asdict() for row in result.all]}
        shared.write_results(options, config, scores, time.monotonic() - begun)
    print(f"{result.report()}\nthe table is in {result.output_dir / 'comparison.md'}")
    for row in result.methods:
        if row.warning:
            print(f"warning: {row.title}: {row.warning}")
    return code


def best_combination(entries) -> list[str]:
    """The lines that name the best combination of a sweep; of equal scores, the one with the lowest loss."""
    from ..evaluation.paired import within_noise
    from ..evaluation.score import describe_best
    from ..runs.report import choice_lines

    scored = {name: entry for name, entry in entries.items() if entry["best_score"] is not None}
    if not scored:
        return []
    records = {name: entry["scores"]["validation"] for name, entry in scored.items()}
    name = min(scored, key=lambda one: (-scored[one]["best_score"], records[one]["values"]["loss"], one))
    entry, rows = scored[name], {one: record["rows"] for one, record in records.items()}
    same = [one for one in scored if scored[one]["best_score"] == entry["best_score"]]
    said = describe_best(entry["metric"], entry["best_score"], entry["best_step"]).removeprefix("best ")
    return [f"best: {name}, with {said}", *choice_lines(name, same, within_noise(rows, name), records[name]["count"])]
