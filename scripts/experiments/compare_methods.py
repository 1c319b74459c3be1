"""Which adapter, when? Compares base, (IA)^3, PARA, PARA with a constant pooler, LoRA of PARA's size and further forms.

    python scripts/experiments/compare_methods.py --tasks sst2 banking77 rte --output results/compare_methods
    python scripts/experiments/compare_methods.py --output results/compare_methods --report

Each method gets four neighbouring learning rates of one grid, 1e-4 to 1e-1 (`rates_of`). The rate is chosen on
validation data after half the steps, with seed 0 (by accuracy, ties by the loss). While the best is the highest or
lowest rate tried, the grid's next rate is tried too. All seeds are then trained with it for all steps. All rates, and
then all seeds, are tenants of one run (`sweep`). `--also` names further forms, and --methods which of the main ones.
Stages:

    train       the rates and the seeds
    test        the test file, row by row; also the base model, with and without examples in its prompt
    alone       a step's time and the peak memory of a run of one adapter in a process of its own; once for each
                method the cost of prefill and decode relative to the base model
    forgetting  the loss on plain text with the adapter, less that without it

Finished work is kept in the output folder, and the same command continues. Git has two tables of it (compare_cells.py).
Other backbones and numbers of examples belong in folders inside it. `--report` reads all of them (compare_report.py).
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import median

from compare_cells import done, label, lacks, pack, packed, read, settings, unpack
from compare_report import write_report
from compare_scores import plain_text, scored, serving_cost, text_losses, with_examples
from compare_tables import write_tables
from compare_training import (
    config_of,
    form_of,
    parameters_of,
    run_seeds,
    seed_folder,
    train,
    training_settings,
    validation,
)

from para_jax import ParaConfig, load_adapter, load_backbone, load_model_config, load_tokenizer, log_to_stderr
from para_jax.config import ADAPTER_CONFIGS, Ia3Config, LoraConfig, save_config
from para_jax.data.records import split_records
from para_jax.evaluation.scoring import Tasks
from para_jax.evaluation.tasks import EvalTask, task_of_run

PARA = ParaConfig(r=12)
TIMED_STEPS = 20
#: Runs `para-jax`, then prints its own peak memory in kB. A child's rusage would include its parent's.
COMMAND = """
import sys
from para_jax.cli import main
code = main(sys.argv[1:])
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
sys.exit(code)
"""


def main(given: list[str] | None = None) -> None:
    args = arguments(given)
    if args.seeds < 1:
        sys.exit(f"compare_methods: --seeds {args.seeds}: give at least 1")
    args.output.mkdir(parents=True, exist_ok=True)
    unpack(args.output)
    if args.report:
        print(write_report(args.output))
        return
    log_to_stderr()
    model_config = load_model_config(args.backbone)
    every = {name: (adapter, ()) for name, adapter in chosen(methods(model_config), args.methods).items()}
    every |= forms(args.also, taken=list(every))
    for task in args.tasks:
        if not (args.data / task / "train.jsonl").exists():
            sys.exit(f"compare_methods: {args.data / task} holds no train.jsonl; --data names the folder of the tasks")
    for stage in args.stages:
        for task in args.tasks:
            STAGES[stage](args, task, every, model_config)
            write_tables(args.output)
    pack(args.output)


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--tasks", nargs="+", default=["sst2", "banking77", "rte"])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=8, help="examples per step")
    parser.add_argument("--examples", type=int, help="train on the first of the training rows only; default: all")
    parser.add_argument("--seeds", type=int, default=3, help="how many; they count from 0")
    parser.add_argument("--limit", type=int, default=200, help="validation examples")
    parser.add_argument("--methods", nargs="*", metavar="NAME", help="of the main methods; default: all of them")
    parser.add_argument("--also", nargs="*", default=[], metavar="NAME:FIELD=VALUE,...", help="further forms")
    parser.add_argument("--output", type=Path, default=Path("results/compare_methods"))
    parser.add_argument("--stages", nargs="+", default=["train", "test", "alone"], choices=STAGES)
    parser.add_argument("--test-limit", type=int, help="the first test examples; default: the whole file")
    parser.add_argument("--shots", nargs="*", type=int, default=[0, 4], help="examples in the base model's prompt")
    parser.add_argument("--shuffle-all", action="store_true", help="shuffle prompts of each PARA that reads them")
    parser.add_argument("--rescore", action="store_true", help="replace scores of earlier versions, which have no rows")
    parser.add_argument("--text", default="squad", help="the task whose passages `forgetting` reads; not a trained one")
    parser.add_argument("--texts", type=int, default=40)
    parser.add_argument("--report", action="store_true", help="compute nothing; write report.md and its pictures")
    return parser.parse_args(given)


# ------------------------------------------------------------------------------------------------------------- methods


def methods(model_config) -> dict:
    """Adapter config by name. LoRA on PARA's sites has the rank closest to PARA's number of parameters."""
    wanted = parameters_of(PARA, model_config)
    loras = {r: LoraConfig(r=r, target_modules=PARA.target_modules) for r in range(1, 33)}
    rank = min(loras, key=lambda r: abs(parameters_of(loras[r], model_config) - wanted))
    return {
        "(IA)^3": Ia3Config(),
        "PARA r=12": PARA,
        "PARA r=12, constant pooler": replace(PARA, pooler="constant"),
        f"LoRA r={rank} on q, v, up": LoraConfig(r=rank, lora_alpha=rank, target_modules=PARA.target_modules),
    }


def chosen(main: dict, names: list[str] | None) -> dict:
    unknown = set(names or ()) - set(main)
    if unknown:
        sys.exit(
            f"compare_methods: --methods {', '.join(sorted(unknown))}: choose from {', '.join(main)}, or use --also"
        )
    return {name: main[name] for name in (main if names is None else names)}


def forms(named: list[str], taken: Iterable[str] = ()) -> dict:
    """Name to a changed PARA, or with method=NAME a form of that method (LoRA on PARA's sites), and overrides of its
    runs' configs, from NAME:FIELD=VALUE,FIELD=VALUE with fields of that config (a+b+c is a tuple) or of a run
    (train.up_lr_ratio).

    Args:
        taken: names of the main methods. Names must differ by more than punctuation, because files are named by them.
    """
    bases = {name: kind() for name, kind in ADAPTER_CONFIGS.items()}
    bases |= {"para": PARA, "lora": LoraConfig(target_modules=PARA.target_modules)}
    found, labels = {}, {label(name): name for name in taken}
    for text in named:
        name, _, given = text.partition(":")
        if label(name) in labels:
            sys.exit(f"compare_methods: --also {name!r}: {labels[label(name)]!r} has this name; choose another")
        labels[label(name)] = name
        try:
            changed = dict(pair.split("=") for pair in given.split(","))
            base = bases[changed.pop("method", "para")]
            adapter = replace(base, **{key: parsed(v) for key, v in changed.items() if "." not in key})
        except (KeyError, TypeError, ValueError) as error:
            sys.exit(f"compare_methods: --also {text!r} is not NAME:FIELD=VALUE,... of a method's config: {error}")
        found[name] = adapter, tuple(f"{key}={v}" for key, v in changed.items() if "." in key)
    return found


def parsed(text: str):
    if "+" in text or text.endswith("_proj"):
        return tuple(map(parsed_one, text.split("+")))
    return parsed_one(text)


def parsed_one(text: str):
    return int(text) if text.isdecimal() else {"true": True, "false": False}.get(text, text)


def reads_prompt(adapter) -> bool:
    return isinstance(adapter, ParaConfig) and adapter.pooler != "constant"


# ---------------------------------------------------------------------------------------------------------------- test


def test(args, task: str, every: dict, model_config) -> None:
    """Scores the base model, then each method's seeds. All share the shapes of their programs, so a method's are
    compiled once. Seeds of scope `response` are asked together, because they share the states of the prompts. Others
    are not: rows that mix adapters gather each one's weights."""
    asked = cache(lambda: test_task(args, task))  # what only a score needs is loaded for it
    tasks = cache(lambda: Tasks(model_of(args.backbone), load_tokenizer(args.backbone), [asked()], args.test_limit))
    about = settings(args) | {"test_limit": args.test_limit}

    def base(shots: int) -> dict:
        if not shots:
            return {"test": scored(tasks(), [None])[0]}
        section = config_of(args, task, PARA, args.output / "none").data
        shown = with_examples(asked(), split_records(section, "train"), shots)
        own = Tasks(model_of(args.backbone), load_tokenizer(args.backbone), [shown], args.test_limit)
        return {"test": scored(own, [None], one_line=True)[0]}  # the base model goes on with further examples

    for shots in args.shots:
        file = args.output / f"{task}-base{f'--{shots}-examples' if shots else ''}-tested.json"
        done(file, lambda shots=shots: base(shots), about, args.rescore)
    for name, (adapter, overrides) in every.items():
        files = [args.output / f"{task}-{label(name)}-seed-{seed}-tested.json" for seed in range(args.seeds)]
        shuffles = args.shuffle_all and reads_prompt(adapter)
        left = [seed for seed, file in enumerate(files) if lacks(file, args.rescore, shuffles)]
        load = cache(lambda seed, of=(adapter, name, overrides): adapter_of(args, task, *of, seed, model_config))
        together = cache(
            lambda left=left, load=load: dict(zip(left, scored(tasks(), list(map(load, left))), strict=True))
        )

        def made(seed: int, adapter=adapter, name=name, load=load, together=together, shuffles=shuffles) -> dict:
            own = together()[seed] if adapter.scope == "response" else scored(tasks(), [load(seed)])[0]
            shuffled = shuffles or name == "PARA r=12"
            return {"test": own} | ({"shuffled": scored(tasks(), [load(seed)], seed)[0]} if shuffled else {})

        for seed, file in enumerate(files):
            done(file, lambda seed=seed, made=made: made(seed), about, args.rescore, shuffles)
        write_tables(args.output)


def test_task(args, task: str) -> EvalTask:
    """The whole test file. No row is left out, and its metric is found from all training rows."""
    whole = argparse.Namespace(**vars(args) | {"examples": None})
    longest = "data.max_seq_length=2048", "data.truncate=error"
    config = config_of(whole, task, PARA, args.output / "none", *longest)
    found = task_of_run(config, "test", load_tokenizer(args.backbone))
    assert found, task
    return found


def trained_cell(args, task: str, adapter, name: str, overrides: tuple[str, ...]) -> dict:
    """What the stage `train` left. Ends the script if it trained something else under this name."""
    file = args.output / f"{task}-{label(name)}-trained.json"
    if not file.exists():
        sys.exit(f"compare_methods: {file} is missing; run --stages train for {name} first")
    found = read(file)
    wanted, held = training_settings(args, adapter, overrides), found["asked"]
    for key in sorted((wanted | held).keys() - {"rates"}):
        if wanted.get(key) != held.get(key):
            sys.exit(
                f"compare_methods: {file} was trained with {key} {held.get(key)}, not {wanted.get(key)}; give the "
                "options and --also of its training, or choose another --output"
            )
    return found


@cache
def model_of(backbone: str):
    return load_backbone(backbone, dtype="float32")


def adapter_folder(runs: Path, rate: float, seed: int) -> Path | None:
    """A seed's adapter; None if its run is gone."""
    folder = seed_folder(runs, rate, seed)
    return folder / "adapter" if folder is not None and (folder / "adapter").exists() else None


def adapter_of(args, task: str, adapter, name: str, overrides: tuple[str, ...], seed: int, model_config):
    """A seed's adapter. If its run is gone (git keeps only the scores), all seeds without a run are trained
    again."""
    found = trained_cell(args, task, adapter, name, overrides)
    if str(seed) not in found["validation"]:
        sys.exit(f"compare_methods: {task}, {name}: seed {seed} is not trained; run --stages train with these --seeds")
    rate, runs = found["learning_rate"], args.output / "runs" / task / label(name)
    if adapter_folder(runs, rate, seed) is None:
        trained = [one for one in range(args.seeds) if str(one) in found["validation"]]
        lost = [one for one in trained if adapter_folder(runs, rate, one) is None]
        run_seeds(args, task, adapter, runs, rate, lost, *overrides)
        for at, now in validation(task, runs, rate, lost).items():
            before = found["validation"].get(at)
            print(f"{task}, {name}, seed {at}, trained again: {now}; before: {before}", flush=True)
    folder = adapter_folder(runs, rate, seed)
    if folder is None:
        sys.exit(f"compare_methods: {task}, {name}: seed {seed} diverged before it was scored; leave the method out")
    return load_adapter(str(folder), model_config)


# ------------------------------------------------------------------------------------------------ alone, and forgetting


def alone(args, task: str, every: dict, model_config) -> None:
    for name, (adapter, overrides) in every.items():
        file = f"{task}-{label(name)}"
        rate = trained_cell(args, task, adapter, name, overrides)["learning_rate"]
        folder = args.output / "runs" / task / label(name)
        folder.mkdir(parents=True, exist_ok=True)
        made = lambda *given: lambda: time_alone(args, task, *given)  # noqa: E731
        done(args.output / f"{file}-alone.json", made(adapter, folder, rate, *overrides), settings(args))
        about = {"backbone": str(args.backbone), "adapter": form_of(adapter)}
        cost = lambda adapter=adapter: serving_cost(model_of(args.backbone), adapter)  # noqa: E731
        done(args.output / f"cost-{label(name)}.json", cost, about)


def time_alone(args, task: str, adapter, folder: Path, rate: float, *overrides: str) -> dict:
    """Seconds per step (median, without the first) and peak memory of a run of one adapter in its own process."""
    given = {"train.learning_rate": rate, "train.max_steps": TIMED_STEPS, "train.per_device_batch_size": args.rows}
    given |= {"eval.limit": 1, "data.buckets": 1}
    changed = [*overrides, *(f"{name}={value}" for name, value in given.items())]
    shutil.rmtree(folder / "alone", ignore_errors=True)
    save_config(config_of(args, task, adapter, folder / "alone", *changed), folder / "alone.yaml")
    command = [sys.executable, "-c", COMMAND, "train", str(folder / "alone.yaml")]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    rows = [json.loads(line) for line in (folder / "alone" / "metrics.jsonl").read_text().splitlines()]
    seconds = [row["step_seconds"] for row in rows if "step_seconds" in row]
    return {"step_seconds": median(seconds), "peak_bytes": int(said.split()[-1]) * 1024}


def forgetting(args, task: str, every: dict, model_config) -> None:
    """The loss on passages of another task, with each adapter less without it. PEFT's comparison of methods has texts
    of Wikipedia of up to 768 tokens and scores all of them. Here the first half of 128 makes the factors."""
    if task == args.text:
        sys.exit(f"compare_methods: {task} is trained on --text {args.text}; choose another, such as boolq")
    about = settings(args) | {"text": args.text, "texts": args.texts}
    for name, (adapter, overrides) in every.items():
        for seed in range(args.seeds):

            def made(name=name, adapter=adapter, overrides=overrides, seed=seed) -> dict:
                tasks, base = base_losses(args.backbone, args.data, args.text, args.texts)
                losses = text_losses(tasks, adapter_of(args, task, adapter, name, overrides, seed, model_config))
                means = {"forgetting": (losses - base).mean(), "loss": losses.mean(), "base_loss": base.mean()}
                return {key: float(value) for key, value in means.items()} | {"rows": packed(losses - base)}

            done(args.output / f"{task}-{label(name)}-seed-{seed}-forgetting.json", made, about)


@cache
def base_losses(backbone: str, data: Path, text: str, texts: int) -> tuple:
    """The texts, and the base model's loss on each."""
    tokenizer = load_tokenizer(backbone)
    tasks = Tasks(model_of(backbone), tokenizer, [plain_text(data / text / "test.jsonl", tokenizer, texts, 128)])
    return tasks, text_losses(tasks, None)


STAGES = {"train": train, "test": test, "alone": alone, "forgetting": forgetting}

if __name__ == "__main__":
    main()
