"""Which learning rate does each method need? Trains every rate with every seed as tenants of one run, on several tasks.

    python scripts/experiments/sweep_rates.py --data data --output results/rates

rates.md has the validation loss (nats per token) of each task and rate: the mean over the seeds, and the standard error
over the validation examples. Finished work is kept in the output folder, and the same command continues.
"""

import argparse
import math
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean

from compare_cells import read, write

from para_jax import (
    EvalOptions,
    Ia3Config,
    LoraConfig,
    ParaConfig,
    evaluate,
    load_backbone,
    load_config,
    load_tokenizer,
    log_to_stderr,
    train_tenants,
)
from para_jax.evaluation.tasks import task_of_run
from para_jax.runtime.devices import describe_devices, library_versions
from para_jax.training.metrics_file import read_metrics

#: Tokens of the longest example that is kept.
LENGTHS = {"boolq_closed": 40, "clinc150": 40, "banking77": 48, "sst2": 48, "wikisql": 64}
#: Each method's rates around its default.
METHODS = {
    "para": (ParaConfig(), (3e-4, 1e-3, 3e-3)),
    "lora": (LoraConfig(), (1e-3, 3e-3, 1e-2)),
    "ia3": (Ia3Config(), (1e-2, 3e-2, 1e-1)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--tasks", nargs="+", default=list(LENGTHS), choices=LENGTHS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--rates", nargs="+", type=float, help="default: three of each method")
    parser.add_argument("--warmup", type=float, default=0.1)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=4, help="examples per step")
    parser.add_argument("--limit", type=int, default=100, help="validation examples")
    parser.add_argument("--output", type=Path, default=Path("results/rates"))
    args = parser.parse_args()
    log_to_stderr()
    args.output.mkdir(parents=True, exist_ok=True)
    for task in args.tasks:
        asked = {"limit": args.limit, "data": str(args.data)}
        done(args.output / f"{task}-base.json", partial(base_loss, args, task), asked)
    for method in args.methods:
        adapter, rates = METHODS[method]
        rates = tuple(args.rates or rates)
        for task in args.tasks:
            label = f"{task}-{method}" + "".join(f"-{rate:g}" for rate in rates) + f"-warmup-{args.warmup:g}"
            make = partial(swept, args, task, method, adapter, rates, args.output / "runs" / label)
            asked = {"steps": args.steps, "rows": args.rows, "limit": args.limit, "seeds": sorted(args.seeds)}
            done(args.output / f"{label}.json", make, asked | {"data": str(args.data)})
            write_table(args.output)


def done(file: Path, make, asked: dict) -> None:
    """Writes what `make` gives and what was asked for, unless the file is there. Ends the script where it holds what
    other settings gave, as far as the file says."""
    if not file.exists():
        write(file, make() | asked)
        return
    held = read(file)
    held = {"seeds": sorted({run["seed"] for run in held.get("runs", ())})} | held
    for name, value in asked.items():
        if held.get(name, value) != value:
            sys.exit(f"sweep_rates: {file} was made with {name} {held[name]}, not {value}; choose another --output")


def config_of(args, task: str, *overrides: str):
    return load_config(None, [
        "backbone.dtype=float32", f"data.train={args.data / task}", f"data.max_seq_length={LENGTHS[task]}",
        "data.truncate=skip", "eval.metric=loss", f"eval.limit={args.limit}", "eval.batch_size=32", "mesh.data=1",
        "logging.report_to=[]", "runtime.allow_cpu=true", *overrides,
    ])  # fmt: skip


def base_loss(args, task: str) -> dict:
    """The base model's loss on the same validation examples."""
    tokenizer = load_tokenizer("smollm2-135m")
    model = load_backbone("smollm2-135m", dtype="float32")
    asked = task_of_run(config_of(args, task), "validation", tokenizer)
    assert asked, task
    found = evaluate(model, None, asked, tokenizer=tokenizer, options=EvalOptions(limit=args.limit, rows=32))
    scores = found.records["base"]["results"]["validation"]
    return {
        "task": task,
        "loss": scores["loss,none"],
        "stderr": scores["loss_stderr,none"],
        "count": scores["sample_len"],
    }


def swept(args, task: str, method: str, adapter, rates: tuple[float, ...], folder: Path) -> dict:
    begun = time.monotonic()
    tenants = len(rates) * len(args.seeds)
    config = config_of(
        args, task, f"train.max_steps={args.steps}", f"train.rows_per_tenant={args.rows}",
        f"train.warmup_ratio={args.warmup}", f"train.per_device_batch_size={args.rows * tenants}",
        f"sweep.learning_rate={list(rates)}", f"sweep.seed={args.seeds}", f"eval.every={args.steps}",
        f"output_dir={folder}",
    )  # fmt: skip
    train_tenants(replace(config, adapter=adapter))
    runs = [
        {"rate": rate, "seed": seed} | last_row(folder / f"learning_rate-{rate!r}-seed-{seed}")
        for rate in rates
        for seed in args.seeds
    ]
    about = {"warmup": args.warmup, "seconds": time.monotonic() - begun}
    about |= {"device": describe_devices(), "versions": library_versions()}
    return {"task": task, "method": method, "runs": runs} | about


def last_row(folder: Path) -> dict:
    """The last validation and the training losses of a run; no validation if it diverged before."""
    file = folder / "metrics.jsonl"
    rows = list(read_metrics(file)) if file.exists() else []
    found = next((row for row in reversed(rows) if "validation_loss" in row and row["step"] > 0), {})
    return {"validation": found, "train_loss": [round(row["loss"], 4) for row in rows if "loss" in row]}


def write_table(folder: Path) -> None:
    """rates.md: for each task and method the base model's loss, and each rate's. The best rate is bold."""
    bases = {one["task"]: one for one in map(read, folder.glob("*-base.json"))}
    lines = [
        "| task | base | method | loss by rate, mean of the seeds ± standard error over the examples |",
        "|" + "---|" * 4,
    ]
    for found in sorted(
        (read(file) for file in folder.glob("*-warmup-*.json")), key=lambda one: (one["task"], one["method"])
    ):
        by_rate: dict[float, list[dict]] = {}
        for run in found["runs"]:
            by_rate.setdefault(run["rate"], []).append(run["validation"])
        means = {rate: mean(one.get("validation_loss", math.inf) for one in runs) for rate, runs in by_rate.items()}
        best = min(means, key=means.__getitem__)
        cells = [cell(rate, means[rate], runs, rate == best) for rate, runs in by_rate.items()]
        base = bases.get(found["task"])
        shown = f"{base['loss']:.3f} ± {base['stderr']:.3f}" if base else ""
        lines.append(f"| {found['task']} | {shown} | {found['method']} | {', '.join(cells)} |")
    (folder / "rates.md").write_text("\n".join(lines) + "\n")


def cell(rate: float, loss: float, runs: list[dict], best: bool) -> str:
    if loss == math.inf:
        return f"{rate:g}: not finite ({sum('validation_loss' not in one for one in runs)} of {len(runs)} seeds)"
    errors = [one["validation_loss_stderr"] for one in runs if "validation_loss_stderr" in one]
    text = f"{loss:.3f}" + (f" ± {mean(errors):.3f}" if errors else "")
    return f"{rate:g}: " + (f"**{text}**" if best else text)


if __name__ == "__main__":
    main()
