"""The quickstart: three tenants with different jobs, trained on the built-in backbone, scored, and served in one
batch."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from . import devices
from .adapters.rows import pick, stack_adapters
from .backbone.load import load_backbone
from .config import RunConfig, load_config
from .data.batches import Bucket, example_lengths, plan
from .data.business import JOBS, business_examples
from .data.sources import Encoded, Record, encode_records, read_records
from .data.tokenizer import load_tokenizer
from .evaluation.evaluate import EvalTask, evaluate_task
from .inference.generate import generate
from .reports import results
from .runs import Work, claim_folder, fit
from .sharding import make_mesh

TRAIN_EXAMPLES, SCORED_EXAMPLES = 320, 30
#: One compiled program for all tenants: every row is padded to 48 tokens, of which at most 28 are completion.
BUCKET = Bucket(48, 28)
LEAST_GAIN = 0.3
DEFAULTS = (
    "backbone.dtype=float32",
    "train.learning_rate=3e-3",
    "train.max_steps=60",
    "train.per_device_batch_size=8",
    "eval.every=1000",
    "mesh.data=1",
    "data.max_seq_length=48",
)


def quickstart(overrides: Sequence[str] = ()) -> bool:
    """Trains, scores and serves three tenants; true if each gained at least 0.3 in exact match on held-out examples.

    Args:
        overrides: of the run config, such as "train.max_steps=20" or "output_dir=runs/mine".
    """
    begun = time.monotonic()
    config = load_config(None, [*DEFAULTS, f"output_dir={next_folder()}", *overrides])
    devices.start(config.runtime)
    with phase("1/5 backbone: fetch and load"):
        model = load_backbone(**vars(config.backbone))
        tokenizer = load_tokenizer(config.backbone.source)
    with phase("2/5 examples, and each tenant's score before training"):
        write_examples(Path(config.output_dir), config.seed)
        tasks = [task(config, job, tokenizer) for job in JOBS]
        before = [evaluate_task(model, None, t, tokenizer).score for t in tasks]
    with phase("3/5 training one adapter a tenant"):
        adapters = [train_tenant(config, job, model, tokenizer) for job in JOBS]
    with phase("4/5 each tenant's score after training"):
        after = [evaluate_task(model, a, t, tokenizer).score for a, t in zip(adapters, tasks, strict=True)]
    with phase("5/5 one mixed batch: three tenants and the base model"):
        show_mixed_batch(model, tokenizer, adapters, tasks)
    print(f"\n{'tenant':<10}{'before':>8}{'after':>8}{'gain':>8}   exact match on {SCORED_EXAMPLES} held-out examples")
    for job, was, now in zip(JOBS, before, after, strict=True):
        print(f"{job:<10}{was:>8.3f}{now:>8.3f}{now - was:>8.3f}")
    scores = {job: {"before": was, "after": now} for job, was, now in zip(JOBS, before, after, strict=True)}
    record = results(shlex.join(["para-jax", "quickstart", *overrides]), config, scores, time.monotonic() - begun)
    (Path(config.output_dir) / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"\nrun folders: {config.output_dir}/{{{','.join(JOBS)}}}; {time.monotonic() - begun:.0f} s in all")
    prompt = str(tasks[-1].records[0].prompt).replace("\n", "\\n")
    print(
        f"next: para-jax generate --backbone {config.backbone.source} --adapter {config.output_dir}/{JOBS[-1]}/adapter "
        f'--prompt "{prompt}"'
    )
    short = [job for job, was, now in zip(JOBS, before, after, strict=True) if now - was < LEAST_GAIN]
    if short:
        print(f"gained less than {LEAST_GAIN}: {', '.join(short)}")
    return not short


def train_tenant(config: RunConfig, job: str, model, tokenizer):
    """The adapter of one tenant; its run folder can be resumed or repeated by `para-jax train <folder>/config.yaml`."""
    folder = Path(config.output_dir)
    data = replace(config.data, train=str(folder / "data" / job / "train.jsonl"))
    config = replace(config, output_dir=str(folder / job), data=data)
    examples = encode_records(read_records(str(data.train)), tokenizer, data)
    claim_folder(config)
    mesh = make_mesh(**vars(config.mesh))
    devices.say(f"tenant {job}: {examples.report()}")
    return fit(config, model, tokenizer, work_of(config, examples), mesh).adapter


def work_of(config: RunConfig, data: Encoded) -> Work:
    rows = config.train.per_device_batch_size
    order = plan(example_lengths(data.examples), buckets=(BUCKET,), rows=rows, seed=config.seed)
    return Work(data, (BUCKET,), order, rows, 1, config.train.max_steps or order.batches_per_epoch)


def write_examples(folder: Path, seed: int) -> None:
    for job in JOBS:
        (folder / "data" / job).mkdir(parents=True, exist_ok=True)
        for split, count in (("train", TRAIN_EXAMPLES), ("test", SCORED_EXAMPLES)):
            lines = [json.dumps(example) + "\n" for example in business_examples(job, split, count, seed)]
            (folder / "data" / job / f"{split}.jsonl").write_text("".join(lines))


def task(config: RunConfig, job: str, tokenizer) -> EvalTask:
    records = read_records(Path(config.output_dir) / "data" / job / "test.jsonl")
    kept: list[Record] = encode_records(records, tokenizer, config.data).records
    return EvalTask(job, kept, "exact_match", max_new_tokens=BUCKET.completion, batch_size=SCORED_EXAMPLES)


def show_mixed_batch(model, tokenizer, adapters, tasks: list[EvalTask]) -> None:
    """Decodes each tenant's first held-out prompt twice in one batch: with its adapter, and with the base model."""
    prompts = [task.records[0].prompt for task in tasks] * 2
    rows = pick(stack_adapters(adapters), np.array([*range(len(tasks)), *[-1] * len(tasks)]))
    texts = generate(model, prompts, tokenizer=tokenizer, adapters=rows, max_new_tokens=BUCKET.completion)
    for i, t in enumerate(tasks):
        print(f"\n{prompts[i]}")
        print(f"  tenant {t.name}: {texts[i].strip()!r} (expected {t.records[0].completion!r})")
        print(f"  base model: {texts[i + len(tasks)].strip()[:80]!r}")


def next_folder() -> str:
    """runs/quickstart-<n>, the first that does not exist."""
    taken = (
        int(p.name.removeprefix("quickstart-")) for p in Path("runs").glob("quickstart-*") if p.name[11:].isdigit()
    )
    return f"runs/quickstart-{max(taken, default=0) + 1}"


@contextmanager
def phase(name: str) -> Iterator[None]:
    begun = time.monotonic()
    devices.say(f"== {name}")
    yield
    devices.say(f"== {name}: {time.monotonic() - begun:.1f} s")
