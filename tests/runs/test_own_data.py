"""configs/own-data.yaml on data that it says nothing about: metric, lengths and answers follow from the data."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import backbone_folder, rows_of_text, words, write_rows

from para_jax import train, train_tenants
from para_jax.config import RunConfig, load_config
from para_jax.data.records import Record
from para_jax.evaluation.scoring import Tasks
from para_jax.evaluation.tasks import EvalTask
from para_jax.reports.inspect import data_report, dry_run, folder_report
from para_jax.runs.plan import plan_run
from para_jax.runs.scoring import example_prompt
from para_jax.runs.tenants import Tenant

CONFIG = Path(__file__).parents[2] / "configs" / "own-data.yaml"
QUICK = (
    "adapter.r=4", "data.buckets=1", "mesh.data=1", "train.max_steps=2", "train.per_device_batch_size=8",
    "eval.every=2", "eval.batch_size=8", "eval.test_limit=6", "logging.report_to=[]",
    "runtime.compilation_cache=false", "runtime.allow_cpu=true",
)  # fmt: skip


def labelled(count):
    return [{"prompt": words([20 + i, 40, 50]), "completion": ("w9", "w10 w11", "w12")[i % 3]} for i in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own_data")
    backbone_folder(folder / "backbone")
    for split, count in (("train", 24), ("validation", 8), ("test", 9)):
        write_rows(folder / "labels" / f"{split}.jsonl", labelled(count))
        write_rows(folder / "texts" / f"{split}.jsonl", rows_of_text(count, seed=count)[:10])
    return folder


def own(folder, *overrides):
    return load_config(CONFIG, [f"backbone.source={folder / 'backbone'}", *QUICK, *overrides])


@pytest.mark.long
def test_labels_are_ranked_and_base_and_adapter_are_shown(folder, tmp_path, capsys):
    config = own(folder, f"data.train={folder / 'labels'}", f"output_dir={tmp_path / 'run'}")
    result = train(config)
    said = capsys.readouterr().err
    lengths = "half of the examples have up to 5 tokens, 95 % up to 6, the longest 6; data.max_seq_length=8"
    assert f"lengths: {lengths}\n" in said
    assert "metric: accuracy over the 3 different completions of the training data (eval.metric)\n" in said
    assert "scoring 6 test examples with the base model ..." in said
    assert result.metric == "accuracy" and result.best.startswith("best validation accuracy ")
    counts = {name: record["count"] for name, record in result.scores.items()}
    assert counts == {"validation_base": 8, "validation": 8, "test_base": 6, "test": 6}
    report = result.report()
    assert "5 of the 6 test examples:" in report and report.count("\n    base      ") == 5
    assert report.count("\n    adapter   w") == 5 and " w40 w50\n" in report
    assert all(block in folder_report(tmp_path / "run") for block in report.split("\n\n"))
    again = train(config)
    assert again.scores == result.scores


def test_without_validation_data_some_training_rows_are_held_out(folder, tmp_path, capsys):
    write_rows(tmp_path / "train.jsonl", labelled(24))
    config = own(folder, f"data.train={tmp_path}", f"output_dir={tmp_path / 'run'}")
    assert "22 examples; padded to" in (said := data_report(config)) and said.endswith("; also 2 validation examples")
    result = train(config)
    said = capsys.readouterr().err
    assert "training data: 22 examples\n" in said
    assert (
        result.scores["validation"]["count"] == 2
        and "validation_loss" in (result.output_dir / "metrics.jsonl").read_text()
    )
    assert train(config).best == result.best  # it has ended, on the same rows
    with pytest.raises(ValueError, match=r"data.validation_split \(0.1 there, 0.2 here\)"):
        train(own(folder, f"data.train={tmp_path}", f"output_dir={tmp_path / 'run'}", "data.validation_split=0.2"))


def test_the_config_that_a_run_writes_trains_it_again_to_the_same_bits(folder, tmp_path):
    """Also where its data are not looked at: metric, choices, lengths of answers and the rows of a step are decided."""
    config = own(folder, f"data.train={folder / 'labels'}", f"output_dir={tmp_path / 'run'}", "adapter.summary=raw")
    first = train(config)
    written = load_config(tmp_path / "run" / "config.yaml", [f"output_dir={tmp_path / 'again'}"])
    assert (written.eval.metric, len(written.eval.choices), written.train.batch_size) == ("accuracy", 3, 8)
    again = train(written)
    assert again.scores == first.scores
    for mine, other in zip(jax.tree.leaves(again.adapter), jax.tree.leaves(first.adapter), strict=True):
        np.testing.assert_array_equal(mine, other)
    assert load_config(tmp_path / "again" / "config.yaml") == written
    assert train(config).best == first.best  # what the first config left open is read from there


def test_each_tenant_holds_rows_of_its_own_out_unless_it_has_validation_data(folder, tmp_path, capsys):
    for name in ("acme.jsonl", "globex/train.jsonl", "dev.jsonl"):
        write_rows(tmp_path / "tenants" / name, labelled(30))
    write_rows(tmp_path / "tenants" / "globex" / "validation.jsonl", labelled(5))
    overrides = "data.train=null", f"data.tenants={tmp_path / 'tenants'}", "train.rows_per_tenant=2"
    config = own(folder, *overrides, "eval.test=false", f"output_dir={tmp_path / 'run'}")
    result = train_tenants(config)
    said = capsys.readouterr().err
    assert "is not read" not in said
    counts = {name: (one["examples"], one["scores"]["validation"]["count"]) for name, one in result.tenants.items()}
    assert counts == {"acme": (27, 3), "globex": (30, 5), "dev": (27, 3)}


@pytest.mark.long
def test_other_texts_are_written_in_packed_rows_too(folder, tmp_path, capsys):
    options = f"data.train={folder / 'texts'}", "data.packing=true", "adapter.summary=raw"
    config = own(folder, *options, f"output_dir={tmp_path / 'run'}")
    result = train(config)
    said = capsys.readouterr().err
    assert "metric: exact_match and f1 of written answers of up to 16 tokens (eval.metric, eval.max_new_tokens)" in said
    assert "into 1 rows of 512 tokens" in said
    assert {"exact_match", "f1", "loss"} <= result.scores["test"]["values"].keys()


def test_free_text_is_chosen_by_loss_and_reported_with_f1(folder, tmp_path, monkeypatch, capsys):
    """One lucky match of an early step would keep the worse adapter, and no match at all says nothing."""
    for split, count in (("train", 9), ("validation", 6)):
        rows = [{"prompt": f"w{20 + i}", "completion": words(range(i + 9, i + 21))} for i in range(count)]
        write_rows(tmp_path / "data" / f"{split}.jsonl", rows)
    kept, real = [], Tasks.scores

    def scores(tasks, stack, slots):
        found = real(tasks, stack, slots)
        kept.extend(found.values())
        return found

    monkeypatch.setattr(Tasks, "scores", scores)
    options = f"data.train={tmp_path / 'data'}", "train.max_steps=4", "eval.every=2", "eval.test=false"
    config = own(folder, *options, "eval.max_new_tokens=4", f"output_dir={tmp_path / 'run'}")
    result = train(config)
    said = capsys.readouterr().err
    assert "metric: loss, because the completions are long and nearly all different; also f1 of written" in said
    assert "eval.max_new_tokens=4 has no effect" not in said
    assert result.metric == "loss" and result.best_score == max(score.score for score in kept[1:])
    values = result.scores["validation"]["values"]
    assert values.keys() == {"loss", "loss_stderr", "f1", "f1_stderr"} and "validation_f1" in said
    assert "f1" in result.report() and result.best.startswith("best validation loss")
    assert (
        train(replace(config, output_dir=str(tmp_path / "given"), eval=replace(config.eval, metric="f1"))).metric
        == "f1"
    )


@pytest.mark.long
def test_each_tenant_has_a_metric_of_its_own(folder, tmp_path, capsys):
    for name in ("labels", "texts"):
        for file in (folder / name).glob("*.jsonl"):
            write_rows(
                tmp_path / "tenants" / name / file.name, labelled(12) if name == "labels" else rows_of_text(9, 1)
            )
    options = f"data.tenants={tmp_path / 'tenants'}", "data.validation=b.jsonl", "train.rows_per_tenant=4"
    result = train_tenants(own(folder, *options, f"output_dir={tmp_path / 'run'}"))
    said = capsys.readouterr().err
    assert "training data (eval.metric): labels\n" in said and "eval.max_new_tokens): texts\n" in said
    assert "the longest 14; data.max_seq_length=16" in said
    assert {name: entry["metric"] for name, entry in result.tenants.items()} == {
        "labels": "accuracy", "texts": "exact_match"
    }  # fmt: skip
    assert all(entry["scores"]["test"]["count"] == 6 for entry in result.tenants.values())
    assert result.report() in folder_report(tmp_path / "run")


def test_a_dry_run_assumes_a_length_and_inspect_finds_it(folder, capsys):
    config = own(folder, f"data.train={folder / 'labels'}")
    assert "8 rows of at most 512 tokens" in dry_run(config) and "assumed" in dry_run(config)
    assert data_report(config) and "data.max_seq_length=8" in capsys.readouterr().err
    swept = own(folder, f"data.train={folder / 'labels'}", "sweep.seed=[0, 1]")
    assert "of each tenant" in dry_run(swept) and "of each tenant" not in dry_run(config)
    methods = dry_run(own(folder, f"data.train={folder / 'labels'}", "sweep.method=[para, ia3]")).split("\n\n")
    assert [text.splitlines()[0] for text in methods] == ["para", "ia3"] and "; ia3 on k_proj" in methods[1]


def test_a_dry_run_counts_the_rows_of_the_tenants_and_the_devices_of_the_mesh(folder, tmp_path):
    def said(*overrides):
        return dry_run(own(folder, "data.train=null", f"data.tenants={tmp_path / 'tenants'}", *overrides))

    many = "train.rows_per_tenant=4", "train.per_device_batch_size=64"
    assert "64 rows of" in said(*many)  # they are not there yet
    for name in ("acme", "globex", "initech"):
        write_rows(tmp_path / "tenants" / f"{name}.jsonl", labelled(8))
    assert "12 rows of" in said(*many) and "devices" not in said(*many)
    assert "for 64 devices, and this machine has 8" in said("mesh.data=64", "train.rows_per_tenant=4")
    uneven = said("mesh.data=8", "train.rows_per_tenant=4", "train.batch_size=12")
    assert "12 rows of" in uneven and "8 devices can't split them evenly" in uneven


def test_inspect_marks_where_para_reads_a_prompt_and_says_nothing_of_other_adapters(folder):
    data = f"data.train={folder / 'labels'}"
    assert "PARA reads the prompt at its last token" in data_report(own(folder, data))
    for other in ("adapter.pooler=mean", "adapter.method=lora"):
        assert "PARA reads" not in data_report(own(folder, data, *["adapter.r=4", other]))


def test_the_length_of_packed_rows_is_the_one_that_is_said(folder, tmp_path, capsys):
    packed = "data.packing=true", "adapter.summary=raw", f"output_dir={tmp_path / 'run'}"
    plan = plan_run(own(folder, f"data.train={folder / 'labels'}", *packed))
    assert plan.buckets[0].length == plan.config.data.max_seq_length == 512
    said = "lengths: half of the examples have up to 5 tokens, 95 % up to 6, the longest 6; data.max_seq_length=512\n"
    assert said in capsys.readouterr().err


def test_the_model_card_asks_in_the_form_of_the_data(tmp_path):
    """An adapter that learnt chats answers a plain text with nothing."""
    chat, text = [{"role": "user", "content": "w3"}], "w3"
    for prompt, wanted in ((chat, [{"role": "user", "content": "a prompt"}]), (text, "a prompt")):
        task = EvalTask("own", [Record(prompt, "w9", ("w9",), None, "")])
        for validation, test in ((task, None), (None, task)):
            tenant = Tenant("", RunConfig(), None, None, validation, test)
            assert example_prompt(tenant) == wanted
    assert example_prompt(Tenant("", RunConfig(), None, None, None, None)) == "a prompt"


@pytest.mark.parametrize("second", ["w5", "w6"])
def test_the_model_card_asks_with_the_system_message_that_all_chats_share(second):
    def record(system):
        return Record(
            [{"role": "system", "content": system}, {"role": "user", "content": "w3"}], "w9", ("w9",), None, ""
        )

    asked = example_prompt(Tenant("", RunConfig(), None, None, EvalTask("own", [record("w5"), record(second)]), None))
    system = [{"role": "system", "content": "w5"}] if second == "w5" else []
    assert asked == [*system, {"role": "user", "content": "a prompt"}]
