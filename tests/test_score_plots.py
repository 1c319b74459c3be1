"""Bars of scores: what is drawn is what the folders hold. Their looks were judged by eye."""

import json
import math

import pytest

from para_jax.plots import save
from para_jax.score_plots import MAX_BARS, MAX_PANELS, Bar, Scores, read_scores, scores_plot


def widths(axes):
    return [patch.get_width() for patch in axes.patches if type(patch).__name__ == "Rectangle"]


def texts(axes):
    return [text.get_text() for text in axes.texts]


def rows(folder, *values):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values))
    return folder


def entry():
    none = dict.fromkeys(("best_score", "metric", "test_before", "test_after", "warning"))
    return {"examples": 4, "steps": 2, "best_step": 2, "ended": "done", "scores": {}} | none


def result(folder, name, value):
    folder.mkdir(exist_ok=True)
    values = {"alias": "t", "accuracy,none": value, "accuracy_stderr,none": 0.05, "loss,none": 1.5}
    record = {"results": {"t": values}, "n-samples": {"t": {"original": 90, "effective": 60}}}
    (folder / f"{name}.json").write_text(json.dumps(record))


def test_bars_show_scores_errors_and_the_base_model():
    bars = {"PARA": Bar(0.9, 0.04, 60), "LoRA": Bar(0.7, 0.06, 60)}
    figure = scores_plot({"mine": Scores("accuracy", bars, Bar(0.3, 0.05, 60))})
    (axes,) = figure.axes
    assert widths(axes)[:2] == [0.9, 0.7] and texts(axes) == ["0.900 ± 0.040", "0.700 ± 0.060"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["PARA", "LoRA"]
    assert (
        axes.get_title() == "mine, 60 examples, base model 0.300" and axes.get_xlabel() == "accuracy, higher is better"
    )
    assert [line.get_xdata()[0] for line in axes.get_lines() if line.get_linestyle() == "--"] == [0.3]
    said = figure.get_supxlabel()
    assert "one standard error" in said and "dashed line is the base model" in " ".join(said.split())


def test_a_base_score_for_each_bar_is_said_at_it_and_a_loss_is_lower_is_better():
    bars = {"a": Bar(0.4, None, 9), "b": Bar(0.5, None, 7)}
    figure = scores_plot({"t": Scores("loss", bars, {"a": Bar(2.0)})})
    (axes,) = figure.axes
    assert texts(axes) == ["0.400 (base 2.000)", "0.500"] and "lower is better" in axes.get_xlabel()
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["a (9)", "b (7)"]
    said = figure.get_supxlabel()
    assert "diamond" in said and "standard error" not in said


def test_too_many_bars_are_the_best_and_the_worst_and_said():
    figure = scores_plot({"t": Scores("f1", {f"{i}": Bar(i / 100) for i in range(100)})})
    assert widths(figure.axes[0]) == [i / 100 for i in (*range(99, 79, -1), *range(19, -1, -1))]
    assert f"best and the worst {MAX_BARS // 2}" in figure.get_supxlabel()


def test_values_that_cannot_be_drawn_and_names_with_dollars_are_no_error(tmp_path):
    bars = {"$5 and $\\bad{$": Bar(math.nan, math.nan), "b": Bar(1e300, math.inf, 3), "c": Bar(-0.5, 0.1)}
    save(scores_plot({"$\\bad{$": Scores("$\\x{$", bars, Bar(math.inf))}, "$\\y{$"), tmp_path / "s.svg")
    with pytest.raises(ValueError, match="no scores"):
        scores_plot({})


def test_runs_are_bars_of_their_test_scores_beside_the_base_model(tmp_path):
    for name, score in (("a", 0.5), ("b", 0.75)):
        rows(
            tmp_path / name,
            {"step": 0, "test_before_loss": 3.0, "test_before_accuracy": 0.25, "test_before_accuracy_stderr": 0.125},
            {"step": 2, "loss": 1.0},
            {"step": 2, "validation_loss": 1.0, "validation_accuracy": 0.9},
            {"step": 2, "test_after_loss": 1.0, "test_after_accuracy": score, "test_after_accuracy_stderr": 0.0625},
        )
    base = Bar(0.25, 0.125)
    bars = {"a": Bar(0.5, 0.0625), "b": Bar(0.75, 0.0625)}
    assert read_scores([tmp_path / "a", tmp_path / "b"]) == {
        "test accuracy": Scores("accuracy", bars, {"a": base, "b": base})
    }


def test_a_run_without_test_data_is_its_best_validation_score(tmp_path):
    losses = [{"step": step, "validation_loss": loss} for step, loss in ((0, 4.0), (2, 1.0), (4, 2.0))]
    found = read_scores([rows(tmp_path / "a", *losses)])
    assert found == {"best validation loss": Scores("loss", {"a": Bar(1.0)}, {"a": Bar(4.0)})}
    accuracies = [{"step": step, "validation_loss": 1.0, "validation_f1": f1} for step, f1 in ((2, 0.5), (4, 0.25))]
    assert read_scores([rows(tmp_path / "b", *accuracies)])["best validation f1"].bars == {"b": Bar(0.5)}


def test_a_run_of_many_has_a_bar_for_each_tenant_and_a_panel_for_each_metric(tmp_path):
    run = tmp_path / "many"
    rows(run, {"step": 1, "loss": 1.0})
    for name, metric in (("x", "accuracy"), ("y", "f1"), ("z", "accuracy"), ("none", None)):
        scored = {} if metric is None else {"test_after_loss": 1.0, f"test_after_{metric}": 0.5}
        rows(run / name, {"step": 1, "loss": 1.0} | scored)
    (run / "tenants.json").write_text(json.dumps({name: entry() for name in ("x", "y", "z", "none")}))
    found = read_scores([run])
    assert {title: list(scores.bars) for title, scores in found.items()} == {
        "many: test accuracy": ["x", "z"],
        "many: test f1": ["y"],
    }


def record(metric, value, stderr, count):
    values = {"loss": 1.0, metric: value, f"{metric}_stderr": stderr}
    return {"metric": metric, "count": count, "values": values, "samples": []}


def test_a_run_that_recorded_its_scores_also_gives_the_number_of_examples(tmp_path):
    records = {
        "validation": record("f1", 0.9, 0.1, 7), "test_base": record("f1", 0.25, 0.125, 60),
        "test": record("f1", 0.75, 0.0625, 60),
    }  # fmt: skip
    drawn = Scores("f1", {"one": Bar(0.75, 0.0625, 60)}, {"one": Bar(0.25, 0.125, 60)})
    rows(tmp_path / "one", {"step": 2, "test_after_loss": 1.0, "test_after_f1": 0.75})
    (tmp_path / "one" / "scores.json").write_text(json.dumps(records))
    assert read_scores([tmp_path / "one"]) == {"test f1": drawn}
    del records["test"], records["test_base"]
    (tmp_path / "one" / "scores.json").write_text(json.dumps(records))
    assert read_scores([tmp_path / "one"]) == {"best validation f1": Scores("f1", {"one": Bar(0.9, 0.1, 7)})}
    many = {"x": entry() | {"scores": records}, "y": entry() | {"scores": {"test": record("loss", 0.5, 0.1, 3)}}}
    rows(tmp_path / "many", {"step": 1, "loss": 1.0})
    (tmp_path / "many" / "tenants.json").write_text(json.dumps(many))
    assert read_scores([tmp_path / "many"]) == {
        "many: best validation f1": Scores("f1", {"x": Bar(0.9, 0.1, 7)}),
        "many: test loss": Scores("loss", {"y": Bar(0.5, 0.1, 3)}),
    }


def test_an_evaluation_has_a_bar_for_each_adapter_and_a_panel_for_each_task(tmp_path):
    for name, value in (("base", 0.25), ("mine", 0.75)):
        result(tmp_path / "e", name, value)
    (tmp_path / "e" / "other.json").write_text("[5]")
    (tmp_path / "e" / "deep.json").write_text("[" * 100000)
    assert read_scores([tmp_path / "e"]) == {
        "t": Scores("accuracy", {"mine": Bar(0.75, 0.05, 60)}, Bar(0.25, 0.05, 60))
    }


def test_results_of_several_calls_in_one_folder_all_have_their_bars(tmp_path):
    """One call may use another metric, or other examples. In the second case the base model gets a bar, not a line."""
    for name in ("base", "mine"):
        result(tmp_path / "e", name, 0.5)
    other = {"alias": "t", "f1,none": 0.75}
    (tmp_path / "e" / "other.json").write_text(json.dumps({"results": {"t": other}}))
    assert read_scores([tmp_path / "e"]) == {
        "t, accuracy": Scores("accuracy", {"mine": Bar(0.5, 0.05, 60)}, Bar(0.5, 0.05, 60)),
        "t, f1": Scores("f1", {"other": Bar(0.75)}),
    }
    more = {"results": {"t": {"accuracy,none": 0.75}}, "n-samples": {"t": {"original": 90, "effective": 90}}}
    (tmp_path / "e" / "other.json").write_text(json.dumps(more))
    bars = {"base": Bar(0.5, 0.05, 60), "mine": Bar(0.5, 0.05, 60), "other": Bar(0.75, None, 90)}
    assert read_scores([tmp_path / "e"]) == {"t": Scores("accuracy", bars)}


def test_what_is_not_drawn_of_many_tasks_is_said(tmp_path, caplog):
    names = [f"t{i:02}" for i in range(MAX_PANELS + 6)]
    for count in (MAX_PANELS, len(names)):
        assert not caplog.messages
        values = {task: {"f1,none": 0.5} for task in names[:count]}
        (tmp_path / "mine.json").write_text(json.dumps({"results": values}))
        assert list(read_scores([tmp_path])) == names[:MAX_PANELS]
    (said,) = caplog.messages
    assert said == "of 18 sets of scores the first 12 are drawn; without t12, t13, t14, t15, t16 ..."


def test_tenants_that_were_asked_their_own_task_only_share_a_panel(tmp_path):
    """Even if a file's name differs from its tenant's."""
    asked = {"base": ["x", "a b", "z"], "x": ["x"], "a_b": ["a b"], "z": ["z"]}
    for name, tasks in asked.items():
        metrics = {task: "loss" if task == "z" else "f1" for task in tasks}
        values = {task: {f"{metric},none": 0.5 if name == "base" else 0.75} for task, metric in metrics.items()}
        (tmp_path / f"{name}.json").write_text(json.dumps({"results": values}))
    base, bar = Bar(0.5), Bar(0.75)
    assert read_scores([tmp_path]) == {
        "each tenant's own task, f1": Scores("f1", {"x": bar, "a b": bar}, {"x": base, "a b": base}),
        "each tenant's own task, loss": Scores("loss", {"z": bar}, {"z": base}),
    }
    (tmp_path / "base.json").unlink()
    assert [scores.base for scores in read_scores([tmp_path]).values()] == [None, None]


@pytest.mark.parametrize(
    "record",
    [
        {"results": {"t": 5}},
        {"results": {"t": {"accuracy,none": "0.5"}}},
        {"results": {"t": {"accuracy,none": True, "accuracy_stderr,none": {}}}, "n-samples": 3},
        {"results": [1]},
    ],
)
def test_results_of_another_form_are_no_scores(tmp_path, record):
    (tmp_path / "a.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=str(tmp_path)):
        read_scores([tmp_path])


def test_a_folder_without_scores_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}: no scores"):
        read_scores([tmp_path])
    with pytest.raises(ValueError, match="no score is there yet"):
        read_scores([rows(tmp_path / "a", {"step": 1, "loss": 1.0})])
