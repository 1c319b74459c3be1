"""Does prompt awareness help? Compares base, (IA)^3, PARA, PARA with a constant pooler, and LoRA of PARA's size.

    python scripts/compare_methods.py --tasks sst2 banking77 rte --output results/compare_methods

Each method gets four neighbouring learning rates of one grid, 1e-4 to 1e-1 (`rates_of`). The rate is chosen on
validation data after half the steps, with seed 0 (by accuracy, ties by the loss). While the best is the highest or
lowest rate tried, the grid's next rate is tried too. Seeds 0, 1 and 2 are then trained with it for all steps. All
rates, and then all seeds, are tenants of one run (`sweep`). Scores are medians over the seeds on whole test files, with
their range. PARA is also scored with every row reading another row's prompt. `--also` names further forms of PARA and
LoRA, which are not timed. The time of a step and the peak memory are those of a run of one adapter in a process of its
own. Stages: `train`, `test`, `alone`. Finished work is kept in the output folder, and the same command continues.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

from para_jax import (
    ParaConfig,
    evaluate,
    init_adapter,
    load_adapter,
    load_backbone,
    load_config,
    load_model_config,
    load_tokenizer,
    log_to_stderr,
    train_tenants,
)
from para_jax.adapters.adapter import count_parameters
from para_jax.config import Ia3Config, LoraConfig, save_config
from para_jax.data.tasks import TASKS
from para_jax.devices import describe_devices, library_versions
from para_jax.evaluation.tasks import task_of_run
from para_jax.training.metrics_file import read_metrics

GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SEEDS = (0, 1, 2)
PARA = ParaConfig(r=12)
LENGTHS = {
    "sst2": 80,
    "rte": 128,
    "banking77": 96,
    "boolq": 320,
    "copa": 64,
    "wikisql": 240,
    "sms_spam": 160,
    "clinc150": 64,
    "ag_news": 128,
}
TIMED_STEPS = 20
#: Runs `para-jax`, then prints its own peak memory in kB. A child's rusage would include its parent's.
COMMAND = """
import sys
from para_jax.cli import main
code = main(sys.argv[1:])
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
sys.exit(code)
"""


def methods(model_config) -> dict:
    """Adapter config by name. LoRA on PARA's sites has the rank closest to PARA's number of parameters."""
    size = lambda config: count_parameters(init_adapter(config, model_config))  # noqa: E731
    wanted = size(PARA)
    rank = min(range(1, 33), key=lambda r: abs(size(LoraConfig(r=r, target_modules=PARA.target_modules)) - wanted))
    return {
        "(IA)^3": Ia3Config(),
        "PARA r=12": PARA,
        "PARA r=12, constant pooler": replace(PARA, pooler="constant"),
        f"LoRA r={rank} on q, v, up": LoraConfig(r=rank, lora_alpha=rank, target_modules=PARA.target_modules),
    }


def forms(named: list[str]) -> dict:
    """Name to a changed PARA, or with method=lora a LoRA on its sites, or with method=ia3 an (IA)^3, and overrides of
    its runs' configs, from NAME:FIELD=VALUE,FIELD=VALUE with fields of that config (a+b+c is a tuple) or of a run
    (train.up_lr_ratio)."""
    bases = {"para": PARA, "lora": LoraConfig(target_modules=PARA.target_modules), "ia3": Ia3Config()}
    found = {}
    for text in named:
        name, _, fields = text.partition(":")
        changed = dict(pair.split("=") for pair in fields.split(","))
        base = bases[changed.pop("method", "para")]
        adapter = replace(base, **{key: parsed(v) for key, v in changed.items() if "." not in key})
        found[name] = adapter, tuple(f"{key}={v}" for key, v in changed.items() if "." in key)
    return found


def plain(main: dict) -> dict:
    """The main methods as `forms` gives further ones."""
    return {name: (adapter, ()) for name, adapter in main.items()}


def parsed(text: str):
    if "+" in text or text.endswith("_proj"):
        return tuple(map(parsed_one, text.split("+")))
    return parsed_one(text)


def parsed_one(text: str):
    return int(text) if text.isdecimal() else {"true": True, "false": False}.get(text, text)


def rates_of(adapter) -> tuple[float, ...]:
    """Four neighbours of GRID, around where a method's best rates lay in first trials."""
    if isinstance(adapter, ParaConfig):
        lowest = adapter.summary == "raw" and adapter.pooler != "constant"  # the summary's scale grows over the layers
        return GRID[:4] if lowest else GRID[1:5]
    return GRID[:4] if isinstance(adapter, LoraConfig) else GRID[2:6]


def config_of(args, task: str, adapter, output: Path, *overrides: str):
    made = load_config(None, [
        f"backbone.source={args.backbone}", "backbone.dtype=float32", f"data.train={args.data / task}",
        f"adapter.scope={adapter.scope}", f"data.max_seq_length={LENGTHS.get(task, 512)}",
        *([f"data.task={task}"] if task in TASKS else []),  # others: the metric comes from the data
        "data.truncate=skip",
        f"train.max_steps={args.steps}", f"train.rows_per_tenant={args.rows}",
        f"eval.every={args.steps}", f"eval.limit={args.limit}", "eval.batch_size=32", "mesh.data=1",
        "logging.report_to=[]", "runtime.allow_cpu=true", f"output_dir={output}",
        *overrides,
    ])  # fmt: skip
    return replace(made, adapter=adapter)


def trained(args, task: str, adapter, folder: Path, rates: tuple[float, ...], overrides: tuple[str, ...]) -> dict:
    """The best of these learning rates, and the validation score and loss of every rate, then of every seed."""
    steps = args.steps // 2
    half = f"train.max_steps={steps}", f"eval.every={steps}", *overrides

    def try_rates(name: str, rates: tuple[float, ...]) -> dict:
        listed = ", ".join(map(str, rates))
        sweep = f"sweep.learning_rate=[{listed}]", "sweep.seed=[0]"
        ran = run(args, task, adapter, folder / name, len(rates), *half, *sweep)
        return {rate: last_validation(task, ran / f"learning_rate-{rate!r}-seed-0") for rate in rates}

    tried = try_rates("rates", rates)
    while True:
        best = max(tried, key=lambda rate: (tried[rate]["score"], -tried[rate]["loss"]))
        further = beyond(best, tried)
        if further is None:
            break
        tried |= try_rates(f"rate-{further!r}", (further,))
    folders = run_seeds(args, task, adapter, folder, best, *overrides)
    return {
        "learning_rate": best,
        "rates": tried,
        "validation": {seed: last_validation(task, folder) for seed, folder in folders.items()},
    }


def run_seeds(args, task: str, adapter, folder: Path, rate: float, *overrides: str) -> dict[int, Path]:
    """The runs of all seeds at this rate for all steps."""
    seeds = ", ".join(map(str, SEEDS))
    sweep = f"sweep.learning_rate=[{rate}]", f"sweep.seed=[{seeds}]"
    run(args, task, adapter, folder / f"seeds-{rate!r}", len(SEEDS), *sweep, *overrides)
    return seed_folders(folder, rate)


def seed_folders(folder: Path, rate: float) -> dict[int, Path]:
    return {seed: folder / f"seeds-{rate!r}" / f"learning_rate-{rate!r}-seed-{seed}" for seed in SEEDS}


def run(args, task: str, adapter, folder: Path, tenants: int, *overrides: str) -> Path:
    batch = f"train.per_device_batch_size={tenants * args.rows}"
    return train_tenants(config_of(args, task, adapter, folder, batch, *overrides)).output_dir


def beyond(best: float, tried) -> float | None:
    """The next rate of GRID where the best of those tried is the highest or the lowest of them; None where it is not,
    or where GRID ends."""
    at = GRID.index(best)
    if best == max(tried) and at + 1 < len(GRID):
        return GRID[at + 1]
    return GRID[at - 1] if best == min(tried) and at > 0 else None


def last_validation(task: str, folder: Path) -> dict:
    """A run's last score and loss on validation data; -1 and 1e9 if it diverged before its first."""
    file = folder / "metrics.jsonl"
    rows = [row for row in read_metrics(file) if "validation_loss" in row] if file.exists() else []
    if not rows:
        return {"score": -1.0, "loss": 1e9}
    return {"score": rows[-1][score_name(task, rows[-1])], "loss": rows[-1]["validation_loss"]}


def score_name(task: str, row: dict) -> str:
    """The score's name in a row of metrics. Data without a task of ours gets the metric that suits it."""
    if task in TASKS:
        return f"validation_{TASKS[task].metric}"
    return next(name for name in ("validation_exact_match", "validation_accuracy") if name in row)


def alone(args, task: str, adapter, folder: Path, rate: float) -> dict:
    """Seconds per step (median, without the first) and peak memory of a run of one adapter in its own process."""
    fields = {"train.learning_rate": rate, "train.max_steps": TIMED_STEPS, "train.per_device_batch_size": args.rows}
    fields |= {"eval.limit": 1, "data.buckets": 1}
    overrides = [f"{name}={value}" for name, value in fields.items()]
    shutil.rmtree(folder / "alone", ignore_errors=True)
    save_config(config_of(args, task, adapter, folder / "alone", *overrides), folder / "alone.yaml")
    command = [sys.executable, "-c", COMMAND, "train", str(folder / "alone.yaml")]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    rows = [json.loads(line) for line in (folder / "alone" / "metrics.jsonl").read_text().splitlines()]
    seconds = [row["step_seconds"] for row in rows if "step_seconds" in row]
    return {"step_seconds": median(seconds), "peak_bytes": int(said.split()[-1]) * 1024}


def tested(args, task: str, model, tokenizer, adapter, shuffle=None) -> dict:
    whole = ("data.max_seq_length=2048", "data.truncate=error")  # no row of the test file is left out
    asked = task_of_run(config_of(args, task, PARA, args.output / "none", *whole), "test", tokenizer)
    assert asked, task
    how = {"limit": args.test_limit, "shuffle_prompts": shuffle is not None, "seed": shuffle or 0}
    (score,) = evaluate(model, adapter, [asked], tokenizer=tokenizer, **how).scores
    return score.record()


STAGES = ("train", "test", "alone")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--tasks", nargs="+", default=["sst2", "banking77", "rte"])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=8, help="examples per step")
    parser.add_argument("--limit", type=int, default=200, help="validation examples")
    parser.add_argument("--test-limit", type=int, help="test examples; default: the whole file")
    parser.add_argument("--methods", nargs="*", metavar="NAME", help="of the main methods; default: all of them")
    parser.add_argument("--also", nargs="*", default=[], metavar="NAME:FIELD=VALUE,...", help="further forms")
    parser.add_argument("--output", type=Path, default=Path("results/compare_methods"))
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    args = parser.parse_args()
    log_to_stderr()
    args.output.mkdir(parents=True, exist_ok=True)
    model_config = load_model_config(args.backbone)
    main, also = methods(model_config), forms(args.also)
    if args.methods is not None:
        main = {name: main[name] for name in args.methods}
    for stage in args.stages:
        for task in args.tasks:
            {"train": train, "test": test, "alone": time_alone}[stage](args, task, main, also, model_config)
            write_tables(args)


def train(args, task: str, main: dict, also: dict, model_config) -> None:
    for name, (adapter, overrides) in (plain(main) | also).items():
        folder = args.output / "runs" / task / label(name)
        folder.mkdir(parents=True, exist_ok=True)
        rates = rates_of(adapter)

        def made(name=name, adapter=adapter, folder=folder, rates=rates, overrides=overrides) -> dict:
            parameters = count_parameters(init_adapter(adapter, model_config))
            return {"name": name, "parameters": parameters} | trained(args, task, adapter, folder, rates, overrides)

        form = repr(adapter)
        newer_fields = ", layers_to_transform=None", "scope='all', scope_window=1, ", ", alora_invocation_tokens=None"
        newer_fields += (", up_bias=False",)
        for newer in newer_fields:  # than some of the files
            form = form.replace(newer, "")
        about = settings(args) | {"adapter": form, "rates": list(rates)}
        about |= {"overrides": list(overrides)} if overrides else {}
        done(args.output / f"{task}-{label(name)}-trained.json", made, about)
        write_tables(args)


def test(args, task: str, main: dict, also: dict, model_config) -> None:
    """Scores the first seed of every method before the second ones, so that a partial run can be compared."""
    tokenizer, held = load_tokenizer(args.backbone), {}  # the backbone, loaded only if something is left to score

    def score(folder: str | None, shuffle=None) -> dict:
        held["model"] = held.get("model") or load_backbone(args.backbone, dtype="float32")
        adapter = folder and load_adapter(f"{folder}/adapter", model_config)
        return tested(args, task, held["model"], tokenizer, adapter, shuffle)

    about = settings(args) | {"test_limit": args.test_limit}
    done(args.output / f"{task}-base-tested.json", lambda: {"test": score(None)}, about)
    for seed in SEEDS:
        for name, (adapter, overrides) in (plain(main) | also).items():

            def made(name=name, adapter=adapter, overrides=overrides, seed=seed) -> dict:
                folder = folder_of(args, task, adapter, name, seed, *overrides)
                found = {"test": score(folder)}
                return found | ({"shuffled": score(folder, seed)} if name == "PARA r=12" else {})

            done(args.output / f"{task}-{label(name)}-seed-{seed}-tested.json", made, about)
        write_tables(args)


def folder_of(args, task: str, adapter, name: str, seed: int, *overrides: str) -> str:
    """The folder of a seed's run. If it is gone (git keeps only the scores), all seeds are trained again."""
    found = read(args.output / f"{task}-{label(name)}-trained.json")
    rate, runs = found["learning_rate"], args.output / "runs" / task / label(name)
    folders = seed_folders(runs, rate)
    if not (folders[seed] / "adapter").exists():
        for at, folder in run_seeds(args, task, adapter, runs, rate, *overrides).items():
            before, now = found["validation"][str(at)], last_validation(task, folder)
            print(f"{task}, {name}, seed {at}, trained again: {now}; before: {before}", flush=True)
    return str(folders[seed])


def time_alone(args, task: str, main: dict, also: dict, model_config) -> None:
    for name, adapter in main.items():
        file = f"{task}-{label(name)}"
        rate = json.loads((args.output / f"{file}-trained.json").read_text())["learning_rate"]
        folder = args.output / "runs" / task / label(name)
        made = lambda adapter=adapter, folder=folder, rate=rate: alone(args, task, adapter, folder, rate)  # noqa: E731
        done(args.output / f"{file}-alone.json", made, settings(args))


def label(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


def settings(args) -> dict:
    """What scores depend on besides task and method."""
    names = ("backbone", "data", "steps", "rows", "limit")
    return {name: str(getattr(args, name)) for name in names}


def done(file: Path, make, asked: dict) -> dict:
    """What the file holds; made and written first where there is none. Ends the script where it holds other settings'
    scores."""
    if file.exists() and json.loads(file.read_text())["asked"] != asked:
        sys.exit(f"compare_methods: {file} was made with other settings; choose another --output")
    if not file.exists():
        part, begun = file.with_suffix(".part"), time.monotonic()
        found = make()
        about = {"asked": asked, "seconds": time.monotonic() - begun, "device": describe_devices()}
        part.write_text(json.dumps(found | about | {"versions": library_versions()}, indent=1) + "\n")
        os.replace(part, file)
    return json.loads(file.read_text())


# ---------------------------------------------------------------------------------------------------------- the tables


def write_tables(args) -> None:
    """validation.md, table.md and scores.png of all that the output folder holds so far."""
    trained = {file.name.removesuffix("-trained.json"): read(file) for file in args.output.glob("*-trained.json")}
    trained = dict(sorted(trained.items(), key=lambda item: (item[0].split("-")[0], item[1]["parameters"])))
    lines = ["| task | method | parameters | score (loss) after half the steps, by learning rate | seeds at the best |"]
    lines.append("|---|---|---|---|---|")
    for key, found in trained.items():
        tried = ", ".join(
            f"{float(r):g}: " + (f"{one['score']:.3f} ({one['loss']:.3f})" if one["score"] >= 0 else "not finite")
            for r, one in found["rates"].items()
        )
        seeds = found["validation"].values()
        chosen = f"{found['learning_rate']:g}: {spread([one['score'] for one in seeds], 3)}, "
        chosen += f"loss {spread([one['loss'] for one in seeds], 3)}"
        lines.append(f"| {key.split('-')[0]} | {found['name']} | {found['parameters']:,} | {tried} | {chosen} |")
    (args.output / "validation.md").write_text("\n".join(lines) + "\n")

    lines = ["| task | method | parameters | learning rate | score | loss | training step, s | peak memory, GB |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    drawn: dict[str, dict[str, list[float]]] = {}
    for file in sorted(args.output.glob("*-base-tested.json")):
        task, base = file.name.split("-")[0], read(file)["test"]
        name = f"{task} ({base['metric']}, {base['count']} rows)"
        lines.append(f"| {name} | base | 0 | | {base['score']:.4f} | {base['loss']:.4f} | | |")
        drawn[task] = {"base": [base["score"]]}
        for key, found in trained.items():
            seeds = [read(one) for one in sorted(args.output.glob(f"{key}-seed-*-tested.json"))]
            if not key.startswith(f"{task}-") or not seeds:
                continue
            rate = found["learning_rate"]
            edge = " (highest tried)" if rate == max(map(float, found["rates"])) else ""
            edge = " (lowest tried)" if rate == min(map(float, found["rates"])) else edge
            timed = args.output / f"{key}-alone.json"
            beside = read(timed) if timed.exists() else None
            cost = f"{beside['step_seconds']:.2f} | {beside['peak_bytes'] / 1e9:.2f}" if beside else "|"
            for part, after in (("test", ""), ("shuffled", ", prompts shuffled")):
                scores = [one[part] for one in seeds if part in one]
                if scores:
                    drawn[task][found["name"] + after] = [one["score"] for one in scores]
                    cells = [spread([one[of] for one in scores], 4) for of in ("score", "loss")]
                    shown = f"{task} | {found['name']}{after} | {found['parameters']:,} | {rate:g}{edge}"
                    lines.append(f"| {shown} | {' | '.join(cells)} | {cost if part == 'test' else '|'} |")
    (args.output / "table.md").write_text("\n".join(lines) + "\n")
    if drawn:
        plot(drawn, args.output / "scores.png")


def read(file: Path) -> dict:
    return json.loads(file.read_text())


def spread(values: list[float], digits: int) -> str:
    """median (lowest to highest; number), or the only value"""
    low, high = min(values), max(values)
    within = f" ({low:.{digits}f} to {high:.{digits}f}; {len(values)})" if len(values) > 1 else ""
    return f"{median(values):.{digits}f}{within}"


def plot(drawn: dict[str, dict[str, list[float]]], file: Path) -> None:
    """Each task's scores: a dot per seed, a line at the median."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 4 * len(drawn), 3.6), layout="constrained")
    for axes, (task, scores) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn.items(), strict=True):
        names = list(scores)[::-1]
        for y, name in enumerate(names):
            axes.plot(scores[name], [y] * len(scores[name]), "o", color="tab:green" if "PARA" in name else "tab:gray")
            axes.plot([median(scores[name])] * 2, [y - 0.3, y + 0.3], color="black")
        axes.set_yticks(range(len(names)), names)
        axes.set_title(task)
        axes.set_xlabel("score on test data")
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
