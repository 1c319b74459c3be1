"""`para-jax evaluate --backbone --adapters --tasks`: our own tasks and lm-eval's, from the command to the table."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import strong
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from quick_compiler import own_flags
from tiny_run import backbone_folder, rows_of_text, words, write_rows

import para_jax
from para_jax import (
    AdapterBank,
    Engine,
    ParaConfig,
    ParaLM,
    evaluate,
    init_adapter,
    load_adapter,
    load_backbone,
    load_tokenizer,
    save_adapter,
)
from para_jax.cli import main
from para_jax.cli.names import named_adapters
from para_jax.data.records import read_records
from para_jax.evaluation import answers as mixed
from para_jax.evaluation import many
from para_jax.evaluation.answers import Pass
from para_jax.evaluation.evaluate import EvalTask
from para_jax.evaluation.harness import tasks as lm_eval_tasks
from para_jax.evaluation.harness.tasks import load_tasks, record, replay
from para_jax.evaluation.many import cell, check_results, file_names
from para_jax.evaluation.questions import Scored, Written

PICK = """
task: tiny_pick
dataset_path: json
dataset_kwargs: {{data_files: {{train: {file}, test: {file}}}}}
training_split: train
test_split: test
num_fewshot: 1
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
WRITE = """
task: tiny_write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [w77], max_gen_toks: 5, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}]
"""
GROUP = """
group: tiny_group
task: [tiny_pick, tiny_other]
aggregate_metric_list: [{{metric: acc, aggregation: mean, weight_by_size: true}}]
"""
SAMPLES = """
group: tiny_samples
task: [tiny_draw, tiny_redraw]
"""


@pytest.fixture(scope="module", autouse=True)
def no_hub():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A backbone, two strong tenants, two tasks of ours and three of lm-eval."""
    folder = tmp_path_factory.mktemp("many")
    backbone_folder(folder / "backbone")
    model = load_backbone(folder / "backbone")
    for i, name in enumerate("AB"):
        save_adapter(strong(init_adapter(ParaConfig(r=4), model.config), i, 0.3), folder / name / "adapter")
    draw = np.random.default_rng(0)
    texts = [words(draw.integers(20, 250, int(draw.integers(3, 8)))) for _ in range(6)]
    labels = [
        {"prompt": text, "completion": ("w9", "w10 w11")[i % 2], "label": str(i % 2)} for i, text in enumerate(texts)
    ]
    write_rows(folder / "labels" / "test.jsonl", labels)
    write_rows(folder / "free" / "test.jsonl", rows_of_text(4, 3))
    rows = [{"question": text, "choices": ["w9", "w9 w10", "w30 w31"], "label": i % 3, "answer": "w9"}
            for i, text in enumerate(texts)]  # fmt: skip
    file = write_rows(folder / "tasks" / "data.jsonl", rows)
    tagged = PICK.replace("tiny_pick", "labels\ntag: tiny_tag")
    other = PICK.replace("tiny_pick", "tiny_other").replace("num_fewshot: 1", "num_fewshot: 0")
    sampled = WRITE.replace("tiny_write", "tiny_draw").replace("do_sample: false", "do_sample: true, temperature: 1.0")
    again = sampled.replace("tiny_draw", "tiny_redraw")
    files = {"pick": PICK, "write": WRITE, "rolling": ROLLING, "tagged": tagged, "other": other, "group": GROUP}
    files |= {"draw": sampled, "redraw": again, "samples": SAMPLES}
    for name, text in files.items():
        (folder / "tasks" / f"{name}.yaml").write_text(text.format(file=file))
    return folder


def command(folder, output, *more, tasks=("labels", "free", "tiny_pick", "tiny_write"), adapters="AB"):
    tasks = [folder / task if (folder / task).exists() else task for task in tasks]
    adapters = [folder / name / "adapter" for name in adapters]
    return [str(part) for part in (
        "evaluate", "--backbone", folder / "backbone", "--adapters", *adapters, "--tasks", *tasks, "--include-path",
        folder / "tasks", "--output", output, "--rows", 4, "--allow-cpu", "--no-compilation-cache", *more,
    )]  # fmt: skip


def results(output):
    return {name: json.loads((output / f"{name}.json").read_text()) for name in ("base", "A", "B")}


def lines(output):
    return sorted((output / "answers.jsonl").read_text().splitlines())


@pytest.fixture
def few_files(monkeypatch):
    """Without lm-eval's ten thousand task files, which are read in seconds."""
    monkeypatch.setattr(lm_eval_tasks, "TaskManager", partial(TaskManager, include_defaults=False))


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The output of a run that was not disturbed."""
    output = tmp_path_factory.mktemp("whole") / "out"
    assert main(command(folder, output)) == 0
    return output


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


def test_our_own_tasks_score_as_evaluate_does(folder, whole):
    model, tokenizer = load_backbone(folder / "backbone"), load_tokenizer(folder / "backbone")
    tasks = [
        EvalTask("labels", read_records(folder / "labels" / "test.jsonl"), "accuracy", ("w10 w11", "w9")),
        EvalTask("free", read_records(folder / "free" / "test.jsonl"), "exact_match"),
    ]
    adapter = load_adapter(folder / "A" / "adapter", model.config)
    for score in evaluate(model, adapter, tasks, tokenizer=tokenizer).scores:
        found = results(whole)["A"]["results"][score.name]
        assert found[f"{score.metric},none"] == score.score
        assert found["loss,none"] == pytest.approx(score.loss, rel=1e-5)


def test_an_adapter_alone_has_the_same_answers_and_scores(folder, whole, tmp_path):
    assert main(command(folder, tmp_path, adapters="B")) == 0
    assert set(lines(tmp_path)) < set(lines(whole))
    alone, mixed = (json.loads((output / "B.json").read_text()) for output in (tmp_path, whole))
    assert alone["results"] == mixed["results"]


def test_a_run_that_is_killed_goes_on_and_loses_nothing_that_was_answered(folder, whole, tmp_path, capsys):
    """A child process is killed when it has written some answers; a line is torn; the same command goes on."""
    output, goal = tmp_path / "out", len(lines(whole)) // 3
    environment = os.environ | own_flags() | {"PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen(
        [sys.executable, "-m", "para_jax.cli", *command(folder, output)],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    file = output / "answers.jsonl"
    while child.poll() is None and (not file.exists() or file.read_bytes().count(b"\n") < goal):
        time.sleep(0.002)
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
    assert f"{count} of {count} answers are in {file} already" in said and "earlier calls" not in said
    assert file.read_bytes() == before and json.loads((output / "A.json").read_text())["tokens"] == 0


@pytest.mark.parametrize(
    ("tasks", "more", "said"),
    [
        (
            ["tiny_rolling"],
            [],
            "task tiny_rolling: loglikelihood_rolling is refused: it scores a whole text, which has no",
        ),
        (["labels:bleu"], [], "--tasks: metric: 'bleu' is not possible; expected one of loss, exact_match"),
        (["no/such.jsonl"], [], "--tasks 'no/such.jsonl': no such file or folder"),
        (["labels", "labels"], [], "--tasks: ['labels'] is not possible; expected each name once"),
        (["labels", "tiny_tag"], [], "--tasks: ['labels'] is not possible; expected each name once"),
        (["labels"], ["--include-path", "none"], None),
        (["labels"], ["--limit", "0"], "--limit: 0 is not possible"),
        (["labels"], ["--adapters", "/nowhere/adapter"], "/nowhere/adapter: no such file or folder"),
        ([], [], "expected the CONFIG of a run, or --backbone with --tasks"),
    ],
)
def test_a_mistake_gives_one_line_before_any_weight_is_read(
    folder, tmp_path, capsys, monkeypatch, few_files, tasks, more, said
):
    if said:
        monkeypatch.setattr("para_jax.backbone.load.load_backbone", lambda *a, **s: pytest.fail("weights are read"))
    made = command(folder, tmp_path, *more, tasks=tasks)
    if ":" in str(tasks):
        made = [text.replace("labels:bleu", f"{folder / 'labels'}:bleu") for text in made]
    if not tasks:
        made.remove("--tasks")
    assert main(made) == (2 if said else 0)
    if said:
        error = capsys.readouterr().err
        last = error[error.index("para-jax: error") :].splitlines()
        assert said in last[0] and len(last) <= 2 and "Traceback" not in error


def test_names_of_adapters_are_their_folders_and_files_stay_apart(folder):
    folders = [str(folder / name / "adapter") for name in "AB"]
    assert named_adapters([*folders, "mine=" + folders[0], "user/name@v1"]) == {
        "A": folders[0], "B": folders[1], "mine": folders[0], "user/name@v1": "user/name@v1"
    }  # fmt: skip
    for wrong in ([folders[0]] * 2, ["base=x"], ["=x"], ["x="]):
        with pytest.raises(ValueError, match="give NAME=DIR"):
            named_adapters(wrong)
    names = ["a/b", "a_b", "A_B", "..", "x", "x y", "x_y", "x_y-0", "x_y-1"]
    files = file_names(names)
    assert len({file.lower() for file in files.values()}) == len(names) and files["x"] == "x.json"
    assert not any("/" in file or file.startswith(".") for file in files.values())
    long = [letter * 190 + end for letter in "xé" for end in ("1" * 50, "2" * 50)]
    assert len({*file_names(long).values()}) == 4 and max(len(f.encode()) for f in file_names(long).values()) < 150
    assert file_names(["a\udcff", "a_"])["a\udcff"].startswith("a_-")


def test_ctrl_c_says_where_the_answers_are_and_results_that_the_table_lacks_are_named(
    folder, whole, tmp_path, capsys, monkeypatch
):
    output = shutil.copytree(whole, tmp_path / "out")
    assert main(command(folder, output, adapters="B")) == 0
    assert f"{output} also holds what earlier calls wrote, and table.md does not: A.json\n" in capsys.readouterr().err

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Pass, "answer", interrupted)
    assert main(command(folder, output)) == 130
    assert f"the answers so far are in {output}; the same command goes on there" in capsys.readouterr().err


def test_an_output_folder_holds_results_of_one_backbone_and_nothing_elses_files(whole, tmp_path, monkeypatch):
    output = shutil.copytree(whole, tmp_path / "out")
    names, content = ["base.json", "A.json"], results(whole)["base"]["config"]["backbone_content"]
    check_results(output, [*names, "none.json"], content)
    for name in names:
        with pytest.raises(ValueError, match=f"--output {output}: {name} holds results of another backbone"):
            check_results(output, names, "another")
        (output / name).write_bytes(b'{"results": {')
    foreign = (b"[]", b"5", b'{"config": 1}', b'{"config": {"backbone_content": 1}}', b"[" * 100_000)
    for other in foreign:
        (output / "A.json").write_bytes(other)
        with pytest.raises(ValueError, match="A.json: .* expected results of an evaluation") as caught:
            check_results(output, names, content)
        assert len(str(caught.value)) < len(str(output)) + 300
    (output / "answers.jsonl").unlink()
    (output / "base.json").unlink()
    (output / "A.json").write_bytes(b"not JSON")
    with pytest.raises(ValueError, match="A.json: .* expected results of an evaluation"):
        check_results(output, names, content)  # nothing says that this folder is an evaluation's
    monkeypatch.setattr(many, "LARGEST", 1000)
    with pytest.raises(ValueError, match="B.json: .* expected results of an evaluation"):
        check_results(output, ["B.json"], content)


def test_results_that_are_damaged_are_written_anew_from_the_answers(folder, whole, tmp_path, capsys, monkeypatch):
    output = shutil.copytree(whole, tmp_path / "out")
    data = (whole / "base.json").read_bytes()
    content, names = results(whole)["base"]["config"]["backbone_content"], ["base.json", "A.json", "B.json"]
    for cut in (0, 1, 200, len(data) // 2, len(data) - 2):
        (output / "base.json").write_bytes(data[:cut])
        check_results(output, names, content)
        assert f"{output / 'base.json'} is damaged" in capsys.readouterr().err
    for name in names:
        (output / name).write_bytes(b"\0" * 100)
    monkeypatch.setattr(mixed, "likelihoods", lambda *_: iter(()))  # nothing is computed
    assert main(command(folder, output)) == 0
    assert {name: made["results"] for name, made in results(output).items()} == {
        name: made["results"] for name, made in results(whole).items()
    }


def test_a_kill_while_results_are_written_leaves_whole_files_and_the_same_command_goes_on(
    folder, tmp_path, monkeypatch
):
    line = command(folder, tmp_path, tasks=["labels"], adapters="A")
    real, killing = os.replace, iter([False, True])

    def killed(part, file):
        if next(killing):
            raise SystemExit
        real(part, file)

    assert main(line) == 0
    before = (tmp_path / "A.json").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(os, "replace", killed)
        main(line)
    assert (tmp_path / "A.json").read_bytes() == before
    assert json.loads((tmp_path / "base.json").read_text())["tokens"] == 0
    assert main(line) == 0 and (tmp_path / "A.json").read_bytes() != before
    assert {path.name for path in tmp_path.iterdir()} == {"base.json", "A.json", "answers.jsonl", "table.md"}


def test_two_metrics_of_one_file_are_two_tasks_of_distinct_names(folder, whole, tmp_path, capsys):
    texts = [f"{folder / 'free'}:f1", f"{folder / 'free'}:squad", str(folder / "labels")]
    assert main(command(folder, tmp_path, tasks=texts, adapters="A")) == 0
    found = json.loads((tmp_path / "A.json").read_text())["results"]
    assert set(found) == {"free:f1", "free:squad", "labels"}
    assert "f1,none" in found["free:f1"] and "squad,none" in found["free:squad"]
    assert found["free:f1"]["loss,none"] == found["free:squad"]["loss,none"]
    assert found["labels"] == results(whole)["A"]["results"]["labels"]
    assert "| adapter | free:f1 f1 | free:f1 loss | free:squad squad |" in (tmp_path / "table.md").read_text()
    write_rows(tmp_path / "free" / "test.jsonl", rows_of_text(4, 3))
    for twice in ([texts[0]] * 2, [texts[0], f"{tmp_path / 'free'}:squad"], [texts[2], texts[2] + ":accuracy"]):
        assert main(command(folder, tmp_path / "twice", tasks=twice)) == 2
        assert "expected each name once" in capsys.readouterr().err


def test_the_table_shows_no_raw_control_character():
    assert cell("a|b\x1b[0m\n\udcff é") == "a\\|b\\x1b[0m\\n\\udcff é"


def test_prompts_that_are_too_long_lose_their_start_and_a_line_says_how_many(folder, tmp_path, capsys):
    long = {"prompt": words([*range(20, 200)] * 4), "completion": "w9"}
    for completions in (["w9", "w10 w11"], ["w9"]):
        rows = [row | {"completion": text, "label": text} for text in completions for row in (long, {"prompt": "w8"})]
        write_rows(tmp_path / "long.jsonl", rows)
        assert main(command(folder, tmp_path / str(len(completions)), tasks=[tmp_path / "long.jsonl"])) == 0
        said = f"{len(completions)} of {len(rows)} prompts lost their start, to "
        assert said in capsys.readouterr().err


def test_para_lm_knows_the_adapter_that_its_tenant_has_now(folder):
    model = load_backbone(folder / "backbone")
    bank = AdapterBank.holding({"A": load_adapter(folder / "A" / "adapter", model.config)}, model.config)
    lm = ParaLM(Engine(model, bank, load_tokenizer(folder / "backbone"), slots=2, max_length=64), "A")
    before = lm.content
    bank.replace("A", load_adapter(folder / "B" / "adapter", model.config))
    assert lm.content == bank.entry("A").content != before


def test_a_tasks_own_code_that_fails_is_named_with_the_task(folder, tmp_path, few_files):
    file, tokenizer = folder / "tasks" / "data.jsonl", load_tokenizer(folder / "backbone")
    broken = WRITE.replace("{{{{question}}}}", "{{{{ question if label == 0 else 1 / 0 }}}}").replace(
        "tiny_write", "asks"
    )
    unscored = WRITE.replace("metric: exact_match", "metric: exact_match, ignore_case: true, regexes_to_ignore: ['(']")
    (tmp_path / "asks.yaml").write_text(broken.format(file=file))
    (tmp_path / "scores.yaml").write_text(unscored.replace("tiny_write", "scores").format(file=file))
    made = load_tasks(["asks", "scores"], tmp_path, limit=2, fewshot=None, chat=False)
    with pytest.raises(ValueError, match="task asks: its requests can't be made: ZeroDivisionError"):
        record(made[0], tokenizer, 100, sampling_seed=0)
    record(made[1], tokenizer, 100, sampling_seed=0)
    with pytest.raises(ValueError, match="task scores: lm-eval can't score its answers: .*(error|Error)"):
        replay(made[1], tokenizer, 100, lambda one: Written("w9", 1), sampling_seed=0)


def test_a_task_file_that_lm_eval_can_not_read_is_named(tmp_path, few_files):
    (tmp_path / "odd.yaml").write_text("task: odd\nmetric_list: [\x1b")
    (tmp_path / "fine.yaml").write_text("task: fine\ndataset: !function code.data")
    with pytest.raises(ValueError, match="task odd: neither .*odd.yaml can't be read") as caught:
        load_tasks(["odd"], tmp_path, limit=None, fewshot=None, chat=False)
    assert "\x1b" not in str(caught.value) and "fine" not in str(caught.value)


def test_a_second_round_of_requests_and_unknown_requests_are_refused_by_the_tasks_name(folder, monkeypatch):
    (task,) = load_tasks(["tiny_pick"], folder / "tasks", limit=2, fewshot=None, chat=False)
    tokenizer = load_tokenizer(folder / "backbone")
    asked = record(task, tokenizer, 100, sampling_seed=0)
    assert len(asked) == 6 and len({one.context for one in asked}) == 2
    known = dict.fromkeys(asked[1:], Scored(-1.0, False))
    with pytest.raises(ValueError, match="task tiny_pick: asks a second round of requests"):
        replay(task, tokenizer, 100, known.get, sampling_seed=0)
    known[asked[0]] = Scored(-9.0, False)
    found = replay(task, tokenizer, 100, known.get, sampling_seed=0, samples=True)
    assert found["samples"]["tiny_pick"][0]["resps"] == [[(-9.0, False)], [(-1.0, False)], [(-1.0, False)]]
    monkeypatch.setattr(Instance, "__post_init__", lambda self: setattr(self, "request_type", "generate_rounds"))
    with pytest.raises(ValueError, match="task tiny_pick: requests of type generate_rounds, .* are refused"):
        record(task, tokenizer, 100, sampling_seed=0)


# --------------------------------------------------------------------------------------------------------------- ParaLM


TEMPLATE = "{% for m in messages %}w5 {{ m.content }} {% endfor %}{% if add_generation_prompt %}w6{% endif %}"


@pytest.fixture(scope="module")
def harness(folder):
    """simple_evaluate of lm-eval on the tiny tasks, with few files to index."""
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)

    def run(lm, *tasks, **options):
        return simple_evaluate(lm, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, **options)

    return run


@pytest.fixture(scope="module")
def engine(folder):
    model = load_backbone(folder / "backbone")
    bank = AdapterBank.holding({n: load_adapter(folder / n / "adapter", model.config) for n in "AB"}, model.config)
    return Engine(model, bank, load_tokenizer(folder / "backbone"), slots=4, max_length=64)


@pytest.mark.parametrize(("named", "members"), [("tiny_group", ["tiny_pick", "tiny_other"]), ("tiny_tag", ["labels"])])
def test_groups_and_tags_score_as_lm_eval_scores_them(folder, engine, harness, tmp_path, named, members, request):
    if named == "tiny_tag":
        request.getfixturevalue("few_files")
    assert main(command(folder, tmp_path, "--limit", "4", tasks=[named])) == 0
    for name, found in results(tmp_path).items():
        theirs = harness(ParaLM(engine, None if name == "base" else name), named, limit=4)
        assert set(found["results"]) == {*members, *(["tiny_group"] if named == "tiny_group" else [])}
        for task, values in found["results"].items():
            assert values["acc,none"] == theirs["results"][task]["acc,none"]
    assert all(f" {task} acc |" in (tmp_path / "table.md").read_text() for task in found["results"])


def test_two_tasks_of_a_group_that_sample_after_the_same_prompts_get_answers_of_their_own(
    folder, engine, harness, tmp_path, few_files
):
    assert main(command(folder, tmp_path, "--limit", "4", tasks=["tiny_samples"])) == 0
    drawn = {one["text"] for one in map(json.loads, lines(tmp_path)) if "text" in one}
    samples = harness(ParaLM(engine, "A"), "tiny_samples", limit=4)["samples"]
    first, second = ([one["resps"][0][0] for one in samples[task]] for task in ("tiny_draw", "tiny_redraw"))
    assert len(first) == 4 and all(a != b for a, b in zip(first, second, strict=True))
    assert {*first, *second} <= drawn


@pytest.mark.parametrize("tenant", ["A", None])
def test_para_lm_scores_one_tenant_as_the_mixed_pass_does(engine, harness, whole, tenant):
    found = harness(ParaLM(engine, tenant), "tiny_pick", "tiny_write")
    mixed = results(whole)[tenant or "base"]["results"]
    for task, metric in (("tiny_pick", "acc,none"), ("tiny_write", "exact_match,none")):
        assert found["results"][task][metric] == mixed[task][metric]
    likely = {one["logprob"] for one in map(json.loads, lines(whole)) if "logprob" in one}
    nats = [nats for sample in found["samples"]["tiny_pick"] for ((nats, _),) in sample["resps"]]
    assert len(nats) == 18 and set(nats) <= likely
    assert found["config"]["adapter"] == (engine.bank.entry(tenant).content if tenant else "base")


def test_answers_that_are_in_memory_alone_are_in_no_file(engine, harness, capsys):
    lm = ParaLM(engine, "A")
    for _ in range(2):
        harness(lm, "tiny_pick", limit=2)
    assert "already" not in capsys.readouterr().err


def test_para_lm_uses_the_chat_template(engine, harness, monkeypatch):
    lm = ParaLM(engine, "A")
    plain = lm.tokenizer_name
    monkeypatch.setattr(engine.tokenizer, "chat_template", TEMPLATE)
    assert lm.tokenizer_name != plain
    found = harness(lm, "tiny_write", apply_chat_template=True, limit=2)
    assert all(sample["arguments"][0][0].startswith("w5 w") for sample in found["samples"]["tiny_write"])
    assert all(sample["arguments"][0][0].endswith(" w6") for sample in found["samples"]["tiny_write"])


def test_para_lm_cuts_contexts_to_the_engines_room(engine, monkeypatch, capsys):
    lm, asked = ParaLM(engine, "A"), []
    monkeypatch.setattr(lm, "answered", lambda given: asked.extend(given) or [Written("", 0)] * len(given))
    requests = [Instance("generate_until", {}, (words(range(20, 120)), {"max_gen_toks": 16}), 0, ("t", 0, 1))]
    assert lm.generate_until(requests) == [""] and len(asked[0].context) == 64 - 16
    assert "1 of 1 contexts lost their start, to fit into 64 tokens" in capsys.readouterr().err
    monkeypatch.undo()
    assert len(lm.generate_until(requests)) == 1
    assert lm.max_gen_toks == 32


def test_a_cache_knows_the_adapter(engine, harness, tmp_path, monkeypatch):
    def logprobs(lm, **options):
        samples = harness(lm, "tiny_pick", limit=3, **options)["samples"]["tiny_pick"]
        return [sample["resps"] for sample in samples]

    first, other = (logprobs(ParaLM(engine, tenant, cache=tmp_path / "cache")) for tenant in "AB")
    assert first != other
    monkeypatch.setattr(mixed, "likelihoods", lambda *_: iter(()))  # nothing is computed
    assert [logprobs(ParaLM(engine, tenant, cache=tmp_path / "cache")) for tenant in "AB"] == [first, other]


def test_lm_evals_own_cache_is_refused_where_another_adapter_answered(engine, harness, tmp_path):
    cache = str(tmp_path / "theirs")
    first = harness(ParaLM(engine, "A"), "tiny_pick", use_cache=cache)["results"]
    assert harness(ParaLM(engine, "A"), "tiny_pick", use_cache=cache)["results"] == first
    with pytest.raises(ValueError, match="use_cache: this file holds answers of another adapter or model"):
        harness(ParaLM(engine, "B"), "tiny_pick", use_cache=cache)


def test_lm_evals_own_cache_takes_no_answer_of_an_adapter_that_came_meanwhile(engine, folder, tmp_path):
    model, seen = engine.model, {}
    bank = AdapterBank.holding({"A": load_adapter(folder / "A" / "adapter", model.config)}, model.config)
    lm = ParaLM(Engine(model, bank, engine.tokenizer, slots=4, max_length=64), "A")
    lm.set_cache_hook(SimpleNamespace(dbdict=seen, add_partial=lambda *a: seen.update({a[1]: a[2]})))
    bank.replace("A", load_adapter(folder / "B" / "adapter", model.config))
    with pytest.raises(ValueError, match="use_cache: tenant 'A'"):
        lm.loglikelihood([Instance("loglikelihood", {}, ("w20 w21", " w9"), 0, ("t", 0, 1))])
    assert len(seen) == 1


def test_perplexity_is_refused_with_the_reason(engine, harness):
    with pytest.raises(ValueError, match="loglikelihood_rolling is refused: .* no prompt, and PARA makes its vectors"):
        harness(ParaLM(engine, "A"), "tiny_rolling")


def test_para_lm_is_made_of_lm_evals_arguments(folder, tmp_path):
    sources = f"pretrained={folder / 'backbone'},peft={folder / 'A' / 'adapter'}"
    made = get_model("para").create_from_arg_string(
        f"{sources},max_length=48,cache={tmp_path},allow_cpu=true",
        {"batch_size": 3, "max_batch_size": None, "device": None},
    )
    assert isinstance(made, ParaLM) and (made.engine.slots, made.engine.max_length) == (3, 48)
    assert made.tenant == str(folder / "A" / "adapter") and (tmp_path / "answers.jsonl").exists()
    with pytest.raises(
        ValueError, match=r"model_args: \['bakbone'\] is not possible; expected backbone, adapter, dtype"
    ):
        get_model("para").create_from_arg_obj({"bakbone": "x"})
    with pytest.raises(ValueError, match="model_args: max_length: 'long' is not possible; expected a whole number"):
        get_model("para").create_from_arg_obj({"backbone": "x", "max_length": "long"})


@pytest.mark.long
def test_lm_evals_command_line_runs_para(folder, whole, tmp_path, monkeypatch):
    """Slow: lm-eval reads its ten thousand task files."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    args = f"backbone={folder / 'backbone'},adapter={folder / 'A' / 'adapter'},allow_cpu=true"
    line = f"lm-eval --tasks tiny_pick --include_path {folder / 'tasks'} --model_args {args}"
    assert main([*line.split(), "--output_path", str(tmp_path / "o.json")]) == 0
    (file,) = tmp_path.glob("o*.json")
    found = json.loads(file.read_text())
    assert found["results"]["tiny_pick"] == results(whole)["A"]["results"]["tiny_pick"]


def test_without_lm_eval_a_line_says_how_to_install_it(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(many, "find_spec", lambda name: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for line in (command(folder, tmp_path, tasks=["tiny_pick"]), ["lm-eval", "--tasks", "x"]):
        assert main(line) == 2
        assert "pip install 'para_jax[eval]'" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in [name for name in sys.modules if name.startswith(("lm_eval.", "para_jax.evaluation."))]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match="para_jax.ParaLM: lm-eval is not installed: pip install"):
        para_jax.ParaLM  # noqa: B018
