"""Runs every cell of the notebooks on a tiny backbone with few steps. Only what a user edits is changed."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import pytest
from golden_models import FIXTURES
from tiny_run import run_folder, tokenizer

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


def run_cells(name) -> dict:
    """The names of a notebook after its last cell, with the values of EDITS."""
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
    return space


EDITS = {
    "finetune": {"MODEL": "backbone", "OUTPUT": "out", "STEPS": 4, "TOKENS": 8},
    "many_tenants": {"MODEL": "backbone", "OUTPUT": "out", "STEPS": 3, "ROWS": 2, "TOKENS": 8},
    "tunix_grpo": {"MODEL": "backbone", "OUTPUT": "out", "STEPS": 2, "QUESTIONS": 1, "ANSWERS": 2, "ANSWER": 3},
}


each_notebook = pytest.mark.parametrize("name", EDITS)


@pytest.mark.long
@pytest.mark.parametrize("name", ["finetune", "many_tenants"])
def test_every_cell_of_a_notebook_runs(name, folder, capsys):
    space = run_cells(name)
    said = capsys.readouterr().out
    assert space["result"].output_dir == Path("out") and "base: " in said
    assert (
        ("PARA: 0" in said)
        if name == "finetune"
        else ("teams: " in said and re.search(r"Test (accuracy|exact_match): \d", said))
    )
    assert "loss -" not in said and "score -" not in said
    assert Path("out/adapter.zip" if name == "finetune" else "out-adapters.zip").is_file()


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_every_cell_of_the_notebook_for_tunix_runs(tmp_path, monkeypatch, capfd):
    pytest.importorskip("tunix")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FIXTURES / "qwen2", "backbone", ignore=lambda *_: ["variants"])
    tokenizer().save_pretrained("backbone")
    space = run_cells("tunix_grpo")
    said = capfd.readouterr().out
    assert len(space["history"]) == 2 and "the server ended with 0" in said
    assert len(re.findall(r"^5 \+ 3 = 8, \d+ \+ \d+ = w", said, re.MULTILINE)) == 4
    assert Path("out/adapter/adapter_config.json").is_file()


@pytest.fixture
def install(monkeypatch):
    """Runs the first cell of a notebook as Jupyter does. Returns what it did: pip's arguments, and "restart"."""
    from IPython.core.inputtransformer2 import TransformerManager

    did = []
    monkeypatch.setattr("os.kill", lambda process, signal: did.append("restart"))
    pip = SimpleNamespace(run_line_magic=lambda name, line: did.append(line))

    def run(name, source):
        (cell,) = [text for text, tags in cells(name) if "install" in tags]
        cell, count = re.subn(r"^SOURCE = \S+", f"SOURCE = {source!r}", cell, flags=re.MULTILINE)
        assert count == 1
        space = {"get_ipython": lambda: pip}
        exec(TransformerManager().transform_cell(cell), space)
        return [line.format_map(space) for line in did]

    return run


@each_notebook
def test_run_all_neither_installs_nor_restarts_where_para_jax_is_there(name, install):
    assert install(name, "/nowhere") == []


@each_notebook
@pytest.mark.parametrize("spec", [None, SimpleNamespace(origin=None)], ids=["nothing", "a folder of this name"])
@pytest.mark.parametrize(
    ("source", "installs"),
    [
        (str(FOLDER.parent), rf'install -q "{FOLDER.parent}\[\w+,\w+,\w+\]"'),
        ("git+https://host/para_jax", r'install -q "para_jax\[\w+,\w+,\w+\] @ git\+https://host/para_jax"'),
    ],
    ids=["a checkout", "git"],
)
def test_without_para_jax_the_first_cell_installs_it_and_restarts(name, spec, source, installs, install, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    pip, restart = install(name, source)
    assert re.fullmatch(installs, pip) and restart == "restart"
    with pytest.raises(FileNotFoundError, match="/nowhere: .*SOURCE"):
        install(name, "/nowhere")


@each_notebook
def test_a_notebook_uses_only_public_names_and_keeps_no_output(name):
    for source, tags in cells(name):
        for names in re.findall(r"from para_jax import ([\w, ]+)", source):
            assert {each.strip() for each in names.split(",")} <= set(dir(para_jax))
        assert "para_jax." not in source.replace("para_jax.foreign.tunix", "")
        assert ("install" in tags) == ("%pip" in source)
    assert all(not cell.get("outputs") for cell in json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"])


def test_no_notebook_is_left_out():
    assert {file.stem for file in FOLDER.glob("*.ipynb")} == set(EDITS)
