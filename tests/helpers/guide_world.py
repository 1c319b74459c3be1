"""The folder in which the examples of docstrings and guides run: a tiny backbone in the place of SmolLM2, data, and
adapters where the examples have them."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from golden_models import strong
from running_server import chat_tokenizer
from tiny_run import backbone_folder, rows_of_text, run_config, write_rows, write_tenants

from para_jax import AdapterBank, ParaConfig, init_adapter, load_backbone, load_tokenizer, save_adapter, train

ADAPTERS = ("runs/a/adapter", "runs/b/adapter", "peft/acme")
TENANTS = ("routing", "orders", "dates")


def make_world(folder: Path) -> Path:
    model = load_backbone(backbone_folder(folder / "backbone"))
    chat_tokenizer().save_pretrained(folder / "backbone")
    for place in (*ADAPTERS, *(f"runs/quickstart-1/tenants/{name}/adapter" for name in TENANTS)):
        save_adapter(
            strong(init_adapter(ParaConfig(r=12), model.config), len(place), 0.1),
            folder / place,
            base_model=folder / "backbone",
        )
    for seed, (split, count) in enumerate({"train": 16, "validation": 4, "test": 4}.items()):
        write_rows(folder / "data" / "mine" / f"{split}.jsonl", rows_of_text(count, seed))
        write_rows(folder / "data" / "sst2" / f"{split}.jsonl", rows_of_text(count, seed))
    write_tenants(folder / "data" / "tenants", {"acme": 8, "globex": 8})
    questions = [{"prompt": "Hello", "tenant": name, "max_new_tokens": 4} for name in ("acme", "globex")]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    train(run_config(folder, "data.train=data/mine", "output_dir=runs/mine", "train.max_steps=2", "eval.every=1"))
    return folder


@contextmanager
def opened_world(folder: Path) -> Iterator[tuple]:
    """The model, the tokenizer and a bank with the tenants acme and globex, in such a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_world(Path.cwd())
        model, tokenizer = load_backbone("backbone"), load_tokenizer("backbone")
        bank = AdapterBank(model.config)
        for name, place in zip(("acme", "globex"), ADAPTERS, strict=False):
            bank.add(name, place)
        yield model, tokenizer, bank


#: What makes a run of an example small.
SMALL = (
    "backbone.source=backbone", "data.buckets=1", "mesh.data=1", "train.per_device_batch_size=8", "eval.every=2",
    "eval.max_new_tokens=4", "logging.report_to=[]", "runtime.allow_cpu=true", "runtime.compilation_cache=false",
)  # fmt: skip


def in_world(code: str) -> str:
    """The code of an example, with the tiny backbone for SmolLM2, and with small runs."""
    code = re.sub(r'load_config\((None|"[\w-]+"), \[', lambda match: f"{match[0]}*{SMALL!r}, ", code)
    for its, ours in (("smollm2-135m", "backbone"), ("runs/llama-8b", "backbone")):
        code = code.replace(f'"{its}"', f'"{ours}"')
    return code.replace("max_length=1024", "max_length=128")
