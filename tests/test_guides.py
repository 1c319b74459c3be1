"""The Python code and the commands of the guides run on a tiny model, page by page. tests/adapters and tests/scripts
run the code of adding_a_method.md and other_servers.md."""

import contextlib
import re
import shlex
import shutil
from pathlib import Path

import matplotlib
import pytest
from guide_world import SMALL, in_world, opened_world
from running_server import running
from tiny_run import rows_of_text

from para_jax import Engine, LoraConfig, init_adapter, save_adapter
from para_jax.cli import main

ROOT = Path(__file__).parents[1]
ELSEWHERE = {"adding_a_method", "other_servers", "foreign"}
ON_RAY = "from para_jax.ray import"
TASK = """{
    "task": "tiny", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "data/mine/test.jsonl"}},
    "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{prompt}}", "doc_to_choice": ["w9", "w10"],
    "doc_to_target": "0",
}"""


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if blocks(page)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What the reader has before a page begins."""
    matplotlib.use("agg")
    with opened_world(tmp_path_factory.mktemp("guides")) as (model, tokenizer, bank):
        engine = Engine(model, bank, tokenizer, slots=4, max_length=128, max_logprobs=5)
        rows = rows_of_text(216, seed=0)
        yield {"engine": engine, "frame": rows, "train_frame": rows[:16], "validation_frame": rows[:4]}


@pytest.mark.long
@pytest.mark.parametrize("page", [page for page in PAGES if page.stem not in ELSEWHERE], ids=lambda page: page.stem)
def test_the_python_code_of_a_guide_runs(page, world, monkeypatch):
    names = dict(world)
    code = [in_world(block).replace('"hellaswag"', TASK) for block in blocks(page) if ON_RAY not in block]
    with running(world["engine"]) if page.stem == "server" else contextlib.nullcontext() as server:
        for block in code:
            exec(compile(block.replace("http://localhost:8000", getattr(server, "url", "")), page.name, "exec"), names)


#: The pages in the order in which each finds what it needs, and then the others.
READ = ("README", "quickstart", "training", "many_tenants", "evaluation", "serving", "jobs")
#: Why a command does not run here, by what it holds, and the tests that run its like.
NOT_HERE = {
    "quickstart": "trains for minutes: tests/quickstart",
    "para-jax serve": "runs until it is stopped: tests/server",
    "para-jax bench": "measures for minutes: tests/bench",
    "--topology": "asks the TPU's compiler: tests/estimate",
    "lm-eval": "tasks of the hub: tests/evaluation/harness",
    "--tasks hellaswag": "a task of the hub: tests/evaluation/harness",
    "model.gguf": "a model of another format: tests/backbone/gguf",
    "alora_invocation_tokens": "token ids of another tokenizer: tests/adapters/test_invocation.py",
    "sweep.method": "three runs: tests/runs/test_compare.py",
    "learning_rate=auto": "a run for each rate: tests/runs/test_rates.py",
    "CONFIG": "no command, but its form",
    "run.yaml": "a config of the reader's, on several hosts: tests/runtime",
    "SLURM": "a variable of the scheduler",
    "/dev/stdin": "a pipe: tests/serving/test_jobs.py",
    "smollm2-sst2 ": "a published data set with columns of its own: tests/data/test_tasks.py",
}
#: What the tiny world has in place of what a command names.
IN_PLACE = {
    "smollm2-135m": "backbone", "models/Llama-3.2-1B": "backbone", "data/other.jsonl": "data/mine/test.jsonl",
    "user/adapter": "peft/acme", " runs/more": "", " hellaswag": "", "data/new": "data/tenants",
    "runs/new": "runs/tenants", "data/june": "data/tenants", "runs/may": "runs/tenants",
    "runs/gemma": "runs/mine", "answers-1.jsonl --output answers.jsonl": "answers-1.jsonl --output merged.jsonl",
    "shard-2 --output runs/evaluation": "shard-2 --output runs/merged",
}  # fmt: skip


def commands(page: Path) -> list[str]:
    text = page.read_text().replace("\\\n", " ")
    return re.findall(r"^ *(?:[^|`\n]*\| )?(para-jax .*)$", text, re.MULTILINE)


def arguments(line: str) -> list[str]:
    for theirs, ours in IN_PLACE.items():
        line = line.replace(theirs, ours)
    name, *given = shlex.split(line, comments=True)[1:]
    if name == "train" and "--dry-run" not in given:
        given[1:1] = [*SMALL, "train.max_steps=2"]
    return [name, *given]


@pytest.mark.long
def test_the_commands_of_the_guides_run(tmp_path, capsys):
    order = {name: place for place, name in enumerate(READ)}
    pages = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")], key=lambda page: order.get(page.stem, 99))
    lines = dict.fromkeys(line for page in pages for line in commands(page))
    failed = {}
    with opened_world(tmp_path) as (model, _, _):
        save_adapter(init_adapter(LoraConfig(r=4), model.config), "runs/lora/adapter", base_model="backbone")
        shutil.copytree("data/sst2", "data/squad")
        for run in ("a", "b"):
            shutil.copy("runs/mine/metrics.jsonl", f"runs/{run}")
        shutil.rmtree("runs/mine")
        Path("adapters.txt").write_text("runs/a/adapter\nruns/b/adapter\n")
        for line in lines:
            if not any(part in line for part in NOT_HERE) and main(arguments(line)) != 0:
                failed[line] = capsys.readouterr().err[-300:]
    assert failed == {}
    assert [part for part in NOT_HERE if not any(part in line for line in lines)] == []
