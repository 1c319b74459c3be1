"""A run's folder: it holds one run, one process at a time writes there, and a kill leaves nothing that stays."""

import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_run import rows_of_text, run_config, run_folder, write_rows

from para_jax import train
from para_jax.cli import main
from para_jax.config import RunConfig, load_config, save_config
from para_jax.data.records import Record
from para_jax.evaluation.tasks import EvalTask
from para_jax.runs import train as runs
from para_jax.runs.folder import (
    check_folder,
    check_tenants,
    claim_folder,
    decided,
    identity,
    locked_folder,
    with_decided,
)
from para_jax.runs.plan import run_digests
from para_jax.runs.tenants import Tenant, tenant_configs
from para_jax.training.checkpoint import differences


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return run_folder(tmp_path_factory.mktemp("run_folder"))


@pytest.fixture
def config(folder, tmp_path):
    return run_config(folder, f"output_dir={tmp_path / 'run'}")


FREE = (
    "output_dir=elsewhere", "logging.every=7", "runtime.allow_cpu=false", "train.max_steps=100", "train.num_epochs=2",
    "backbone.attention=plain", "train.remat=block", "eval.batch_size=3", "mesh.fsdp=4", "mesh.tensor=2",
)  # fmt: skip


def test_where_and_how_long_a_run_computes_makes_it_no_other_run(config, folder):
    """Those fields change a run's numbers by rounding alone."""
    assert identity(config) == identity(run_config(folder, *FREE))
    for other in ("train.weight_decay=0.5", "eval.limit=3", "adapter.r=5", "train.per_device_batch_size=4"):
        assert identity(config) != identity(run_config(folder, other))
    rows = [run_config(folder, "train.batch_size=8", f"train.per_device_batch_size={rows}") for rows in (8, 2)]
    assert identity(rows[0]) == identity(rows[1])  # they say how a step is cut


def test_what_a_config_leaves_open_is_what_the_first_start_decided(config):
    open_fields = ["train.batch_size", "eval.max_new_tokens", "data.max_seq_length", "eval.metric"]
    given = replace(config, eval=replace(config.eval, metric=None, max_new_tokens=None))
    held = with_decided(given, {"eval.metric": "accuracy", "eval.choices": ["a", "b"], "train.batch_size": 24})
    assert (held.eval.metric, held.eval.choices, held.train.batch_size) == ("accuracy", ("a", "b"), 24)
    claim_folder(held)
    values = decided(given)
    assert {*open_fields} < values.keys() and with_decided(given, values) == held
    check_folder(given)
    with pytest.raises(ValueError, match=r"eval.metric \('accuracy' there, 'loss' here\)"):
        check_folder(replace(given, eval=replace(given.eval, metric="loss")))


def test_another_run_is_refused_with_the_advice_first_and_a_line_for_each_difference(config, tmp_path, capsys):
    claim_folder(config)
    save_config(config, tmp_path / "run.yaml")
    assert main(["train", str(tmp_path / "run.yaml"), "train.weight_decay=0.5", "eval.limit=3"]) == 2
    said = capsys.readouterr().err
    first, advice, *lines = said[said.index("para-jax: error") :].splitlines()
    assert first == f"para-jax: error: output_dir {config.output_dir} holds another run"
    assert "another output_dir" in advice and f"{config.output_dir}/config.yaml" in advice
    assert lines == ["  train.weight_decay (0.1 there, 0.5 here)", "  eval.limit (None there, 3 here)"]


def test_a_folder_with_other_files_is_refused_and_left_as_it_is(config):
    folder = Path(config.output_dir)
    for foreign in (folder, folder / "notes.txt"):
        shutil.rmtree(folder, ignore_errors=True)
        foreign.parent.mkdir(exist_ok=True)
        foreign.write_text("mine")
        for claim in (claim_folder, lambda config: locked_folder(config).__enter__()):
            with pytest.raises(ValueError, match="is not a run folder"):
                claim(config)
        assert foreign.read_text() == "mine" and not (folder / ".lock").exists()
        foreign.unlink()


def test_what_a_killed_claim_leaves_is_not_taken_for_a_run(config):
    folder = Path(config.output_dir)
    folder.mkdir()
    (folder / ".config.yaml.0a1b2c3d").write_text("cut off")
    with locked_folder(config):
        claim_folder(config)
    assert load_config(folder / "config.yaml") == config


# ------------------------------------------------------------------------------------------------ one process at a time


def test_a_second_run_in_the_folder_is_refused_by_name_while_the_first_one_lasts(config, monkeypatch):
    refused = []

    def meanwhile(*arguments, **settings):
        with pytest.raises(ValueError, match=f"output_dir {config.output_dir}: another process is writing") as error:
            train(config)
        refused.append(error)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(runs, "fit", meanwhile)
        train(config)
    assert len(refused) == 1

    def ended(*arguments):
        raise RuntimeError("the first one has ended")

    for _ in range(2):
        with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="the first one has ended"):
            patched.setattr(runs, "fit", ended)
            train(config)


@pytest.mark.long
def test_the_lock_of_a_killed_process_is_gone(config):
    code = (
        "import sys, time; from para_jax.config import load_config; from para_jax.runs.folder import locked_folder\n"
        "config = load_config(None, ['output_dir=' + sys.argv[1]])\n"
        "with locked_folder(config): print('locked', flush=True), time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, config.output_dir], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout and child.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match="another process is writing"), locked_folder(config):
            pass
        child.send_signal(signal.SIGKILL)
        child.wait()
        with locked_folder(config):
            pass
    finally:
        child.kill()


# -------------------------------------------------------------------------------------------------------- what it is of


def tenant(examples, validation=None, test=None, name=""):
    """A tenant with only what a digest is of."""
    data, order = SimpleNamespace(examples=examples), SimpleNamespace()
    return Tenant(name, RunConfig(), data, order, validation, test)


def test_a_digest_says_which_part_of_the_run_is_another():
    task, other = (EvalTask("test", [Record("p", c, (c,), None, "file:1")], "accuracy", ("x", "y")) for c in "xy")
    examples = [([1, 2], [3]), ([4], [5, 6])]
    found = run_digests({"backbone": "b"}, [tenant(examples, task, task)])

    def changed(*data, backbone="b"):
        return differences(found, run_digests({"backbone": backbone}, [tenant(*data)]))

    same = "(1 examples, not the same)"
    assert changed(examples, task, task) == ""
    assert changed(examples, task, task, backbone="c") == "another backbone"
    assert changed(examples[:1], task, task) == "other training data (2 examples there, 1 here)"
    assert changed([([1], [2, 3]), ([4], [5, 6])], task, task) == "other training data (2 examples, not the same)"
    assert changed(examples, other, task) == f"other validation data {same}"
    assert changed(examples, task, None) == "other test data (1 examples there, 0 here)"
    assert changed(examples, task._replace(choices=("x", "z")), task) == f"other validation data {same}"
    two = [run_digests({}, [tenant(examples, t, name=name) for name in ("acme", "globex")]) for t in (task, other)]
    assert differences(*two) == f"other validation data of acme {same}, other validation data of globex {same}"


def test_a_run_that_has_begun_takes_no_other_tenants(config):
    many = replace(config, data=replace(config.data, tenants="tenants"))
    for name in ("acme", "globex"):
        (Path(config.output_dir) / name).mkdir(parents=True)
        save_config(config, Path(config.output_dir) / name / "config.yaml")
    check_tenants(many, ["acme", "globex"])
    check_tenants(many, ["acme", "globex", "new"])  # nothing is saved yet
    with pytest.raises(ValueError, match="holds tenants that tenants lacks: .'globex'.\nput their data back"):
        check_tenants(many, ["acme"])
    (Path(config.output_dir) / "checkpoints" / "4").mkdir(parents=True)
    check_tenants(many, ["acme", "globex"])
    with pytest.raises(ValueError, match="has begun without .'new'.\ntrain new tenants in a run of their own"):
        check_tenants(many, ["acme", "globex", "new"])


def test_the_adapter_of_a_tenant_is_not_trained_from_the_start_in_its_place(folder, tmp_path):
    """Its folder has a config, but no checkpoints: they are the run's, which is to be made longer instead."""
    write_rows(tmp_path / "tenants" / "acme" / "train.jsonl", rows_of_text(8, seed=1))
    many = run_config(folder, f"data.tenants={tmp_path / 'tenants'}", f"output_dir={tmp_path / 'run'}")
    held = tenant_configs(many)["acme"]
    own = replace(held, train=replace(held.train, max_steps=9))
    for config, name in ((many, "run"), (held, "run/acme")):
        (tmp_path / name).mkdir()
        save_config(config, tmp_path / name / "config.yaml")
        (tmp_path / name / ".lock").touch()
    with pytest.raises(ValueError, match=f"acme holds a tenant of the run .*\ntrain {tmp_path}/run/config.yaml to"):
        with locked_folder(own):
            pass
