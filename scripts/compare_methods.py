"""Does prompt awareness help? Base, (IA)^3, PARA, PARA with a constant pooler, and LoRA of PARA's size.

    python scripts/compare_methods.py --tasks sst2 rte banking77 --output results/compare_methods

Each method gets the same learning rates (GRID), each combination the same steps and rows. The rate is chosen on
validation data with seed 0 (ties by its loss), and seeds 1 and 2 are then trained with it; seed 0 is reported too. All
combinations of a method are tenants of one run (`sweep`). Scores are of whole test files (--test-limit: of their first
rows), medians over the seeds with their range; PARA also with every row reading another row's prompt. The time of a
step and the peak memory are those of a run of one adapter in a process of its own; what a decode step costs stands in
docs/results.md. What is done is kept in the output folder: the same command goes on.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

from para_jax import (
    ParaConfig,
    init_adapter,
    load_adapter,
    load_backbone,
    load_config,
    load_model_config,
    load_tokenizer,
    train_tenants,
)
from para_jax.adapters.adapter import count_parameters
from para_jax.config import Ia3Config, LoraConfig, save_config
from para_jax.devices import describe_devices, versions
from para_jax.evaluation.evaluate import evaluate_task, task_of_run
from para_jax.training.log import read_metrics

GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
SEEDS = (0, 1, 2)
PARA = ParaConfig(r=12)
LENGTHS = {"sst2": 80, "rte": 320, "banking77": 96, "boolq": 320, "copa": 64, "wikisql": 240, "sms_spam": 160}
TIMED_STEPS = 20
#: Runs `para-jax` and then prints the peak of its own memory, in kB; a child's rusage would hold its parent's.
COMMAND = """
import sys
from para_jax.cli import main
code = main(sys.argv[1:])
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
sys.exit(code)
"""


def methods(model_config, extra: list[str]) -> dict:
    """Name to adapter config: LoRA on PARA's sites has the rank whose number of parameters is nearest to PARA's."""
    size = lambda config: count_parameters(init_adapter(config, model_config))  # noqa: E731
    wanted = size(PARA)
    rank = min(range(1, 33), key=lambda r: abs(size(LoraConfig(r=r, target_modules=PARA.target_modules)) - wanted))
    found = {
        "(IA)^3": Ia3Config(),
        "PARA r=12": PARA,
        "PARA r=12, constant pooler": replace(PARA, pooler="constant"),
        f"LoRA r={rank} on q, v, up": LoraConfig(r=rank, lora_alpha=rank, target_modules=PARA.target_modules),
    }
    for text in extra:  # name:field=value,field=value of ParaConfig
        name, _, fields = text.partition(":")
        changed = dict(pair.split("=") for pair in fields.split(","))
        found[name] = replace(PARA, **{key: int(v) if v.isdecimal() else v for key, v in changed.items()})
    return found


def config_of(args, task: str, adapter, output: Path, *overrides: str):
    made = load_config(None, [
        f"backbone.source={args.backbone}", "backbone.dtype=float32", f"data.train={args.data / task}",
        f"data.task={task}", f"data.max_seq_length={LENGTHS.get(task, 512)}", "data.truncate=skip",
        f"train.max_steps={args.steps}", f"train.rows_per_tenant={args.rows}",
        f"eval.every={args.steps}", f"eval.limit={args.limit}", "eval.batch_size=32", "mesh.data=1",
        "logging.report_to=[]", "runtime.allow_cpu=true", f"output_dir={output}",
        *overrides,
    ])  # fmt: skip
    return replace(made, adapter=adapter)


def trained(args, task: str, adapter, folder: Path) -> dict:
    """The best learning rate of one method, the folders of its adapters by seed, and every rate's validation score."""
    rows = f"train.per_device_batch_size={len(GRID) * args.rows}"
    rates = ", ".join(map(str, GRID))
    first = train_tenants(
        config_of(args, task, adapter, folder / "rates", rows, f"sweep.learning_rate=[{rates}]", "sweep.seed=[0]")
    )
    scores = {rate: first.tenants[f"learning_rate-{rate!r}-seed-0"]["best_score"] for rate in GRID}
    losses = {rate: last_loss(first.output_dir / f"learning_rate-{rate!r}-seed-0") for rate in GRID}
    best = max(GRID, key=lambda r: (-float("inf") if scores[r] is None else scores[r], -losses[r]))  # ties: the loss
    seeds = ", ".join(map(str, SEEDS[1:]))
    rows = f"train.per_device_batch_size={len(SEEDS[1:]) * args.rows}"
    rest = train_tenants(
        config_of(args, task, adapter, folder / "seeds", rows, f"sweep.learning_rate=[{best}]", f"sweep.seed=[{seeds}]")
    )
    folders = {0: first.output_dir / f"learning_rate-{best!r}-seed-0"}
    folders |= {seed: rest.output_dir / f"learning_rate-{best!r}-seed-{seed}" for seed in SEEDS[1:]}
    return {"learning_rate": best, "validation": scores, "folders": {seed: str(f) for seed, f in folders.items()}}


def last_loss(folder: Path) -> float:
    """The smallest validation loss of a run; infinite where none was measured."""
    rows = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []
    return min((row["validation_loss"] for row in rows if "validation_loss" in row), default=float("inf"))


def alone(args, task: str, adapter, folder: Path, rate: float) -> dict:
    """Seconds a step (median, without the first) and peak memory of a run of one adapter in its own process."""
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
    limit = args.test_limit
    assert asked, task
    return evaluate_task(model, adapter, asked, tokenizer, limit, shuffle=shuffle).record()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--tasks", nargs="+", default=["sst2", "rte", "banking77"])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rows", type=int, default=16, help="examples a step")
    parser.add_argument("--limit", type=int, default=200, help="validation examples")
    parser.add_argument("--test-limit", type=int, help="test examples; default: the whole file")
    parser.add_argument("--also", nargs="*", default=[], metavar="NAME:FIELD=VALUE,...", help="further forms of PARA")
    parser.add_argument("--output", type=Path, default=Path("results/compare_methods"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    model_config = load_model_config(args.backbone)
    chosen = methods(model_config, args.also)
    tokenizer = load_tokenizer(args.backbone)
    held = {}  # the backbone, loaded where something is left to score

    def model():
        held["model"] = held.get("model") or load_backbone(args.backbone, dtype="float32")
        return held["model"]

    for task in args.tasks:
        base = args.output / f"{task}-base.json"
        done(base, lambda task=task: tested(args, task, model(), tokenizer, None), settings(args))
        for name, adapter in chosen.items():
            label = "".join(c if c.isalnum() else "-" for c in name)
            folder = args.output / "runs" / task / label
            folder.mkdir(parents=True, exist_ok=True)

            def measured(task=task, name=name, adapter=adapter, folder=folder) -> dict:
                begun = time.monotonic()
                found = trained(args, task, adapter, folder)
                found |= {"name": name, "parameters": count_parameters(init_adapter(adapter, model_config))}
                found["train_seconds"] = time.monotonic() - begun
                kept = {s: load_adapter(f"{f}/adapter", model_config) for s, f in found.pop("folders").items()}
                found["test"] = {s: tested(args, task, model(), tokenizer, one) for s, one in kept.items()}
                if name == "PARA r=12":
                    found["shuffled"] = {s: tested(args, task, model(), tokenizer, one, s) for s, one in kept.items()}
                return found | {"alone": alone(args, task, adapter, folder, found["learning_rate"])}

            done(args.output / f"{task}-{label}.json", measured, settings(args) | {"adapter": repr(adapter)})
            write_table(args, chosen)


def settings(args) -> dict:
    """What scores depend on beside task and method."""
    names = ("backbone", "data", "steps", "rows", "limit", "test_limit")
    return {name: str(getattr(args, name)) for name in names} | {"grid": list(GRID), "seeds": list(SEEDS)}


def done(file: Path, make, asked: dict) -> dict:
    """What the file holds; made and written first where there is none. Ends the script where it holds other settings'
    scores."""
    if file.exists() and json.loads(file.read_text())["asked"] != asked:
        sys.exit(f"compare_methods: {file} was made with other settings; choose another --output")
    if not file.exists():
        part = file.with_suffix(".part")
        part.write_text(json.dumps(make() | {"asked": asked}, indent=1) + "\n")
        os.replace(part, file)
    return json.loads(file.read_text())


def write_table(args, chosen: dict) -> None:
    """table.md, table.json and scores.png of what is there so far."""
    lines = ["| task | method | parameters | learning rate | score | range | training step, s | peak memory, GB |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    drawn: dict[str, dict[str, list[float]]] = {}
    for task in args.tasks:
        base = args.output / f"{task}-base.json"
        if not base.exists():
            continue
        found = json.loads(base.read_text())
        lines.append(f"| {task} ({found['metric']}, {found['count']} rows) | base | 0 | | {found['score']:.4f} | | | |")
        drawn[task] = {"base": [found["score"]]}
        for name in chosen:
            file = args.output / f"{task}-{''.join(c if c.isalnum() else '-' for c in name)}.json"
            if not file.exists():
                continue
            found = json.loads(file.read_text())
            for shown, key in ((name, "test"), (f"{name}, prompts shuffled", "shuffled")):
                if key in found:
                    scores = sorted(one["score"] for one in found[key].values())
                    drawn[task][shown] = scores
                    beside = found["alone"] if key == "test" else None
                    edge = " (the grid's edge)" if found["learning_rate"] in (GRID[0], GRID[-1]) else ""
                    lines.append(
                        f"| {task} | {shown} | {found['parameters']:,} | {found['learning_rate']:g}{edge} | "
                        f"{median(scores):.4f} | {scores[0]:.4f} to {scores[-1]:.4f} | "
                        + (f"{beside['step_seconds']:.2f} | {beside['peak_bytes'] / 1e9:.2f} |" if beside else "| |")
                    )
    (args.output / "table.md").write_text("\n".join(lines) + "\n")
    about = {"command": shlex.join(["python", *sys.argv]), "device": describe_devices(), "versions": versions()}
    record = about | {"steps": args.steps, "rows": args.rows, "grid": GRID, "seeds": SEEDS, "scores": drawn}
    (args.output / "table.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(drawn, args.output / "scores.png")


def plot(drawn: dict[str, dict[str, list[float]]], file: Path) -> None:
    """Each task's scores: a dot a seed, a line at the median."""
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
