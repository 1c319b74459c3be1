"""--log-samples: a line for each example, whose scores are those of the results."""

import json
import shutil

import numpy as np
import pytest
from tiny_harness import command, results

from para_jax import EvalOptions, evaluate, load_adapter, load_backbone, load_tokenizer
from para_jax.cli import main
from para_jax.data.records import read_records
from para_jax.evaluation import answers as answering
from para_jax.evaluation.results import names_of_samples
from para_jax.evaluation.samples import example_score, json_line, write_samples
from para_jax.evaluation.tasks import EvalTask


@pytest.fixture(scope="module")
def logged(folder, whole, tmp_path_factory):
    """Samples of an evaluation that had ended: nothing is asked again."""
    output = shutil.copytree(whole, tmp_path_factory.mktemp("logged") / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answering, "likelihoods", lambda *_: iter(()))  # nothing is computed
        assert main(command(folder, output, "--log-samples")) == 0
    return output


def samples(folder, adapter, task):
    return [json.loads(line) for line in (folder / f"samples_{adapter}_{task}.jsonl").read_text().splitlines()]


def test_each_adapter_and_task_has_a_file(logged):
    tasks = ("labels", "free", "tiny_pick", "tiny_write")
    expected = {f"samples_{name}_{task}.jsonl" for name in ("base", "A", "B") for task in tasks}
    assert {path.name for path in logged.glob("samples_*")} == expected


def test_the_samples_of_ranked_choices_have_their_likelihoods(folder, whole, logged):
    records = read_records(folder / "labels" / "test.jsonl")
    for name, made in results(whole).items():
        found = samples(logged, name, "labels")
        assert [(one["index"], one["prompt"], one["expected"]) for one in found] == [
            (i, record.prompt, list(record.references)) for i, record in enumerate(records)
        ]
        assert {(one["adapter"], one["task"]) for one in found} == {(name, "labels")}
        assert all(one["given"] == max(one["choices"], key=one["choices"].get) for one in found)
        assert all(one["accuracy"] == float(one["given"] in one["expected"]) for one in found)
        row, tokens = made["results"]["labels"], [one["tokens"] for one in found]
        assert np.mean([one["accuracy"] for one in found]) == row["accuracy,none"]
        losses = [one["loss"] for one in found]
        assert np.average(losses, weights=tokens) == pytest.approx(row["loss,none"])


def test_the_samples_of_written_answers_are_what_evaluate_reports(folder, whole, logged):
    model, tokenizer = load_backbone(folder / "backbone"), load_tokenizer(folder / "backbone")
    task = EvalTask("free", read_records(folder / "free" / "test.jsonl"), "f1", max_new_tokens=16, also=("macro_f1",))
    adapter = load_adapter(folder / "A" / "adapter", model.config)
    results_here = evaluate(model, adapter, task, tokenizer=tokenizer, options=EvalOptions(log_samples=True))
    reported = results_here.samples["adapter"]["free"]
    found = samples(logged, "A", "free")
    assert [one["given"] for one in reported] == [one["given"] for one in found] and any(one["given"] for one in found)
    assert np.mean([one["f1"] for one in reported]) == results_here.records["adapter"]["results"]["free"]["f1,none"]
    assert {one["correct"] for one in reported} <= {0.0, 1.0} and "macro_f1" not in reported[0]
    assert np.mean([one["exact_match"] for one in found]) == results(whole)["A"]["results"]["free"]["exact_match,none"]
    assert evaluate(model, adapter, task._replace(metric="loss", also=()), tokenizer=tokenizer).samples == {}


def test_the_samples_of_lm_evals_tasks_are_as_it_writes_them(whole, logged):
    for name, made in results(whole).items():
        pick, write = (samples(logged, name, task) for task in ("tiny_pick", "tiny_write"))
        assert np.mean([one["acc"] for one in pick]) == made["results"]["tiny_pick"]["acc,none"]
        assert pick[0]["doc_id"] == 0 and pick[0]["adapter"] == name and len(pick[0]["resps"]) == 3
        assert set(write[0]["arguments"]["gen_args_0"]) == {"arg_0", "arg_1"} and write[0]["target"] == "w9"


def test_any_text_stays_one_line_of_json(tmp_path):
    text = 'a"\n\x1b[2J\x9b\u2028\u202e\udc80日本 e\u0301\U000e0001'
    data = json_line({"text": text, "n": np.float32(1.5), "set": {1}})
    assert json.loads(data) == {"text": text, "n": 1.5, "set": [1]}
    assert data.endswith(b"\n") and data.count(b"\n") == 1 and "日本" in data.decode()
    write_samples(tmp_path / "s.jsonl", "a/b", "t\n", [{"index": 0}])
    assert json.loads((tmp_path / "s.jsonl").read_text()) == {"adapter": "a/b", "task": "t\n", "index": 0}
    parts = [("a_b", "c"), ("a", "b_c"), ("../a", "b/c"), ("a", "c")]
    names = names_of_samples(parts)
    assert len(set(names.values())) == 4 and names["a", "c"] == "samples_a_c.jsonl"
    assert all(name.startswith("samples_") and "/" not in name for name in names.values())


def test_metrics_over_all_labels_have_no_score_of_one_answer():
    assert example_score("matthews", "yes ", ["yes"]) == {"correct": 1.0}
    assert example_score("f1", "a b", ["b c"]) == {"f1": 2 / 3}
