"""tenant.yaml: what a tenant sets of its own trains, scores and resumes; everything else is refused by name."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from long_cases import quick
from tiny_run import rows_of_text, run_config, run_folder, tokenizer, words, write_rows, write_tenants

from para_jax import train, train_tenants
from para_jax.cli import main, parse
from para_jax.cli.evaluate import config_of
from para_jax.config import RunConfig, load_config
from para_jax.data.tenants import of_most_memory, with_own_fields
from para_jax.evaluation.task_questions import own_configs
from para_jax.evaluation.tasks import task_of_run
from para_jax.reports.inspect import configs_here, data_report, many_lines
from para_jax.runs import plan as plans
from para_jax.runs.plan import plan_run

SIZES = {"acme": 20, "globex": 9, "hooli": 12}
OWN = {
    "acme": "train: {learning_rate: 1e-2, max_steps: 4, warmup_ratio: 0}\neval: {metric: exact_match, every: 2}\n",
    "globex": "eval: {metric: accuracy, choices: [w9, w9 w10, w30], limit: 4, test: true}\n",
    "hooli": "train: {num_epochs: 2}\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = run_folder(tmp_path_factory.mktemp("own"))
    write_tenants(folder / "tenants", SIZES)
    for name, text in OWN.items():
        (folder / "tenants" / name / "tenant.yaml").write_text(text)
    return folder


def tenants_config(folder, output, *overrides):
    return run_config(
        folder, f"data.tenants={folder / 'tenants'}", f"output_dir={output}", "train.rows_per_tenant=4",
        "adapter.summary=raw", "train.max_steps=3", *overrides,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(folder):
    return train_tenants(tenants_config(folder, folder / "run"))


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --------------------------------------------------------------------------------------------------------- what it sets


def test_a_dry_run_reads_rows_by_a_tenants_own_templates(tmp_path):
    write_rows(tmp_path / "acme" / "train.jsonl", [{"text": "w20", "label": "w9"}] * 2)
    (tmp_path / "acme" / "tenant.yaml").write_text("data: {prompt: '{text}', completion: '{label}'}\n")
    config = load_config(None, [f"data.tenants={tmp_path}"])
    assert many_lines(config, configs_here(config)) == ["data       1 tenants with 2 to 2 records, 2 in all"]


@pytest.mark.long
def test_each_tenant_trains_and_is_scored_as_its_file_says(whole):
    entries, run = whole.tenants, whole.output_dir
    found = {name: (entry["steps"], entry["metric"]) for name, entry in entries.items()}
    assert found == {"acme": (4, "exact_match"), "globex": (3, "accuracy"), "hooli": (6, "loss")}
    peaks = {name: max(row.get("learning_rate", 0) for row in metrics(run / name)) for name in SIZES}
    np.testing.assert_allclose(list(peaks.values()), [1e-2, 3e-2, 3e-2], rtol=1e-6)
    scored = {name: [row["step"] for row in metrics(run / name) if "validation_loss" in row] for name in SIZES}
    assert scored == {"acme": [0, 2, 4], "globex": [0, 3], "hooli": [0, 3, 6]}
    for when in ("test_before", "test_after"):
        assert [name for name in SIZES if entries[name][when] is not None] == ["globex"]
    own = load_config(run / "acme" / "config.yaml")
    assert (own.train.learning_rate, own.train.max_steps, own.eval.metric) == (1e-2, 4, "exact_match")
    assert load_config(run / "hooli" / "config.yaml").train.max_steps is None


@pytest.fixture
def mixed(folder, tmp_path):
    """The config of a tenant with labels, one with texts, and one whose tenant.yaml has its metric and columns."""
    data, prompts = tmp_path / "data", [row["prompt"] for row in rows_of_text(16, seed=5)]
    answers = {"labels": ["w9", "w10 w11"] * 8, "texts": [words(range(9, 10 + i)) for i in range(16)]}
    for name, given in answers.items():
        rows = [{"prompt": one, "completion": text} for one, text in zip(prompts, given, strict=True)]
        for split, part in (("train", rows), ("test", rows[:5])):
            write_rows(data / name / f"{split}.jsonl", part)
            write_rows(data / "own" / f"{split}.jsonl", [{"a": row["prompt"], "b": row["completion"]} for row in part])
    own = "data: {prompt: '{a}', completion: '{b}'}\neval: {metric: f1, max_new_tokens: 3}\n"
    (data / "own" / "tenant.yaml").write_text(own)
    found = "eval.metric=null", "eval.max_new_tokens=null", "eval.test=true"
    return tenants_config(folder, tmp_path / "run", *found, f"data.tenants={data}")


def asked(config, *more):
    options = ["--backbone", config.backbone.source, "--adapters", config.output_dir, "--allow-cpu", "--own", *more]
    return ["evaluate", *options, "--output", str(Path(config.output_dir).parent / "out")]


def test_evaluate_own_asks_each_tenant_as_its_run_does(mixed):
    trained = {one.name: one.test for one in plan_run(mixed).tenants}

    def of(metric=""):
        run = config_of(parse(asked(mixed, "--tasks", mixed.data.tenants + metric)))
        run = replace(run, data=replace(run.data, max_seq_length=None, truncate="left"))
        configs = own_configs(mixed.data.tenants + metric, list(trained), run)
        return {name: task_of_run(one, "test", tokenizer()) for name, one in configs.items()}

    for name, task in of().items():
        assert task == trained[name]
    assert [one.metric for one in trained.values()] == ["accuracy", "f1", "exact_match"]
    assert [(one.metric, one.also) for one in of(":loss").values()] == [("loss", ())] * 3


@pytest.mark.long
def test_evaluate_own_gives_the_scores_of_the_run(mixed, tmp_path):
    run = train_tenants(mixed)
    assert main(asked(mixed, "--tasks", mixed.data.tenants)) == 0
    who = ("base", *run.tenants)
    found = {name: json.loads((tmp_path / "out" / f"{name}.json").read_text())["results"] for name in who}
    for name, entry in run.tenants.items():
        for who, when in (("base", "test_base"), (name, "test")):
            record = entry["scores"][when]
            for metric in (record["metric"], "loss"):
                assert found[who][name][f"{metric},none"] == pytest.approx(record["values"][metric], rel=1e-4)


@pytest.mark.parametrize("name", quick(list(SIZES), "globex"))
def test_a_tenant_of_a_mixed_run_learns_and_scores_as_alone(name, whole, folder, tmp_path):
    """Alone with the config that the run wrote for it."""
    own = load_config(whole.output_dir / name / "config.yaml", [f"output_dir={tmp_path / 'run'}"])
    train(own)
    for value in ("loss", "learning_rate", "validation_loss", "validation_accuracy", "test_after_loss"):
        rows = [metrics(to) for to in (whole.output_dir / name, tmp_path / "run")]
        ours, theirs = ([(row["step"], row[value]) for row in found if value in row] for found in rows)
        assert len(ours) == len(theirs)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_without_a_file_or_in_a_lone_jsonl_file_the_runs_config_holds(folder, tmp_path):
    config = tenants_config(folder, tmp_path / "run")
    assert with_own_fields(config, tmp_path) is config
    assert with_own_fields(config, folder / "tenants" / "acme" / "train.jsonl") is config


def test_templates_and_what_a_value_resets(tmp_path):
    text = "data:\n  prompt: '{question}?'\n  completion: '{answer}'\neval: {metric: loss}\ntrain: {num_epochs: 3}\n"
    (tmp_path / "tenant.yaml").write_text(text)
    config = load_config(
        None, ["eval.metric=exact_match", "eval.also=[f1]", "eval.choices=[a, b]", "train.max_steps=9"]
    )
    own = with_own_fields(config, tmp_path)
    assert (own.data.prompt, own.data.completion) == ("{question}?", "{answer}")
    assert (own.eval.metric, own.eval.also, own.eval.choices) == ("loss", (), ())
    assert (own.train.max_steps, own.train.num_epochs) == (None, 3.0)
    (tmp_path / "tenant.yaml").write_text("eval: {patience: null}\ntrain: {max_steps: 5, num_epochs: 3}\n")
    own = with_own_fields(replace(config, eval=replace(config.eval, patience=4)), tmp_path)
    assert own.eval.patience is None and own.train.max_steps == 5 and own.eval.also == ("f1",)
    (tmp_path / "tenant.yaml").write_text("")
    assert with_own_fields(config, tmp_path) == config


def test_the_evaluation_that_needs_the_most_memory_chooses_the_mesh():
    config = load_config(None, ["eval.metric=loss"])
    own = [load_config(None, [f"eval.metric={metric}", f"eval.max_new_tokens={new}"]) for metric, new in
           (("loss", 900), ("exact_match", 60), ("squad", 80))]  # fmt: skip
    assert of_most_memory(config, own).eval.max_new_tokens == 80
    assert of_most_memory(config, own).eval.metric == "exact_match"
    assert of_most_memory(config, own[:1]) is config


# ---------------------------------------------------------------------------------------------------- what it can't set


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("train: {schedule: cosine}", "train.schedule can't be set for one tenant\n.*train.learning_rate"),
        ("eval: {metrc: loss}", "eval.metrc can't .*did you mean eval.metric"),
        ("eval: {batch_size: 4}", "eval.batch_size can't"),
        ("eval: {metric: best}", "eval.metric .*'best'"),
        ("eval: 3", "eval can't be set"),
        ("- eval", "not a mapping"),
    ],
)  # fmt: skip
def test_everything_else_is_refused_by_file_and_field(text, named, tmp_path):
    (tmp_path / "tenant.yaml").write_text(text)
    with pytest.raises(ValueError, match=named) as error:
        with_own_fields(RunConfig(), tmp_path)
    assert str(tmp_path / "tenant.yaml") in str(error.value) and "\x1b" not in str(error.value)
    assert len(str(error.value)) < 2000


def test_an_error_of_a_tenants_own_value_names_the_tenant(folder, tmp_path):
    write_rows(tmp_path / "data" / "acme" / "train.jsonl", rows_of_text(4, seed=1))
    write_rows(tmp_path / "data" / "zeta" / "train.jsonl", rows_of_text(4, seed=1))
    (tmp_path / "data" / "zeta" / "tenant.yaml").write_text("data: {prompt: '{promt}'}")
    config = tenants_config(folder, tmp_path / "run", f"data.tenants={tmp_path / 'data'}")
    for read in (lambda: plan_run(config), lambda: data_report(config)):
        with pytest.raises(ValueError, match="no field 'promt'") as error:
            read()
        assert "zeta" in str(error.value) and "acme" not in str(error.value)


def test_hosts_with_other_tenant_files_are_refused(folder, tmp_path, monkeypatch):
    """Rates and numbers of steps of a tenant that differ between hosts would train it to different weights."""
    told = []  # by each host, of what all must have in common
    monkeypatch.setattr(plans, "require_same", lambda what, value: told.append((what, json.dumps(value()))))
    for host, text in enumerate(
        ["train: {learning_rate: 1e-2}", "train: {learning_rate: 2e-2}", "train: {max_steps: 9}"]
    ):
        write_tenants(tmp_path / str(host), {"acme": 5, "globex": 5})
        (tmp_path / str(host) / "acme" / "tenant.yaml").write_text(text)
        config = tenants_config(folder, tmp_path / "run", f"data.tenants={tmp_path / str(host)}")
        plan_run(config)
    assert len({text for what, text in told if "tenant.yaml" in what}) == 3


# --------------------------------------------------------------------------------------------------------------- resume


def test_a_run_whose_tenant_file_changed_is_refused_by_tenant_and_field(whole, folder):
    config, file = tenants_config(folder, folder / "run"), folder / "tenants" / "acme" / "tenant.yaml"
    try:
        file.write_text("train: {learning_rate: 2e-2, max_steps: 4}\neval: {metric: exact_match, every: 2}\n")
        with pytest.raises(ValueError, match="holds another run\nchoose another output_dir") as error:
            train_tenants(config)
        first, _, *changed = str(error.value).splitlines()
        assert "acme" in first and changed == [
            "  train.learning_rate (0.01 there, 0.02 here)", "  train.warmup_ratio (0.0 there, 0.3 here)",
        ]  # fmt: skip
        file.unlink()
        with pytest.raises(ValueError, match="acme holds another run(.|\n)*eval.metric"):
            train_tenants(config)
        file.write_text(OWN["acme"].replace("max_steps: 4", "max_steps: 5"))  # a longer run is the same run
        assert train_tenants(config).tenants["acme"]["steps"] == 5
    finally:
        file.write_text(OWN["acme"])
