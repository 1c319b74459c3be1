"""The stage `train` of compare_methods.py: the rates of a method, then its seeds, as tenants of one run each."""

import shutil
import time
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path

import jax
from compare_cells import done, label, settings, write
from compare_tables import write_tables

from para_jax import LoraConfig, ParaConfig, init_adapter, load_config, train_tenants
from para_jax.adapters.adapter import count_parameters
from para_jax.data.tasks import TASKS
from para_jax.io import atomic
from para_jax.training.metrics_file import read_metrics

GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
#: Tokens of a training example; longer ones are left out.
LENGTHS = {
    "sst2": 80,
    "rte": 128,
    "banking77": 96,
    "boolq": 320,
    "boolq_closed": 48,
    "copa": 64,
    "wikisql": 240,
    "sms_spam": 160,
    "clinc150": 64,
    "ag_news": 128,
    "squad": 320,
    "gsm8k": 320,
}
#: Tokens of a written answer, where the task's own number is far more than its longest answer has.
NEW_TOKENS = {"banking77": 12}
#: Fields that were added to configs after the first results, which name a config without them.
NEWER_FIELDS = {"layers_to_transform"}


def train(args, task: str, every: dict, model_config) -> None:
    for name, (adapter, overrides) in every.items():
        folder = args.output / "runs" / task / label(name)
        folder.mkdir(parents=True, exist_ok=True)
        rates = rates_of(adapter)

        def made(name=name, adapter=adapter, folder=folder, rates=rates, overrides=overrides) -> dict:
            about = {"name": name, "parameters": parameters_of(adapter, model_config)}
            return (
                about | {"examples": examples_read(args, task)} | trained(args, task, adapter, folder, rates, overrides)
            )

        about = training_settings(args, adapter, overrides) | {"rates": list(rates)}
        file = args.output / f"{task}-{label(name)}-trained.json"
        found = done(file, made, about)
        lacking = [seed for seed in range(args.seeds) if str(seed) not in found["validation"]]
        if lacking:
            begun = time.monotonic()
            run_seeds(args, task, adapter, folder, found["learning_rate"], lacking, *overrides)
            seeds = found["validation"] | validation(task, folder, found["learning_rate"], lacking)
            write(file, found | {"validation": seeds, "seconds": found["seconds"] + time.monotonic() - begun})
        write_tables(args.output)


def training_settings(args, adapter, overrides: tuple[str, ...]) -> dict:
    """What a method's adapters were trained with. The task and the rates are not among it."""
    given = {"overrides": list(overrides)} if overrides else {}
    return settings(args) | {"adapter": form_of(adapter)} | given


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
    seeds = list(range(args.seeds))
    run_seeds(args, task, adapter, folder, best, seeds, *overrides)
    return {"learning_rate": best, "rates": tried, "validation": validation(task, folder, best, seeds)}


def run_seeds(args, task: str, adapter, folder: Path, rate: float, seeds: list[int], *overrides: str) -> None:
    """The runs of these seeds at this rate for all steps."""
    listed = ", ".join(map(str, seeds))
    sweep = f"sweep.learning_rate=[{rate}]", f"sweep.seed=[{listed}]"
    name = f"seeds-{rate!r}-{'-'.join(map(str, seeds))}"
    run(args, task, adapter, folder / name, len(seeds), *sweep, *overrides)


def run(args, task: str, adapter, folder: Path, tenants: int, *overrides: str) -> Path:
    batch = f"train.per_device_batch_size={tenants * args.rows}"
    return train_tenants(config_of(args, task, adapter, folder, batch, *overrides)).output_dir


def seed_folder(folder: Path, rate: float, seed: int) -> Path | None:
    """The newest run of a seed; None where there is none."""
    found = folder.glob(f"seeds-{rate!r}*/learning_rate-{rate!r}-seed-{seed}")
    return max(found, key=lambda one: one.stat().st_mtime, default=None)


def validation(task: str, folder: Path, rate: float, seeds: list[int]) -> dict[str, dict]:
    return {str(seed): last_validation(task, seed_folder(folder, rate, seed)) for seed in seeds}


def beyond(best: float, tried) -> float | None:
    """The next rate of GRID where the best of those tried is the highest or the lowest of them; None where it is not,
    or where GRID ends."""
    at = GRID.index(best)
    if best == max(tried) and at + 1 < len(GRID):
        return GRID[at + 1]
    return GRID[at - 1] if best == min(tried) and at > 0 else None


def last_validation(task: str, folder: Path | None) -> dict:
    """A run's last score and loss on validation data; -1 and 1e9 if it diverged before its first."""
    file = folder and folder / "metrics.jsonl"
    rows = [row for row in read_metrics(file) if "validation_loss" in row] if file and file.exists() else []
    if not rows:
        return {"score": -1.0, "loss": 1e9}
    return {"score": rows[-1][score_name(task, rows[-1])], "loss": rows[-1]["validation_loss"]}


def score_name(task: str, row: dict) -> str:
    """The score's name in a row of metrics. Data without a task of ours gets the metric that suits it."""
    if task in TASKS:
        return f"validation_{TASKS[task].metric}"
    return next(name for name in ("validation_exact_match", "validation_accuracy") if name in row)


def config_of(args, task: str, adapter, output: Path, *overrides: str):
    made = load_config(None, [
        f"backbone.source={args.backbone}", "backbone.dtype=float32", f"data.train={training_data(args, task)}",
        f"adapter.scope={adapter.scope}", *(["adapter.up_bias=true"] if getattr(adapter, "up_bias", False) else []),
        f"data.max_seq_length={LENGTHS.get(task, 512)}",
        *([f"data.task={task}"] if task in TASKS else []),  # others: the metric comes from the data
        "data.truncate=skip",
        f"train.max_steps={args.steps}", f"train.rows_per_tenant={args.rows}",
        f"eval.every={args.steps}", f"eval.limit={args.limit}", "eval.batch_size=32", "mesh.data=1", "eval.base=false",
        *([f"eval.max_new_tokens={NEW_TOKENS[task]}"] if task in NEW_TOKENS else []),
        "logging.report_to=[]", "runtime.allow_cpu=true", f"output_dir={output}",
        *overrides,
    ])  # fmt: skip
    return replace(made, adapter=adapter)


def training_data(args, task: str) -> Path:
    """The task's folder, or with --examples a copy with that number of training rows."""
    whole = args.data / task
    if args.examples is None:
        return whole
    part = args.output / "runs" / "data" / f"{task}-{args.examples}"
    if not (part / "train.jsonl").exists():
        part.mkdir(parents=True, exist_ok=True)
        for split in ("validation", "test"):
            shutil.copy(whole / f"{split}.jsonl", part)
        with (whole / "train.jsonl").open("rb") as lines:
            atomic.write_bytes(part / "train.jsonl", b"".join(islice(lines, args.examples)))
    return part


def examples_read(args, task: str) -> int:
    """The different training rows that a run reads."""
    with (training_data(args, task) / "train.jsonl").open("rb") as lines:
        return min(args.steps * args.rows, sum(1 for _ in lines))


def parameters_of(adapter, model_config) -> int:
    return count_parameters(jax.eval_shape(lambda: init_adapter(adapter, model_config)))


def form_of(adapter) -> str:
    """The config as text, without the fields that the first results' configs lacked where they have their default.
    PARA's earlier form of scope `response` has a window in its text. The present one has none, so their scores never
    mix."""
    one_form = adapter.scope == "all" or (adapter.scope == "response" and isinstance(adapter, ParaConfig))

    def is_shown(field) -> bool:
        newer = field.metadata.get("optional") or field.name in NEWER_FIELDS
        scoped = field.name == "scope_window" and not one_form
        return not newer or scoped or getattr(adapter, field.name) != field.default

    shown = [f"{one.name}={getattr(adapter, one.name)!r}" for one in fields(adapter) if is_shown(one)]
    return f"{type(adapter).__name__}({', '.join(shown)})"


def rates_of(adapter) -> tuple[float, ...]:
    """Four neighbours of GRID, around where a method's best rates lay in first trials."""
    if isinstance(adapter, ParaConfig):
        lowest = adapter.summary == "raw" and adapter.pooler != "constant"  # the summary's scale grows over the layers
        return GRID[:4] if lowest else GRID[1:5]
    return GRID[:4] if isinstance(adapter, LoraConfig) else GRID[2:6]
