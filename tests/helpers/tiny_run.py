"""A tiny run: a golden backbone beside a tokenizer of one word a token, and data of one shape: tests share programs."""

import json
import shutil
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
from golden_models import FIXTURES, strong
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from para_jax import ParaConfig, init_adapter, load_backbone, save_adapter
from para_jax.config import RunConfig, TrainSection, load_config

ADAPTER = ParaConfig(r=4, summary="rms")
#: adam_eps is large: Adam's first steps then depend smoothly on the gradient, and close gradients give close updates.
TRAIN = TrainSection(
    learning_rate=3e-2, schedule="linear", warmup_ratio=0.3, max_steps=6, weight_decay=0.1, adam_eps=1e-3
)
STEPS, ROWS, LENGTH, COMPLETION = 6, 8, 16, 6


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """w<id> for every id that the golden backbones know."""
    words = ["<pad>", "<s>", "</s>"] + [f"w{i}" for i in range(3, 256)]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.Metaspace(replacement="|")  # no space of its own between words
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def backbone_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(FIXTURES / "llama" / name, folder)
    tokenizer().save_pretrained(folder)
    return folder


def strong_adapters(folder: Path, paths: Iterable[str]) -> None:
    """A backbone in the folder, and at each of these paths a PARA adapter that changes its answers."""
    model = load_backbone(backbone_folder(folder / "backbone"))
    for i, path in enumerate(paths):
        save_adapter(strong(init_adapter(ParaConfig(r=4), model.config), i, 0.3), folder / path)


def rows_of_text(count: int, seed: int) -> list[dict]:
    """Prompts of 8 words, each with 1 to 5 of the words w9 w10 w11 ...: there is something to learn."""
    draw = np.random.default_rng(seed)
    return [
        {"prompt": words(draw.integers(20, 256, 8)), "completion": words(range(9, 10 + i % 5))} for i in range(count)
    ]


def words(ids) -> str:
    return " ".join(f"w{i}" for i in ids)


def write_rows(file: Path, rows: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run_config(folder: Path, *overrides: str) -> RunConfig:
    """A run of 6 steps of 8 rows on one device, evaluated every 3 steps by its loss; folder as of `run_folder`."""
    return load_config(None, [
        f"backbone.source={folder / 'backbone'}",
        f"data.train={folder / 'data'}",
        f"output_dir={folder / 'run'}",
        "adapter.r=4", "adapter.summary=rms", "data.buckets=1", "mesh.data=1",
        f"train.learning_rate={TRAIN.learning_rate}", f"train.warmup_ratio={TRAIN.warmup_ratio}", "train.max_steps=6",
        f"train.weight_decay={TRAIN.weight_decay}", f"train.adam_eps={TRAIN.adam_eps}",
        "eval.every=3", "eval.metric=loss", "eval.batch_size=8", "eval.max_new_tokens=4",
        "logging.report_to=[]", "runtime.compilation_cache=false", "runtime.allow_cpu=true",
        *overrides,
    ])  # fmt: skip


def run_folder(folder: Path) -> Path:
    """A folder with a backbone and with data for a run."""
    backbone_folder(folder / "backbone")
    write_rows(folder / "data" / "train.jsonl", rows_of_text(20, seed=1))
    write_rows(folder / "data" / "validation.jsonl", rows_of_text(8, seed=2))
    write_rows(folder / "data" / "test.jsonl", rows_of_text(5, seed=3))
    return folder


def write_tenants(to: Path, sizes: dict[str, int]) -> None:
    """A folder of tenants with these numbers of rows for training; initech is a file without a validation split."""
    for seed, (name, size) in enumerate(sizes.items()):
        if name == "initech":
            write_rows(to / "initech.jsonl", rows_of_text(size, seed=seed))
            continue
        for split, count in (("train", size), ("validation", 6), ("test", 5)):
            write_rows(to / name / f"{split}.jsonl", rows_of_text(count, seed=10 * seed + len(split)))


def metrics(config: RunConfig) -> list[dict]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]


def losses(config: RunConfig, name: str = "loss") -> list[float]:
    """The loss, or another value, of the lines of a run's log that have it."""
    return [row[name] for row in metrics(config) if name in row]
