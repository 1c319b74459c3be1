"""The quickstart: three tenants with different jobs, trained in one run on the built-in backbone, scored, and served
in one batch."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..adapters.files import load_adapter
from ..adapters.rows import pick, stack_adapters
from ..backbone.load import load_backbone
from ..config import RunConfig, load_config
from ..data.records import Record, read_records
from ..data.tokenizer import run_tokenizer
from ..inference.generate import generate
from ..io import atomic
from ..io.checks import require
from ..io.hub import resolve_backbone
from ..io.messages import say
from ..io.record_file import write_record
from ..reports.inspect import results
from ..runs.folder import claim_folder
from ..runs.train import train_tenants
from ..runtime import devices
from .examples import JOBS, business_examples

TRAIN_EXAMPLES, SCORED_EXAMPLES = 384, 30
NEW_TOKENS = 28
#: Written at the end of a quickstart.
RESULTS = "results.json"
LEAST_GAIN = 0.3
#: Next to what configs/quickstart.yaml has.
DEFAULTS = (
    "data.train=null",
    "train.per_device_batch_size=24",
    "train.rows_per_tenant=8",
    f"eval.batch_size={SCORED_EXAMPLES}",
    f"eval.max_new_tokens={NEW_TOKENS}",
    "mesh.data=1",
    "data.buckets=1",
)


def quickstart(overrides: Sequence[str] = ()) -> bool:
    """Trains, scores and serves three tenants; true if each gained at least 0.3 in exact match on held-out examples.
    The same call resumes a quickstart that was stopped.

    Args:
        overrides: of the run config, such as "train.max_steps=20" or "output_dir=runs/mine".
    """
    begun = time.monotonic()
    given = load_config(None, [f"output_dir={own_folder()}", *overrides]).output_dir
    require("://" not in given, "output_dir", given, "a folder on this host; `para-jax train` writes into a bucket")
    folder, run = Path(given), Path(given) / "tenants"
    config = config_in(folder, overrides)
    devices.start(config.runtime)
    with phase("1/3 backbone: fetch"):
        resolve_backbone(config.backbone.source)
    with phase("2/3 three tenants, scored before and after training, in one run"):
        claim_folder(config)  # before the examples of another run there are written over
        write_examples(folder / "data", config.seed)
        tenants = train_tenants(config).tenants
    with phase("3/3 one mixed batch: three tenants and the base model"):
        model, tokenizer = load_backbone(**vars(config.backbone)), run_tokenizer(config)
        adapters = [load_adapter(run / job / "adapter", model.config, model=model) for job in JOBS]
        asked = [read_records(folder / "data" / job / "test.jsonl")[0] for job in JOBS]
        show_mixed_batch(model, tokenizer, adapters, asked)
    scores = {job: {"before": tenants[job]["test_before"], "after": tenants[job]["test_after"]} for job in JOBS}
    record = results(shlex.join(["para-jax", "quickstart", *overrides]), config, scores, time.monotonic() - begun)
    write_record(folder / RESULTS, record)
    print(f"\n{'tenant':<10}{'before':>8}{'after':>8}{'gain':>8}   exact match on {SCORED_EXAMPLES} held-out examples")
    for job, found in scores.items():
        was, now = found.values()
        print(f"{job:<10}{was:>8.3f}{now:>8.3f}{now - was:>8.3f}")
    print(f"\n{time.monotonic() - begun:.0f} s in all; the tenants: {shlex.join(['para-jax', 'inspect', str(run)])}")
    prompt = str(asked[-1].prompt).replace("\n", "\\n")
    print(
        f"next: para-jax generate --backbone {shlex.quote(config.backbone.source)} --adapters {shlex.quote(str(run))} "
        f'--tenant {JOBS[-1]} --prompt "{prompt}"'
    )
    short = [job for job, found in scores.items() if found["after"] - found["before"] < LEAST_GAIN]
    if short:
        print(f"gained less than {LEAST_GAIN}: {', '.join(short)}")
    return not short


def config_in(folder: Path, overrides: Sequence[str]) -> RunConfig:
    """The config of the tenants' run in a quickstart's folder."""
    own = f"data.tenants={folder / 'data'}", f"output_dir={folder / 'tenants'}"
    return load_config("quickstart", [*DEFAULTS, *overrides, *own])


def write_examples(folder: Path, seed: int) -> None:
    for job in JOBS:
        (folder / job).mkdir(parents=True, exist_ok=True)
        for split, count in (("train", TRAIN_EXAMPLES), ("test", SCORED_EXAMPLES)):
            lines = [json.dumps(example) + "\n" for example in business_examples(job, split, count, seed)]
            atomic.write_text(folder / job / f"{split}.jsonl", "".join(lines))


def show_mixed_batch(model, tokenizer, adapters, asked: list[Record]) -> None:
    """Decodes each tenant's first held-out prompt twice in one batch: with its adapter, and with the base model."""
    prompts, count = [record.prompt for record in asked] * 2, len(asked)
    rows = pick(stack_adapters(adapters), np.array([*range(count), *[-1] * count]))
    texts = generate(model, prompts, tokenizer=tokenizer, adapters=rows, max_new_tokens=NEW_TOKENS)
    for i, job in enumerate(JOBS):
        print(f"\n{prompts[i]}")
        print(f"  tenant {job}: {texts[i]!r} (expected {asked[i].completion!r})")
        print(f"  base model: {texts[i + count][:80]!r}")


def own_folder() -> Path:
    """runs/quickstart-<n>: the newest if that quickstart has not ended, else the first that does not exist."""
    numbers = [int(path.name[11:]) for path in Path("runs").glob("quickstart-*") if path.name[11:].isdigit()]
    newest = max(numbers, default=0)
    last = Path(f"runs/quickstart-{newest}")
    return last if last.is_dir() and not (last / RESULTS).exists() else Path(f"runs/quickstart-{newest + 1}")


@contextmanager
def phase(name: str) -> Iterator[None]:
    begun = time.monotonic()
    say(f"== {name}")
    yield
    say(f"== {name}: {time.monotonic() - begun:.1f} s")
