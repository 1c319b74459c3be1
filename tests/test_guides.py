"""The Python code of the guides runs, page by page and block after block, on a tiny model. tests/adapters and
tests/scripts run the code of adding_a_method.md and other_servers.md."""

import contextlib
import re
from pathlib import Path

import matplotlib
import pytest
from guide_world import in_world, opened_world
from running_server import running
from tiny_run import rows_of_text

from para_jax import Engine

ROOT = Path(__file__).parents[1]
ELSEWHERE = {"adding_a_method", "other_servers"}
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
