"""train(config, data=...): the run of the same files, resumed with the same rows, and described without them."""

from dataclasses import replace

import pandas as pd
import pytest
from tiny_run import rows_of_text, run_config, run_folder, tokenizer

from para_jax import load_config, train, train_tenants
from para_jax.cli import main
from para_jax.data.given import with_data
from para_jax.evaluation.tasks import task_of_run
from para_jax.reports.inspect import folder_report

SPLITS = {"train": rows_of_text(20, seed=1), "validation": rows_of_text(8, seed=2), "test": rows_of_text(5, seed=3)}
SHORT = ("train.max_steps=2", "eval.every=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return run_folder(tmp_path_factory.mktemp("runs"))


def config_of(folder, name, *overrides):
    return run_config(folder, "data.train=null", f"output_dir={folder / name}", *SHORT, *overrides)


def weights(result):
    return (result.output_dir / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.long
def test_a_run_on_a_data_frame_is_that_of_the_same_files_and_resumes(folder, capsys):
    frames = {split: pd.DataFrame(rows) for split, rows in SPLITS.items()}
    result = train(config_of(folder, "frames"), frames)
    files = train(run_config(folder, f"output_dir={folder / 'files'}", *SHORT))
    assert weights(result) == weights(files) and result.best_score == files.best_score
    saved = load_config(result.output_dir / "config.yaml", ["train.max_steps=4"])
    assert train(saved, SPLITS).step == 4
    with pytest.raises(ValueError, match="training data"):
        train(replace(saved, train=replace(saved.train, max_steps=6)), SPLITS | {"train": SPLITS["train"][1:]})
    task = task_of_run(replace(saved, data=with_data(saved.data, SPLITS)), "validation", tokenizer())
    assert [record.prompt for record in task.records] == [row["prompt"] for row in SPLITS["validation"]]
    # from the command line, the rows are not there
    assert "data from Python" in folder_report(result.output_dir)
    for command in (["evaluate"], ["train"]):
        capsys.readouterr()
        assert main([*command, str(result.output_dir / "config.yaml"), "runtime.allow_cpu=true"]) != 0
        assert "the data of this run came from Python" in capsys.readouterr().err
    assert main(["train", str(result.output_dir / "config.yaml"), "--dry-run"]) in (0, None)
    assert "from Python" in capsys.readouterr().out


@pytest.mark.long
def test_tenants_and_a_sweep_take_rows(folder):
    config = config_of(folder, "tenants", "train.rows_per_tenant=4")
    result = train_tenants(config, {"acme": SPLITS, "globex": SPLITS["train"][:9]})
    assert {name: entry["examples"] for name, entry in result.tenants.items()} == {"acme": 20, "globex": 9}
    assert "2 tenants from Python\n" in folder_report(result.output_dir)
    saved = load_config(result.output_dir / "acme" / "config.yaml")
    assert saved.data.train == "<python>/acme"
    swept = train_tenants(config_of(folder, "sweep", "sweep.seed=[0,1]"), SPLITS["train"])
    assert len(swept.tenants) == 2


def test_a_wrong_row_stops_the_run_before_anything_is_written(folder):
    config = config_of(folder, "wrong")
    with pytest.raises(ValueError, match=r'^data\["validation"\] row 1: completion is empty'):
        train(config, SPLITS | {"validation": [*SPLITS["validation"][:1], {"prompt": "w9", "completion": ""}]})
    assert not (folder / "wrong").exists()
