"""Runs every cell of the notebooks on a tiny backbone with few steps. Only what a user edits is changed."""

import json
import re
from pathlib import Path

import matplotlib
import pytest
from tiny_run import run_folder

import para_jax

FOLDER = Path(__file__).parents[1] / "notebooks"
FIRST = ("runtime.allow_cpu=true", "runtime.compilation_cache=false", "mesh.data=1", "logging.report_to=[]",
         "eval.max_new_tokens=4", "data.buckets=1")  # fmt: skip
SMALL = {
    "eval.every=20": "eval.every=2",
    "load_config(None, [": f"load_config(None, [*{FIRST!r}, ",
}


def cells(name):
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text())
    assert notebook["nbformat"] == 4
    return [
        ("".join(cell["source"]), cell["metadata"].get("tags", []))
        for cell in notebook["cells"]
        if cell["cell_type"] == "code"
    ]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    folder = run_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    return folder


EDITS = {
    "finetune": {"MODEL": "backbone", "OUTPUT": "out", "STEPS": 4, "TOKENS": 8},
    "many_tenants": {"MODEL": "backbone", "OUTPUT": "out", "STEPS": 3, "ROWS": 2, "TOKENS": 8},
}


@pytest.mark.long
@pytest.mark.parametrize("name", EDITS)
def test_every_cell_of_a_notebook_runs(name, folder, capsys):
    matplotlib.use("agg")
    space: dict = {}
    for source, tags in cells(name):
        if "install" in tags:
            continue
        if "edit" in tags:
            for field, value in EDITS[name].items():
                source, count = re.subn(rf"^{field} = .*$", f"{field} = {value!r}", source, flags=re.MULTILINE)
                assert count == 1, field
        if "train" in tags:
            for text, small in SMALL.items():
                assert text in source or name != "finetune", text
                source = source.replace(text, small)
        exec(compile(source, name, "exec"), space)
    said = capsys.readouterr().out
    assert space["result"].output_dir == Path("out") and "base: " in said
    assert (
        ("PARA: 0" in said)
        if name == "finetune"
        else ("teams: " in said and re.search(r"Test (accuracy|exact_match): \d", said))
    )
    assert "loss -" not in said and "score -" not in said
    assert Path("out/adapter.zip" if name == "finetune" else "out-adapters.zip").is_file()


@pytest.mark.parametrize("name", EDITS)
def test_a_notebook_uses_only_public_names_and_keeps_no_output(name):
    for source, tags in cells(name):
        for names in re.findall(r"from para_jax import ([\w, ]+)", source):
            assert {each.strip() for each in names.split(",")} <= set(dir(para_jax))
        assert "para_jax." not in source and ("install" in tags) == ("%pip" in source)
    assert all(not cell.get("outputs") for cell in json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"])


def test_no_notebook_is_left_out():
    assert {file.stem for file in FOLDER.glob("*.ipynb")} == set(EDITS)
