"""`para-jax evaluate` into a folder: our own tasks and lm-eval's, from the command to the table."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import tiny_scores
from quick_compiler import own_flags
from tiny_harness import command, lines, results
from tiny_run import run_config, words, write_rows

from para_jax import EvalOptions, load_adapter, load_backbone, load_tokenizer
from para_jax.backbone.load import load_model_config
from para_jax.cli import main
from para_jax.config import save_config
from para_jax.data.records import read_records
from para_jax.evaluation.answers import Answerer
from para_jax.evaluation.task_questions import read_own_tasks
from para_jax.evaluation.tasks import EvalTask


def test_a_run_leaves_lm_evals_layout_for_each_adapter_and_a_table(whole):
    found = results(whole)
    for name, made in found.items():
        assert set(made["results"]) == {"labels", "free", "tiny_pick", "tiny_write"}
        assert made["results"]["tiny_pick"]["acc_stderr,none"] >= 0 and made["n-shot"]["tiny_pick"] == 1
        assert made["n-samples"]["labels"] == {"original": 6, "effective": 6}
        assert (made["config"]["adapter_content"] is None) == (name == "base")
        assert {"results", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better"} <= set(made)
    table = (whole / "table.md").read_text().splitlines()
    assert table[0].startswith(
        "| adapter | labels accuracy | labels loss | free exact_match | free loss | tiny_pick acc |"
    )
    assert [line.split(" | ")[0] for line in table[2:5]] == ["| base", "| A", "| B"]
    row = found["A"]["results"]["labels"]
    assert f" {row['accuracy,none']:.4f} ± {row['accuracy_stderr,none']:.4f} |" in table[3]
    assert "Seeds: few-shot 1234, sampling 0." in table[6] and "tokens/s" in table[7] and "lm_eval 0.4" in table[7]
    losses = [made["results"]["labels"]["loss,none"] for made in found.values()]
    assert len(set(losses)) == 3


@pytest.mark.long
def test_our_own_tasks_score_as_in_a_run(folder, whole):
    model, tokenizer = load_backbone(folder / "backbone"), load_tokenizer(folder / "backbone")
    tasks = [
        EvalTask("labels", read_records(folder / "labels" / "test.jsonl"), "accuracy", ("w10 w11", "w9")),
        EvalTask("free", read_records(folder / "free" / "test.jsonl"), "exact_match", max_new_tokens=16),
    ]
    adapter = load_adapter(folder / "A" / "adapter", model.config)
    for score in (tiny_scores.score(model, adapter, task, tokenizer) for task in tasks):
        found = results(whole)["A"]["results"][score.name]
        assert found[f"{score.metric},none"] == score.score > 0
        assert found["loss,none"] == pytest.approx(score.loss, rel=1e-5)


def test_an_adapter_alone_has_the_same_answers_and_scores(folder, whole, tmp_path):
    assert main(command(folder, tmp_path, adapters="B")) == 0
    assert set(lines(tmp_path)) < set(lines(whole))
    alone, mixed = (json.loads((output / "B.json").read_text()) for output in (tmp_path, whole))
    assert alone["results"] == mixed["results"]


@pytest.mark.long
def test_several_devices_give_the_scores_of_one(folder, whole, tmp_path):
    assert main(command(folder, tmp_path, "--tensor-parallel-size", "2")) == 0
    for name, made in results(whole).items():
        for task, scores in results(tmp_path)[name]["results"].items():
            for metric, value in scores.items():
                assert value == pytest.approx(made["results"][task][metric], abs=1e-5), (name, task, metric)


@pytest.mark.long
def test_a_killed_evaluation_goes_on_and_loses_no_answer(folder, whole, tmp_path, capsys):
    """A child process is killed when it has written some answers; a line is torn; the same command goes on."""
    output, goal = tmp_path / "out", len(lines(whole)) // 3
    environment = os.environ | own_flags() | {"PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen(
        [sys.executable, "-m", "para_jax.cli", *command(folder, output)],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    file, until = output / "answers.jsonl", time.monotonic() + 300
    try:
        while child.poll() is None and (not file.exists() or file.read_bytes().count(b"\n") < goal):
            assert time.monotonic() < until, "it wrote too few answers"
            time.sleep(0.002)
    finally:
        child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    kept = file.read_bytes()
    assert goal <= kept.count(b"\n") < len(lines(whole)) and not (output / "A.json").exists()
    with file.open("ab") as torn:
        torn.write(b'{"key": "1234", "logp')
    assert main(command(folder, output)) == 0
    assert file.read_bytes().startswith(kept[: kept.rindex(b"\n") + 1]) and lines(output) == lines(whole)
    assert {name: made["results"] for name, made in results(output).items()} == {
        name: made["results"] for name, made in results(whole).items()
    }
    before, count = file.read_bytes(), len(lines(whole))
    capsys.readouterr()
    assert main(command(folder, output)) == 0  # nothing is left to ask
    said = capsys.readouterr().err
    assert f"{count} of {count} answers are in {file} already" in said
    assert file.read_bytes() == before and json.loads((output / "A.json").read_text())["tokens"] == 0


@pytest.mark.parametrize(
    ("tasks", "more", "said"),
    [
        (
            ["tiny_rolling"],
            [],
            "task tiny_rolling: loglikelihood_rolling is refused: it scores a whole text, which has no",
        ),
        (["labels", "tiny_tag"], [], "--tasks: labels is given more than once"),
        (["labels"], ["--include-path", "none"], None),
        (["labels"], ["--adapters", "/nowhere/adapter"], "/nowhere/adapter: no such file or folder"),
    ],
)
def test_a_mistake_gives_one_line_before_weights_are_read(
    folder, tmp_path, capsys, monkeypatch, few_files, tasks, more, said
):
    if said:
        monkeypatch.setattr("para_jax.backbone.load.load_backbone", lambda *a, **s: pytest.fail("weights are read"))
    assert main(command(folder, tmp_path, *more, tasks=tasks)) == (2 if said else 0)
    if said:
        error = capsys.readouterr().err
        last = error[error.index("para-jax: error") :].splitlines()
        assert said in last[0] and len(last) <= 2 and "Traceback" not in error


def test_ctrl_c_names_the_folder(folder, tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Answerer, "answer", interrupted)
    assert main(command(folder, tmp_path)) == 130
    assert f"the answers so far are in {tmp_path}; the same command resumes" in capsys.readouterr().err


def test_two_metrics_of_one_file_are_two_tasks(folder, whole, tmp_path):
    texts = [f"{folder / 'free'}:f1", f"{folder / 'free'}:squad", str(folder / "labels")]
    assert main(command(folder, tmp_path, tasks=texts, adapters="A")) == 0
    found = json.loads((tmp_path / "A.json").read_text())["results"]
    assert set(found) == {"free:f1", "free:squad", "labels"}
    assert "f1,none" in found["free:f1"] and "squad,none" in found["free:squad"]
    assert found["free:f1"]["loss,none"] == found["free:squad"]["loss,none"]
    assert found["labels"] == results(whole)["A"]["results"]["labels"]
    assert "| adapter | free:f1 f1 | free:f1 loss | free:squad squad |" in (tmp_path / "table.md").read_text()


@pytest.mark.long
def test_long_prompts_lose_their_start_and_a_line_says_how_many(folder, tmp_path, capsys):
    long = {"prompt": words([*range(20, 200)] * 4), "completion": "w9"}
    for completions in (["w9", "w10 w11"], ["w9"]):
        rows = [row | {"completion": text, "label": text} for text in completions for row in (long, {"prompt": "w8"})]
        write_rows(tmp_path / "long.jsonl", rows)
        assert main(command(folder, tmp_path / str(len(completions)), tasks=[tmp_path / "long.jsonl"])) == 0
        said = f"{len(completions)} of {len(rows)} prompts lost their start, to "
        assert said in capsys.readouterr().err


@pytest.fixture
def config(folder, tmp_path):
    """A run's config whose test data are those of the task labels."""
    data = f"data.test={folder / 'labels' / 'test.jsonl'}"
    made = run_config(folder, data, "eval.metric=accuracy", "eval.choices=['w10 w11', 'w9']", "train.max_steps=2")
    save_config(made, tmp_path / "run.yaml")
    return ["evaluate", str(tmp_path / "run.yaml"), "--allow-cpu", "--no-compilation-cache"]


def test_a_config_and_a_backbone_with_tasks_give_the_same_scores(folder, whole, config, tmp_path, capsys):
    adapters, record = [str(folder / name / "adapter") for name in "AB"], tmp_path / "record.json"
    output = ["--output", str(tmp_path / "out"), "--results", str(record)]
    assert main([*config, "--adapters", *adapters, *output]) == 0
    assert (tmp_path / "out" / "table.md").read_text() in capsys.readouterr().out
    scores = json.loads(record.read_text())["scores"]
    for name, found in results(tmp_path / "out").items():
        expected = results(whole)[name]["results"]["labels"]
        assert found["results"]["test"]["accuracy,none"] == expected["accuracy,none"]
        assert found["results"]["test"]["loss,none"] == pytest.approx(expected["loss,none"], rel=1e-5)
        assert scores[name] == found["results"]
    assert main([*config, "--adapter", adapters[0], "--results", str(record)]) == 0
    assert capsys.readouterr().out.startswith("| adapter | test accuracy | test loss |")
    alone = json.loads(record.read_text())["scores"]["A"]["test"]
    assert alone["loss,none"] == pytest.approx(scores["A"]["test"]["loss,none"], rel=1e-5)


@pytest.mark.parametrize("kind", ["folder", "bucket"])
def test_one_adapter_goes_to_a_folder_without_the_base_model(folder, config, tmp_path, bucket, kind):
    output = (tmp_path if kind == "folder" else bucket) / "of-one-adapter"
    assert main([*config, "--adapter", str(folder / "A" / "adapter"), "--output", str(output)]) == 0
    assert {path.name for path in output.iterdir()} == {"A.json", "answers.jsonl", "table.csv", "table.md"}


@pytest.mark.long
def test_shuffled_prompts_score_in_a_folder_as_by_themselves(folder, whole, tmp_path, capsys):
    assert main(command(folder, tmp_path, "--shuffle-prompts", tasks=["labels", "free"])) == 0
    assert "factors of another example's prompt" in capsys.readouterr().out
    model, tokenizer = load_backbone(folder / "backbone"), load_tokenizer(folder / "backbone")
    adapter = load_adapter(folder / "A" / "adapter", model.config)
    tasks = [
        EvalTask("labels", read_records(folder / "labels" / "test.jsonl"), "accuracy", ("w10 w11", "w9")),
        EvalTask("free", read_records(folder / "free" / "test.jsonl"), "exact_match"),
    ]
    for score in (tiny_scores.score(model, adapter, task, tokenizer, shuffle=0) for task in tasks):
        own, other = (results(output)["A"]["results"][score.name] for output in (whole, tmp_path))
        assert other[f"{score.metric},none"] == score.score
        assert other["loss,none"] == pytest.approx(score.loss, rel=1e-5)
        assert abs(other["loss,none"] - own["loss,none"]) > 1e-3
        assert results(tmp_path)["base"]["results"][score.name] == results(whole)["base"]["results"][score.name]
    capsys.readouterr()
    assert main(command(folder, tmp_path, "--shuffle-prompts", tasks=["tiny_pick"])) == 2
    assert "--shuffle-prompts: tiny_pick" in capsys.readouterr().err


def test_with_own_each_tenant_is_asked_its_own_file_only(folder, whole, tmp_path, capsys):
    for name, task in (("A", "labels"), ("B", "free"), ("C", "free")):
        shutil.copytree(folder / task, tmp_path / "tenants" / name)
    assert main(command(folder, tmp_path / "out", "--own", tasks=[tmp_path / "tenants"])) == 0
    found, expected = results(tmp_path / "out"), results(whole)
    assert {name: set(made["results"]) for name, made in found.items()} == {
        "base": {"A", "B"}, "A": {"A"}, "B": {"B"}
    }  # fmt: skip
    for name, task in (("A", "labels"), ("B", "free")):
        for who in ("base", name):
            same = expected[who]["results"][task] | {"alias": name}
            for key, value in same.items():  # the tenants' tasks plan shapes of their own
                close = value if isinstance(value, str) else pytest.approx(value, rel=1e-5)
                assert found[who]["results"][name][key] == close
    asked, known = ({json.loads(line)["key"] for line in lines(at)} for at in (tmp_path / "out", whole))
    assert asked < known and len(lines(tmp_path / "out")) == len(asked)  # base and one adapter for each question
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| tenant | metric | base | own adapter | examples |"
    assert [line.split(" | ")[:2] for line in table[2:6]] == [
        ["| A", "accuracy"], ["| A", "loss"], ["| B", "exact_match"], ["| B", "loss"]
    ]  # fmt: skip
    assert not any("A 6" in line or "B 4" in line for line in table)  # each row has its count, a thousand of them too
    assert table[2].endswith(" | 6 |") and f" {found['A']['results']['A']['accuracy,none']:.4f} ±" in table[2]


def test_a_tenants_own_config_gives_its_metric(folder):
    model_config, tokenizer = load_model_config(folder / "backbone"), load_tokenizer(folder / "backbone")
    shutil.copytree(folder / "free", folder / "owned" / "A", dirs_exist_ok=True)
    shutil.copytree(folder / "free", folder / "owned" / "B", dirs_exist_ok=True)
    own = {"B": run_config(folder, f"data.train={folder / 'owned' / 'B'}", "eval.metric=f1", "eval.max_new_tokens=3")}
    tasks = read_own_tasks(str(folder / "owned"), ["A", "B"], tokenizer, model_config, EvalOptions(), own)
    assert [(one.names, one.owner) for one in tasks] == [(("A",), "A"), (("B",), "B")]
    assert [one.questions[-1].max_new_tokens for one in tasks] == [16, 3]


def test_own_tasks_of_a_label_metric_rank_with_and_without_training_data(folder, tmp_path):
    """A has some, C has only a tenant.yaml, B neither. All are asked what the file alone is asked."""
    model_config, tokenizer = load_model_config(folder / "backbone"), load_tokenizer(folder / "backbone")
    for name in "ABC":
        shutil.copytree(folder / "labels", tmp_path / name)
    rows = [{"prompt": f"w{i}", "completion": text} for i in range(20, 24) for text in ("w9", "w10 w11")]
    write_rows(tmp_path / "A" / "train.jsonl", rows)

    def asked(metric, *more):
        more = f"eval.metric={metric}", "eval.max_new_tokens=null", *more
        own = {name: run_config(folder, f"data.train={tmp_path / name}", *more) for name in "AC"}
        return read_own_tasks(f"{tmp_path}:{metric}", list("ABC"), tokenizer, model_config, EvalOptions(), own)

    for metric in ("macro_f1", "matthews"):
        one, *others = [task.questions for task in asked(metric)]
        assert one == others[0] == others[1]
    of_config, of_file, _ = [task.questions for task in asked("macro_f1", "eval.choices=[w9, w12, w13]")]
    assert len(of_config) == len(of_file) * 4 // 3  # with the completion, for the loss
