"""The public `evaluate`: what it takes as adapters and tasks, and what its results give."""

import json
import sys

import pandas as pd
import pytest
from tiny_harness import command
from tiny_run import rows_of_text, run_config

from para_jax import AdapterBank, EvalOptions, evaluate, load_adapter, load_backbone, load_tokenizer, stack_adapters
from para_jax.cli import main


@pytest.fixture(scope="module")
def loaded(folder):
    """The model, its tokenizer, and the adapters A and B."""
    model, tokenizer = load_backbone(folder / "backbone"), load_tokenizer(folder / "backbone")
    return model, tokenizer, {name: load_adapter(folder / name / "adapter", model.config) for name in "AB"}


@pytest.fixture(scope="module")
def both(folder, loaded):
    """The results of two adapters and the base model on the task labels."""
    model, tokenizer, _ = loaded
    return evaluate(model, f"{folder}/?/adapter", folder / "labels", tokenizer=tokenizer)


def losses(results):
    return {row["adapter"]: row["value"] for row in results.rows() if row["metric"] == "loss"}


def test_adapters_may_be_one_a_bank_a_dict_folders_or_a_pattern(folder, loaded, both):
    model, tokenizer, adapters = loaded
    places = {name: folder / name / "adapter" for name in "AB"}
    bank = AdapterBank.holding(adapters, model.config)
    assert list(losses(both)) == ["base", "A", "B"] and len(set(losses(both).values())) == 3
    for given in (bank, adapters, places, adapters | {"B": places["B"]}, [str(places["A"]), f"B={places['B']}"]):
        found = evaluate(model, given, folder / "labels", tokenizer=tokenizer)
        assert losses(found) == pytest.approx(losses(both), rel=1e-5)
    one = evaluate(model, adapters["A"], folder / "labels", tokenizer=tokenizer)
    assert losses(one) == {"adapter": pytest.approx(losses(both)["A"], rel=1e-5)}
    none = evaluate(model, None, folder / "labels", tokenizer=tokenizer)
    assert losses(none) == {"base": pytest.approx(losses(both)["base"], rel=1e-5)}


def test_tasks_may_be_paths_rows_data_frames_and_runs(folder, loaded, both):
    model, tokenizer, adapters = loaded
    rows = [json.loads(line) for line in (folder / "labels" / "test.jsonl").read_text().splitlines()]
    run = run_config(folder, f"data.test={folder / 'labels' / 'test.jsonl'}", "eval.metric=accuracy",
                     "eval.choices=['w10 w11', 'w9']")  # fmt: skip
    scored = {"a": rows, "b": pd.DataFrame(rows), "c": folder / "labels", "d": run}
    found = evaluate(model, adapters, scored, tokenizer=tokenizer).rows()
    expected = [(row["adapter"], row["metric"], row["examples"]) for row in both.rows()]
    for task in scored:
        rows_of_task = [row for row in found if row["task"] == task]
        assert [(row["adapter"], row["metric"], row["examples"]) for row in rows_of_task] == expected
        values = [row["value"] for row in rows_of_task]
        assert values == pytest.approx([row["value"] for row in both.rows()], rel=1e-5)
    alone = evaluate(model, None, rows_of_text(3, 0), tokenizer=tokenizer)
    assert {row["task"] for row in alone.rows()} == {"rows"}
    metrics = evaluate(model, None, {"mine:f1": rows}, tokenizer=tokenizer).rows()
    assert [(row["task"], row["metric"]) for row in metrics] == [("mine", "f1"), ("mine", "loss")]


def test_the_command_prints_the_table_of_the_same_call(folder, loaded, tmp_path, capsys):
    model, tokenizer, _ = loaded
    assert main(command(folder, tmp_path / "a", tasks=["labels"])) == 0
    printed = capsys.readouterr().out
    adapters, options = [folder / name / "adapter" for name in "AB"], EvalOptions(rows=4)
    results = evaluate(model, adapters, folder / "labels", tokenizer=tokenizer, output=tmp_path / "b", options=options)
    assert results.table().splitlines()[:-1] == printed.splitlines()[:-1]  # the last line says how long it took
    assert {path.name for path in (tmp_path / "b").iterdir()} == {path.name for path in (tmp_path / "a").iterdir()}
    assert losses(results) == {name: made["results"]["labels"]["loss,none"] for name, made in results.records.items()}


def test_results_are_a_table_a_data_frame_and_a_picture(both, monkeypatch):
    assert str(both) == both.table() and both.table().startswith("| adapter | labels accuracy | labels loss |")
    frame = both.to_dataframe()
    assert list(frame.columns) == ["adapter", "task", "metric", "value", "stderr", "examples"]
    assert frame.to_dict("records") == both.rows()
    figure = both.plot()
    assert len(figure.axes) == 1 and [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["A", "B"]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="to_dataframe: pandas is not installed"):
        both.to_dataframe()


def test_what_can_not_be_evaluated_is_named(folder, loaded):
    model, tokenizer, adapters = loaded
    labels = folder / "labels"
    for given, tasks, options, said in (
        (3, labels, {}, "adapters is a int; give an adapter"),
        (stack_adapters([adapters["A"]]), labels, {}, "adapters is a Stack"),
        ({"base": adapters["A"]}, labels, {}, "'base'.* name of the base model"),
        ("nowhere/x/adapter", labels, {}, "nowhere/x/adapter"),
        (None, [], {}, "tasks: the list is empty"),
        (None, {"a": "no-such-task"}, {}, r"tasks\['a'\]: no-such-task is no file"),
        (None, [[{"prompt": "w1"}]], {}, "in a list is no path or task; .*{name: rows}"),
        (None, "no/such.jsonl", {}, "^tasks 'no/such.jsonl': no such file"),
        (None, [labels, labels], {}, "^tasks: labels:accuracy is given more than once"),
        (None, run_config(folder, f"data.train={labels / 'test.jsonl'}"), {}, "data.test is not set"),
        (None, labels, {"shuffle_prompts": True}, "shuffle_prompts requires an adapter"),
        (adapters, labels, {"shard": "0/2"}, "shard 0/2 requires an output"),
        (None, labels, {"own": True}, "^own requires adapters and one folder as tasks"),
    ):
        with pytest.raises(ValueError, match=said):
            evaluate(model, given, tasks, tokenizer=tokenizer, options=EvalOptions(**options))


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("limit", 0, "limit must be .* got 0"),
        ("split", "train", "split must be one of validation, test; got 'train'"),
        ("shard", "3/3", "'3/3' is no shard"),
    ],
)
def test_an_option_out_of_range_is_named(field, value, said):
    with pytest.raises(ValueError, match=said):
        EvalOptions(**{field: value})
