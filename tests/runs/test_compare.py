"""compare_methods: each method with its own defaults in a run of its own, and one table of them all."""

import itertools
import json
from pathlib import Path

import pytest
from tiny_run import rows_of_text, run_config, run_folder

from para_jax import (
    LoraConfig,
    ParaConfig,
    compare_methods,
    load_config,
    train,
    train_tenants,
)
from para_jax.adapters.names import named_adapters
from para_jax.cli import main
from para_jax.config import ADAPTER_CONFIGS, save_config
from para_jax.io.hub import resolve_adapter
from para_jax.reports.inspect import folder_report
from para_jax.runs import compare
from para_jax.runs import train as runs
from para_jax.runs.compare import MethodScore, compared, comparison_table, method_configs
from para_jax.runs.scoring import NotFinite
from para_jax.training.scores_file import read_scores
from para_jax.training.stop import Stopped, StopSignal


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return run_folder(tmp_path_factory.mktemp("compare"))


def methods_config(folder, output, *overrides):
    return run_config(
        folder, f"output_dir={output}", "train.max_steps=2", "eval.every=2", "train.learning_rate=null", *overrides
    )


def row(method, score, metric="loss", **fields):
    given = dict(name="", folder="", parameters=1000, learning_rate=1e-3, ended="done", stderr=0.01, count=8, loss=1.0)
    rest = dict(step=2, test=None, test_stderr=None, warning=None)
    return MethodScore(**(dict(method=method, metric=metric, score=score) | given | rest | fields))


# ------------------------------------------------------------------------------------------------------------- configs


def test_each_method_has_its_own_defaults_and_the_given_fields_are_those_of_adapter_method(folder, tmp_path):
    config = methods_config(folder, tmp_path, "sweep.method=[lora, para, ia3]")
    made = method_configs(config)
    assert list(made) == ["lora", "para", "ia3"] and not any(own.sweep.method for own in made.values())
    for method, own in made.items():
        assert own.train.learning_rate == ADAPTER_CONFIGS[method].default_learning_rate
        assert own.output_dir == str(tmp_path / method) and own.data == config.data
    assert made["para"].adapter == ParaConfig(r=4, summary="rms") and made["lora"].adapter == LoraConfig()
    rated = method_configs(methods_config(folder, tmp_path, "sweep.method=[para, lora]", "train.learning_rate=0.5"))
    assert [own.train.learning_rate for own in rated.values()] == [0.5, LoraConfig.default_learning_rate]
    swept = methods_config(folder, tmp_path, "sweep.method=[para, lora]", "sweep.learning_rate=[0.1, 0.2]")
    assert all(own.many and own.sweep.learning_rate == (0.1, 0.2) for own in method_configs(swept).values())


def test_a_scope_is_for_all_methods(folder, tmp_path):
    for methods, window in (("[para, lora, ia3]", 1), ("[lora, ia3]", 4)):
        asked = [f"sweep.method={methods}", "adapter.scope=response", f"adapter.scope_window={window}"]
        asked += ["adapter.method=lora"] * (window > 1)
        for method, own in method_configs(load_config(None, asked)).items():
            assert own.adapter == ADAPTER_CONFIGS[method](scope="response", scope_window=window)
    narrow = load_config(None, ["sweep.method=[para, lora]", "adapter.scope=prompt", "adapter.r=5"])
    assert [own.adapter.r for own in method_configs(narrow).values()] == [5, LoraConfig().r]


@pytest.mark.parametrize(("overrides", "named"), [
    (["sweep.method=[para, bitfit]"], "sweep.method.*para, lora, ia3.*bitfit"),
    (["sweep.method=[para]", "data.tenants=x"], "sweep.*data.tenants"),
])  # fmt: skip
def test_what_does_not_fit_together_is_refused(overrides, named):
    with pytest.raises(ValueError, match=named):
        load_config(None, overrides)


def test_a_single_run_does_not_take_several_methods(folder, tmp_path):
    with pytest.raises(ValueError, match="use compare_methods"):
        train(methods_config(folder, tmp_path, "sweep.method=[para, lora]"))
    with pytest.raises(ValueError, match="use compare_methods"):
        train_tenants(methods_config(folder, tmp_path, "sweep.method=[para, lora]", "sweep.seed=[1, 2]"))


# --------------------------------------------------------------------------------------------------------------- table


def test_the_best_comes_first_and_those_without_a_score_last():
    found = [row("para", 0.5), row("ia3", None, stderr=None, loss=None, ended="not finite"), row("lora", 0.4)]
    assert [one.method for one in sorted(found, key=lambda one: one.order)] == ["lora", "para", "ia3"]
    accurate = [row("para", 0.5, "accuracy"), row("lora", 0.4, "accuracy", test=0.3, test_stderr=0.1)]
    assert [one.method for one in sorted(accurate, key=lambda one: one.order)] == ["para", "lora"]
    shown = comparison_table(accurate).splitlines()
    assert shown[0].split() == "method parameters rate validation accuracy examples loss test accuracy".split()
    assert "0.4000 ± 0.0100" in shown[2] and "0.3000 ± 0.1000" in shown[2] and "1,000" in shown[2]
    assert "not finite" in comparison_table(found) and "test" not in comparison_table(found)


@pytest.mark.parametrize("listed", list(itertools.permutations(["para", "lora", "ia3"])))
def test_of_equal_scores_the_lowest_loss_is_the_best_in_whatever_order_methods_are_listed(listed):
    losses = {"para": 13.06, "lora": 12.84, "ia3": 12.79}
    tied = [row(name, 0.125, "accuracy", loss=losses[name]) for name in listed]
    result = compared(tied, "runs")
    assert [one.method for one in result.methods] == ["ia3", "lora", "para"]
    said = "\n".join(result.choice_lines())
    assert said.startswith("best score: ia3") and "ia3, lora, para have the same score; ia3 has the lowest" in said
    equal = compared([one._replace(loss=1.0) for one in tied], "runs")
    assert [one.method for one in equal.methods] == ["ia3", "lora", "para"], "by name, never as listed"
    assert not any("same score" in line for line in compared([tied[0], row("far", 0.5, "accuracy")], "").choice_lines())


def test_methods_whose_difference_may_be_noise_are_reported_as_not_told_apart():
    right = [1.0] * 60
    wrong = {"lora": 0, "para": 3, "ia3": 30, "base": 40}
    rows = {name: [0.0] * count + right[count:] for name, count in wrong.items()}
    found = [row(name, sum(held) / 60, "accuracy", rows=held, count=60) for name, held in rows.items()]
    result = compared(found, "runs")
    assert result.base and result.base.score == pytest.approx(1 / 3) and len(result.methods) == 3
    assert [one.method for one in result.all if one.within_noise] == ["para"]
    said = result.choice_lines()
    assert "lora, para are not told apart (differences within noise, 60 examples)" in said and len(said) == 2
    lines = result.report().splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["lora", "para", "ia3", "base"] and lines[-1] == said[-1]
    assert ["within noise of the best" in line for line in lines[1:5]] == [False, True, False, False]
    few = compared([one._replace(rows=rows[one.method][25:31], count=6) for one in found], "runs")
    assert "lora, para, ia3, the base model are not told apart" in few.choice_lines()[-1]
    other = compared([found[0], found[1]._replace(rows=rows["para"][:50])], "runs")
    assert not any(one.within_noise for one in other.all), "other examples can't be paired"


def test_a_base_model_that_scores_better_is_named():
    found = [row("para", 0.5, "accuracy"), row("base", 0.75, "accuracy"), row("lora", 0.25, "accuracy")]
    assert any("base model" in line for line in compared(found, "runs").choice_lines())
    assert not any("base model" in line for line in compared([found[0], found[2]], "runs").choice_lines())


def test_the_f1_of_free_text_is_in_the_table():
    found = [row("para", 1.5, loss=1.5, f1=0.5), row("lora", 1.25, loss=1.25, f1=0.625)]
    head, first, _ = comparison_table(compared(found, "runs").all).splitlines()
    assert head.split() == "method parameters rate validation loss examples f1".split()
    assert first.split()[-1] == "0.6250"


# ----------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.long
def test_the_command_trains_all_methods_with_one_backbone_and_resumes(folder, tmp_path, monkeypatch, capsys):
    config = methods_config(folder, tmp_path / "run", "sweep.method=[para, ia3]", "eval.test=true")
    save_config(config, tmp_path / "run.yaml")
    loads, real = [], runs.load_backbone
    monkeypatch.setattr(runs, "load_backbone", lambda *a, **k: loads.append(1) or real(*a, **k))
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        stops = iter([False, False, False, True, True])  # in the second method's run
        patched.setattr(StopSignal, "reached", lambda self, step: next(stops))
        compare_methods(config)
    there = [one["method"] for one in json.loads((tmp_path / "run/comparison.json").read_text())]
    assert loads == [1] and there == ["para", "base"]
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "para, ia3 on" in said and "| para | " in said and "| ia3 | " not in said and "no adapter" not in said
    assert main(["train", str(tmp_path / "run.yaml"), "--results", str(tmp_path / "results.json")]) == 0
    assert loads == [1, 1]
    said = capsys.readouterr().out
    assert "method" in said and "para" in said and "ia3" in said and "comparison.md" in said
    found = json.loads((tmp_path / "run" / "comparison.json").read_text())
    assert f"best score: {found[0]['method']}, in {found[0]['folder']}/adapter" in said
    *found, base = found
    assert named_adapters([str(tmp_path / "run")]) == {
        method: str(tmp_path / "run" / method / "adapter") for method in ("ia3", "para")
    }
    with pytest.raises(ValueError, match="run has no adapter_config.json"):
        resolve_adapter(tmp_path / "run")
    assert [*found, base] == json.loads((tmp_path / "results.json").read_text())["scores"]["methods"]
    first = read_scores(tmp_path / "run" / "para")
    assert base["score"] == first["validation_base"]["values"]["loss"]
    assert base["test"] == first["test_base"]["values"]["loss"]
    assert len(base["rows"]) == 8 and sum(base["rows"]) / 8 == pytest.approx(base["score"], abs=1e-5)
    assert [one["score"] for one in found] == sorted(one["score"] for one in found)
    for one in found:
        rows = [json.loads(line) for line in (Path(one["folder"]) / "metrics.jsonl").open()]
        scored = {name: value for line in rows for name, value in line.items() if line["step"] == 2}
        assert (one["score"], one["stderr"]) == (scored["validation_loss"], scored["validation_loss_stderr"])
        assert one["test"] == scored["test_after_loss"] and (one["count"], one["ended"]) == (8, "done")
        assert one["learning_rate"] == ADAPTER_CONFIGS[one["method"]].default_learning_rate
        assert (Path(one["folder"]) / "adapter" / "adapter_config.json").is_file()
        assert read_scores(Path(one["folder"]))["validation"]["values"]["loss"] == one["score"]
        assert one["rows"] == read_scores(Path(one["folder"]))["validation"]["rows"] and len(one["rows"]) == 8
    table = (tmp_path / "run" / "comparison.md").read_text()
    assert "| base | 0 | - |" in table and "best score: " in table
    assert table.startswith("| method | parameters | rate |") and table in folder_report(tmp_path / "run")
    (tmp_path / "run" / "comparison.md").unlink()
    assert "no method has ended yet" in folder_report(tmp_path / "run")
    assert load_config(tmp_path / "run" / "config.yaml") == config


@pytest.mark.long
def test_a_method_that_is_not_finite_is_listed_and_the_others_continue(folder, tmp_path, monkeypatch):
    """Its adapter of the first score is there. The rows come from Python, and only the test data are scored."""
    config = methods_config(folder, tmp_path / "run", "sweep.method=[lora, para]", "data.train=null", "eval.test=true")
    real = compare.trained

    def broken(own, shared):
        ended = real(own, shared)
        if "lora" in own.output_dir:
            raise NotFinite("step 2: the loss is nan")
        return ended

    monkeypatch.setattr(compare, "trained", broken)
    result = compare_methods(config, {"train": rows_of_text(20, seed=1), "test": rows_of_text(5, seed=3)})
    assert {one.method: one.ended for one in result.methods} == {"lora": "not finite", "para": "done"}
    assert [(one.metric, one.score, one.test is None) for one in result.methods] == [
        (None, None, True), ("loss", None, False),
    ]  # fmt: skip
