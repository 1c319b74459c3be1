"""Tenants that are added to a run later learn what a run of them alone learns, and change nothing of the others."""

import json
import shutil
from pathlib import Path

import pytest
from long_cases import quick
from tiny_run import rows_of_text, run_config, run_folder, write_rows, write_tenants

from para_jax import train_tenants
from para_jax.config import load_config
from para_jax.reports.inspect import folder_report
from para_jax.runs import folder as folders
from para_jax.runs.parts import parts_of_run
from para_jax.training.log import TIMES
from para_jax.training.stop import Stopped, StopSignal


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return run_folder(tmp_path_factory.mktemp("parts"))


def tenants_config(backbone, data, output, *overrides):
    """Tenants take turns in one slot, so that all runs here share one compiled step."""
    return run_config(
        backbone, f"data.tenants={data}", f"output_dir={output}", "adapter.summary=raw", "train.rows_per_tenant=4",
        "train.max_steps=3", "eval.every=2", "train.tenants_at_once=1", "train.schedule=constant",
        "train.warmup_ratio=0", *overrides,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(backbone):
    """A finished run of two tenants."""
    write_tenants(backbone / "two", {"acme": 9, "globex": 8})
    train_tenants(tenants_config(backbone, backbone / "two", backbone / "whole"))
    return backbone / "whole"


@pytest.fixture
def grown(backbone, whole, tmp_path):
    """The config of a copy of the finished run, whose data has a third tenant now."""
    shutil.copytree(backbone / "two", tmp_path / "data")
    config = tenants_config(backbone, tmp_path / "data", tmp_path / "run")
    shutil.copytree(whole, tmp_path / "run")
    for file in (tmp_path / "run").glob("**/config.yaml"):
        text = file.read_text().replace(str(backbone / "two"), str(tmp_path / "data"))
        file.write_text(text.replace(str(whole), str(tmp_path / "run")))
    write_tenants(tmp_path / "data", {"bishop": 7})
    return config


def contents(folder, times=False):
    """Every file below a folder; of the logs what does not depend on the time."""

    def content(file):
        if file.name != "metrics.jsonl" or times:
            return file.read_bytes()
        rows = map(json.loads, file.read_text().splitlines())
        return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]

    files = [file for file in sorted(Path(folder).glob("**/*")) if file.is_file()]
    return {str(file.relative_to(folder)): content(file) for file in files}


def learnt(folder, name):
    """What a tenant leaves, without the places of its data."""
    found = {file: content for file, content in contents(folder / name).items() if file != "config.yaml"}
    return found, json.loads((folder / "tenants.json").read_text())[name]


@pytest.mark.long
@pytest.mark.parametrize("at_once", quick(["1", "null"], "1"))
def test_a_tenant_that_is_added_learns_what_it_learns_alone_and_leaves_the_others_as_they_are(
    at_once, backbone, grown, tmp_path
):
    options = f"train.tenants_at_once={at_once}"
    if at_once == "null":
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "data" / "bishop").rename(tmp_path / "bishop")
        train_tenants(tenants_config(backbone, tmp_path / "data", tmp_path / "run", options))
        (tmp_path / "bishop").rename(tmp_path / "data" / "bishop")
    before = {name: contents(tmp_path / "run" / name, times=True) for name in ("acme", "globex")}
    of_run = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    entries = json.loads((tmp_path / "run" / "tenants.json").read_text())
    found = train_tenants(tenants_config(backbone, tmp_path / "data", tmp_path / "run", options))
    assert list(found.tenants) == ["acme", "bishop", "globex"] and found.tenants["bishop"]["ended"] == "done"
    assert list(json.loads((tmp_path / "run" / "tenants.json").read_text())) == list(found.tenants)
    for name, files in before.items():
        assert contents(tmp_path / "run" / name, times=True) == files and found.tenants[name] == entries[name]
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == of_run
    shutil.copytree(tmp_path / "data" / "bishop", tmp_path / "alone" / "bishop")
    train_tenants(tenants_config(backbone, tmp_path / "alone", tmp_path / "only", options))
    assert learnt(tmp_path / "run", "bishop") == learnt(tmp_path / "only", "bishop")
    assert "3 tenants of" in folder_report(tmp_path / "run") and "not ended" not in folder_report(tmp_path / "run")
    again = train_tenants(tenants_config(backbone, tmp_path / "data", tmp_path / "run", options))
    assert again.tenants == found.tenants


@pytest.mark.long
def test_an_addition_that_was_stopped_resumes_with_its_bits_and_a_second_one_follows(
    backbone, grown, tmp_path, monkeypatch
):
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(StopSignal, "reached", lambda self, step: step == 1)
        train_tenants(grown)
    assert "bishop" not in json.loads((tmp_path / "run" / "tenants.json").read_text())
    write_rows(tmp_path / "data" / "carol.jsonl", rows_of_text(6, seed=9))  # waits until bishop has ended
    found = train_tenants(grown)
    assert list(found.tenants) == ["acme", "bishop", "carol", "globex"]
    assert [part.names for part in parts_of_run(grown, list(found.tenants))] == [
        ["acme", "globex"], ["bishop"], ["carol"],
    ]  # fmt: skip
    shutil.copytree(tmp_path / "data" / "bishop", tmp_path / "alone" / "bishop")
    train_tenants(tenants_config(backbone, tmp_path / "alone", tmp_path / "only"))
    assert learnt(tmp_path / "run", "bishop") == learnt(tmp_path / "only", "bishop")


@pytest.mark.long
def test_a_run_that_was_stopped_ends_before_the_tenants_that_were_added(backbone, whole, tmp_path, monkeypatch):
    shutil.copytree(backbone / "two", tmp_path / "data")
    config = tenants_config(backbone, tmp_path / "data", tmp_path / "run")
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(StopSignal, "reached", lambda self, step: step == 2)
        train_tenants(config)
    write_tenants(tmp_path / "data", {"bishop": 7})
    found = train_tenants(config)
    assert {entry["steps"] for entry in found.tenants.values()} == {3}
    for name in ("acme", "globex"):
        assert learnt(tmp_path / "run", name) == learnt(whole, name)


@pytest.mark.long
def test_a_longer_run_continues_every_part_with_the_bits_of_a_long_one(backbone, grown, tmp_path):
    train_tenants(grown)
    found = train_tenants(tenants_config(backbone, tmp_path / "data", tmp_path / "run", "train.max_steps=5"))
    assert {entry["steps"] for entry in found.tenants.values()} == {5}
    shutil.copytree(tmp_path / "data" / "bishop", tmp_path / "alone" / "bishop")
    train_tenants(tenants_config(backbone, tmp_path / "alone", tmp_path / "only", "train.max_steps=5"))
    weights = [learnt(tmp_path / to, "bishop")[0]["adapter/adapter_model.safetensors"] for to in ("run", "only")]
    assert weights[0] == weights[1]


def test_tenants_join_a_part_of_which_nothing_is_saved(backbone, grown, tmp_path, monkeypatch):
    def killed(**arguments):
        raise RuntimeError("killed")

    from para_jax.runs import train

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
        patched.setattr(train, "load_backbone", killed)
        train_tenants(grown)
    write_tenants(tmp_path / "data", {"aaron": 5})
    names = ["aaron", "acme", "bishop", "globex"]
    assert [part.names for part in parts_of_run(grown, names)] == [["acme", "globex"], ["aaron", "bishop"]]
    fresh = tenants_config(backbone, tmp_path / "data", tmp_path / "fresh")
    folders.claim_folder(fresh)
    assert [part.names for part in parts_of_run(fresh, names)] == [names]
    (tmp_path / "fresh" / "acme").mkdir()
    (tmp_path / "fresh" / "acme" / "config.yaml").touch()
    (tmp_path / "fresh" / "learning_rates" / "1").mkdir(parents=True)  # trials without the new ones have begun
    assert [part.names for part in parts_of_run(fresh, names)] == [["acme"], ["aaron", "bishop", "globex"]]


def test_a_tenant_whose_data_is_gone_is_named_and_nothing_is_written(grown, tmp_path):
    shutil.rmtree(tmp_path / "data" / "acme")
    before = contents(tmp_path / "run", times=True)
    with pytest.raises(ValueError, match=r"run holds tenants that .*data lacks: acme\n.*another output_dir"):
        train_tenants(grown)
    assert contents(tmp_path / "run", times=True) == before
    shutil.rmtree(tmp_path / "run" / "acme")
    write_tenants(tmp_path / "data", {"acme": 9})
    with pytest.raises(ValueError, match="run has lost the folders of acme"):
        train_tenants(grown)


def test_a_tenants_own_config_is_that_of_a_run_of_it_alone(grown, tmp_path):
    train_tenants(grown)
    own = load_config(tmp_path / "run" / "bishop" / "config.yaml")
    assert own.data.tenants is None and Path(own.data.train or "").name == "bishop"
