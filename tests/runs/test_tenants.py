"""A run of many tenants: each learns what it would alone and ends by itself, and the whole resumes with its bits."""

import hashlib
import json
import math
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from long_cases import quick
from tiny_run import run_config, run_folder, tokenizer, write_tenants
from tiny_scores import score

from para_jax import (
    load_adapter,
    load_backbone,
    load_model_config,
    train,
    train_tenants,
)
from para_jax.cli import main
from para_jax.config import load_config, save_config
from para_jax.data.batches import collate
from para_jax.data.example_arrays import ExampleArrays
from para_jax.evaluation.score import Score
from para_jax.evaluation.scoring import Tasks
from para_jax.evaluation.tasks import task_of_run
from para_jax.reports.inspect import folder_report
from para_jax.runs import loop, scoring
from para_jax.runs import tenants as inputs
from para_jax.runs.folder import claim_folders
from para_jax.runs.plan import plan_run
from para_jax.runs.tenants import sweep_configs
from para_jax.training.log import TIMES
from para_jax.training.step import train_step
from para_jax.training.stop import Stopped, StopSignal

SIZES = {"acme": 20, "globex": 9, "initech": 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A backbone, data for a run of one, and three tenants, of whom one has no validation data."""
    folder = run_folder(tmp_path_factory.mktemp("tenants"))
    write_tenants(folder / "tenants", SIZES)
    return folder


def tenants_config(folder, output, *overrides):
    return run_config(
        folder, f"data.tenants={folder / 'tenants'}", f"output_dir={output}", "train.rows_per_tenant=4",
        "train.max_steps=null", "train.num_epochs=2", *overrides,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(folder):
    """A run that nothing disturbed: two of three tenants in a batch."""
    config = tenants_config(folder, folder / "whole", "eval.test=true", "checkpoint.every=2")
    return config, train_tenants(config)


def metrics(folder):
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def weights_of(output, name):
    return hashlib.sha256((Path(output) / name / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def all_that_stays(output):
    """What a run leaves that does not depend on its times, nor on where it lies."""
    named = {name: (weights_of(output, name), metrics(Path(output) / name)) for name in SIZES}
    return named, metrics(output), json.loads((Path(output) / "tenants.json").read_text())


def adapter_of(config, name):
    return load_adapter(Path(config.output_dir) / name / "adapter", load_model_config(config.backbone.source))


# ------------------------------------------------------------------------------------------------------ what it leaves


@pytest.mark.long
def test_each_tenant_has_a_run_folder_of_its_own(whole):
    config, result = whole
    assert list(result.tenants) == sorted(SIZES)
    steps = {name: entry["steps"] for name, entry in result.tenants.items()}
    assert steps == {"acme": 10, "globex": 6, "initech": 6}  # two epochs of rows of 4
    for name in SIZES:
        own = load_config(result.output_dir / name / "config.yaml")
        assert own.data.tenants is None and Path(own.data.train or "").stem == name
        rows = metrics(result.output_dir / name)
        assert [row["step"] for row in rows if "loss" in row] == list(range(1, steps[name] + 1))
        losses = [row["loss"] for row in rows if "loss" in row]
        assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.2
        scored = [row["step"] for row in rows if "validation_loss" in row]
        assert scored == {"acme": [0, 3, 6, 9, 10], "globex": [0, 3, 6], "initech": []}[name]
        tested = [row["step"] for row in rows if "test_before_loss" in row or "test_after_loss" in row]
        assert tested == ([] if name == "initech" else [steps[name]] * 2)
        entry = result.tenants[name]
        if name != "initech":
            scores = {row["validation_loss"]: row["step"] for row in rows if row["step"] and "validation_loss" in row}
            assert (entry["best_step"], entry["best_score"]) == (scores[min(scores)], -min(scores))  # of trained ones
            for when in ("test_before", "test_after"):
                assert [-row[f"{when}_loss"] for row in rows if f"{when}_loss" in row] == [entry[when]]
        assert entry["examples"] == SIZES[name] and entry["ended"] == "done"
        card = (result.output_dir / name / "adapter" / "README.md").read_text()
        assert f"Trained for {entry['best_step']} steps on " in card and "one run with 2 others" in card
    rows = metrics(result.output_dir)
    assert sum(row.get("tenants", 0) for row in rows) == sum(steps.values())
    scored = {name.removesuffix("_stderr") for row in rows for name in row if "/" in name}
    assert scored == {"acme/validation_loss", "globex/validation_loss"}


def test_inspect_lists_the_tenants_with_their_scores(whole, folder, tmp_path):
    _, result = whole
    said = folder_report(result.output_dir)
    assert "3 tenants of" in said and "not ended" not in said
    for name, entry in result.tenants.items():
        row = next(line for line in said.splitlines() if line.startswith(name))
        steps = [str(entry["steps"]), str(entry["best_step"])]
        if name == "initech":
            assert row.split() == [name, "-", "-", "-", "-", "-", *steps, "-"]
            continue
        before, after = (entry["scores"][what]["values"] for what in ("test_base", "test"))
        cells = [text for of in (before, after) for text in (f"{of['loss']:.4f}", "±", f"{of['loss_stderr']:.4f}")]
        assert row.split() == [name, "loss", *cells, "5", f"{after['loss']:.4f}", *steps, "test"]
        assert before["loss"] == -entry["test_before"] and after["loss"] == -entry["test_after"]
    assert result.report() in said and not re.search(r"-\d", result.report())
    assert "train loss" not in said and "acme" in folder_report(result.output_dir / "acme")
    config = tenants_config(folder, tmp_path / "run")
    claim_folders(config, plan_run(config).tenants)
    assert "no tenant has ended yet" in folder_report(tmp_path / "run")


def test_the_command_trains_them_and_prints_one_table(folder, tmp_path, capsys):
    save_config(tenants_config(folder, tmp_path / "run"), tmp_path / "run.yaml")
    assert main(["train", str(tmp_path / "run.yaml"), "--results", str(tmp_path / "results.json")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"tenant +metric +base +adapter +n +loss +steps +best step +data\n", said)
    assert re.search(r"initech( +-){5} +6 +6 +-\n", said)
    scores = json.loads((tmp_path / "results.json").read_text())["scores"]
    assert {name: entry["steps"] for name, entry in scores.items()} == {"acme": 10, "globex": 6, "initech": 6}


# ------------------------------------------------------------------------------------------------------- as if it alone


def test_a_tenant_learns_what_a_run_of_it_alone_learns(whole, folder, tmp_path):
    config, result = whole
    alone = run_config(
        folder, f"data.train={folder / 'tenants' / 'acme'}", f"output_dir={tmp_path / 'run'}",
        "train.max_steps=null", "train.num_epochs=2", "train.per_device_batch_size=4",
    )  # fmt: skip
    found = train(alone)
    ours, theirs = metrics(result.output_dir / "acme"), metrics(tmp_path / "run")
    for name in ("loss", "grad_norm", "learning_rate", "validation_loss"):
        values = [[(row["step"], row[name]) for row in rows if name in row] for rows in (ours, theirs)]
        assert len(values[0]) > 3
        np.testing.assert_allclose(*values, rtol=1e-4)
    assert found.best_step == result.tenants["acme"]["best_step"]
    pairs = zip(jax.tree.leaves(adapter_of(config, "acme")), jax.tree.leaves(found.adapter), strict=True)
    for mine, other in pairs:
        np.testing.assert_allclose(mine, other, atol=1e-4)


def test_a_tenants_batches_do_not_depend_on_the_lengths_of_other_tenants():
    """Only the shapes that they are padded to do, and each batch fits into its shape."""
    draw, data = np.random.default_rng(0), {}
    for name, longest in (("acme", 60), ("globex", 300)):
        sizes = draw.integers(1, longest, (50, 2))
        data[name] = SimpleNamespace(examples=ExampleArrays(np.ones(sizes.sum(), np.int32), sizes))
    config = load_config(None, ["data.tenants=x", "seed=3"])
    alone, shapes = {}, {}
    for names in (["acme"], ["globex"], [*data]):
        found, plans = inputs.plan_batches(
            config, dict.fromkeys(names, config), {name: data[name] for name in names}, 4
        )
        for name, plan in plans.items():
            batches = [plan.batch_indices(i) for i in range(2 * plan.batches_per_epoch)]
            assert alone.setdefault(name, [held for _, held in batches]) == [held for _, held in batches]
            for shape, held in batches:
                collate([data[name].examples[i] for i in held], found[shape], 4)
            shapes[len(names), name] = found
    assert shapes[1, "acme"] != shapes[2, "acme"]


@pytest.mark.parametrize("tenants", [1, 2])
def test_a_short_run_compiles_fewer_shapes_for_the_batches_of_a_long_one(tenants):
    """So a run that is made longer goes on with the examples that it would have had."""
    sizes = np.random.default_rng(0).integers(1, 200, (400, 2))
    data = {f"t{i}": SimpleNamespace(examples=ExampleArrays(np.ones(sizes.sum(), np.int32), sizes))
            for i in range(tenants)}  # fmt: skip
    batches, counts = [], []
    for steps in (20, 5000):
        config = load_config(None, [f"train.max_steps={steps}"])
        shapes, plans = inputs.plan_batches(config, dict.fromkeys(data, config), data, 4)
        found = [plans["t0"].batch_indices(i) for i in range(plans["t0"].batches_per_epoch)]
        for shape, held in found:
            collate([data["t0"].examples[i] for i in held], shapes[shape], 4)
        batches.append([held for _, held in found])
        counts.append(len(shapes))
    assert counts == [1, 3] and batches[0] == batches[1]


@pytest.mark.parametrize("method", quick(["para", "lora", "ia3"], "para"))
def test_a_tenants_bits_do_not_depend_on_the_other_tenants(method, folder, tmp_path):
    options = [f"adapter.method={method}", "adapter.r=4", "adapter.summary=raw", "train.max_steps=4"]
    if method != "para":
        options = [options[0], options[-1], *(["adapter.r=4"] if method == "lora" else [])]
    ends = []
    for others in ({"globex": 9}, {"hooli": 15}):
        to = tmp_path / "-".join(others)
        write_tenants(to / "tenants", {"acme": 20} | others)
        config = load_config(None, [
            f"backbone.source={folder / 'backbone'}", f"data.tenants={to / 'tenants'}", f"output_dir={to / 'run'}",
            "train.rows_per_tenant=4", "data.buckets=1", "mesh.data=1", "eval.metric=loss", "eval.batch_size=8",
            "logging.report_to=[]", "runtime.compilation_cache=false", "runtime.allow_cpu=true", "eval.every=2",
            *options,
        ])  # fmt: skip
        train_tenants(config)
        ends.append((weights_of(to / "run", "acme"), metrics(to / "run" / "acme")))
    assert ends[0] == ends[1]


@pytest.mark.long
def test_tenants_that_wait_for_a_place_learn_the_same_also_after_stops(whole, folder, tmp_path, monkeypatch):
    _, result = whole
    config = tenants_config(folder, tmp_path / "run", "train.tenants_at_once=1", "eval.test=true")
    found = train_tenants(config)
    for name, entry in result.tenants.items():
        assert found.tenants[name]["steps"] == entry["steps"]
        losses = [[row["loss"] for row in metrics(r.output_dir / name) if "loss" in row] for r in (result, found)]
        np.testing.assert_allclose(*losses, rtol=1e-3)
    stopped = tenants_config(folder, tmp_path / "stopped", "train.tenants_at_once=1", "eval.test=true")
    for at in (6, 10):  # in the middle of the first, and before it has left its place
        monkeypatch.setattr(StopSignal, "reached", lambda self, step, at=at: step == at)
        with pytest.raises(Stopped):
            train_tenants(stopped)
        monkeypatch.undo()
    train_tenants(stopped)
    assert all_that_stays(tmp_path / "stopped") == all_that_stays(tmp_path / "run")


@pytest.mark.long
def test_the_best_adapter_is_tested_also_where_the_test_is_stopped(folder, tmp_path, monkeypatch):
    """The best one takes the last one's place in the stack, and a stop saves the stack as it is then."""
    real, finish = scoring.evaluate, scoring.finish
    scores = Tasks.scores

    def gets_no_better(run, due):
        if max(one.steps for one in run.standing.tenants) <= 3:
            return real(run, due)
        for tenant in due:
            run.standing.tenants[tenant].evaluated = run.standing.tenants[tenant].steps

    def run(name):
        options = "eval.test=true", "train.max_steps=9", "train.sampling=uniform"
        return train_tenants(tenants_config(folder, tmp_path / name, *options))

    monkeypatch.setattr(scoring, "evaluate", gets_no_better)
    found = run("run")
    assert [found.tenants[name]["best_step"] for name in SIZES] == [3, 3, 9]
    task = task_of_run(load_config(tmp_path / "run" / "acme" / "config.yaml"), "test", tokenizer())
    kept = load_adapter(tmp_path / "run" / "acme" / "adapter", load_model_config(folder / "backbone"))
    by_itself = score(load_backbone(folder / "backbone"), kept, task, tokenizer())
    assert found.tenants["acme"]["test_after"] == pytest.approx(by_itself.score, rel=1e-5)

    def stopped(tasks, *given):
        os.kill(os.getpid(), signal.SIGTERM)
        return scores(tasks, *given)

    def ends(run, tenant, why):
        if run.tenants[tenant].name == "acme":
            patched.setattr(Tasks, "scores", stopped)
        return finish(run, tenant, why)

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(scoring, "finish", ends)
        run("stopped")
    run("stopped")
    assert all_that_stays(tmp_path / "stopped") == all_that_stays(tmp_path / "run")


# -------------------------------------------------------------------------------------------------------------- endings


def test_who_ends_early_leaves_the_batch_to_the_others_without_a_compilation(folder, tmp_path, monkeypatch, capfd):
    real = scoring.evaluate

    def globex_gets_no_better(run, due):
        real(run, due)
        (globex,) = (one for one in run.standing.tenants if one.name == "globex")
        globex.since_best = globex.evaluated

    monkeypatch.setattr(scoring, "evaluate", globex_gets_no_better)
    config = tenants_config(folder, tmp_path / "run", "eval.patience=3", "train.max_steps=9", "train.sampling=uniform")
    before = train_step._cache_size()
    found = train_tenants(config)
    assert train_step._cache_size() - before <= 1
    said = capfd.readouterr().err
    assert {n: (e["steps"], e["ended"]) for n, e in found.tenants.items()} == {
        "acme": (9, "done"), "globex": (3, "patience"), "initech": (9, "done"),
    }  # fmt: skip
    assert "globex: 3 steps, best validation loss " in said and "(patience; 1 of 3 tenants have ended)" in said
    with_globex = [row["step"] for row in metrics(tmp_path / "run" / "globex") if "loss" in row]
    assert with_globex == [1, 2, 3]
    parts = [row["tenants"] for row in metrics(tmp_path / "run") if "tenants" in row]
    assert sum(parts) == 9 + 3 + 9 and parts.count(1) <= 1  # the two that are left share the rows


def sweep_config(folder, output, rates, *overrides):
    return run_config(
        folder, f"output_dir={output}", f"sweep.learning_rate=[{rates}]", "train.rows_per_tenant=4",
        "train.max_steps=6", "eval.every=2", *overrides,
    )  # fmt: skip


@pytest.mark.long
def test_a_tenant_that_is_not_finite_stops_alone_and_keeps_its_last_good_adapter(folder, tmp_path, capfd):
    sound = train_tenants(sweep_config(folder, tmp_path / "sound", "0.03, 0.01"))
    capfd.readouterr()
    config = sweep_config(folder, tmp_path / "run", "0.03, 1e30")
    save_config(config, tmp_path / "run.yaml")
    assert main(["train", str(tmp_path / "run.yaml")]) == 1
    said = capfd.readouterr()
    good, bad = "learning_rate-0.03", "learning_rate-1e30"
    assert weights_of(tmp_path / "run", good) == weights_of(tmp_path / "sound", good)
    assert metrics(tmp_path / "run" / good) == metrics(tmp_path / "sound" / good)
    assert re.search(rf"{bad}: stopped at its step \d: the .* on .*train.jsonl:\d+.* the others continue", said.err)
    assert re.search(rf"^best: {good}, with validation loss \d", said.out, re.MULTILINE)
    assert re.search(rf"{bad} +loss .*not finite", said.out)
    entries = json.loads((tmp_path / "run" / "tenants.json").read_text())
    assert entries[bad]["ended"] == "not finite" and entries[bad]["steps"] < 6
    assert entries[good] == sound.tenants[good]
    made = load_adapter(tmp_path / "run" / bad / "adapter", load_model_config(config.backbone.source))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(made))


@pytest.mark.parametrize("at_once", [1])
def test_a_tenant_whose_new_weights_are_not_finite_stops_alone(at_once, folder, tmp_path, capfd):
    options = "train.up_lr_ratio=4", "train.warmup_ratio=0", "eval.base=false", f"train.tenants_at_once={at_once}"
    found = train_tenants(sweep_config(folder, tmp_path / "run", "3e38, 0.03", *options)).tenants
    ends = {name: (entry["ended"], entry["steps"]) for name, entry in found.items()}
    assert ends == {"learning_rate-3e38": ("not finite", 0), "learning_rate-0.03": ("done", 6)}
    said = capfd.readouterr().err
    assert re.search(
        r"learning_rate-3e38: stopped at its step 1: the new weights are not finite on .*train.jsonl", said
    )


def test_a_tenant_whose_validation_loss_is_not_finite_stops_at_that_step(folder, tmp_path, monkeypatch):
    """It learns nothing more, although its training loss is finite."""

    def scores(tasks, stack, slots):
        losses = {tenant: math.nan if tenant else 1.0 for tenant in slots}
        return {tenant: Score("validation", "loss", -1.0, loss, 8) for tenant, loss in losses.items()}

    monkeypatch.setattr(Tasks, "scores", scores)
    found = train_tenants(sweep_config(folder, tmp_path / "run", "0.03, 0.01", "eval.base=false")).tenants
    ends = {name: (entry["ended"], entry["steps"], entry["best_step"]) for name, entry in found.items()}
    assert ends == {"learning_rate-0.03": ("done", 6, 2), "learning_rate-0.01": ("not finite", 2, 2)}


def test_no_step_waits_for_the_test_data_and_a_sweep_tests_the_base_model_once(folder, tmp_path, monkeypatch):
    order, scores, step = [], Tasks.scores, loop.train_step
    monkeypatch.setattr(Tasks, "scores", lambda tasks, *given: (order.append(tasks.split), scores(tasks, *given))[1])
    monkeypatch.setattr(loop, "train_step", lambda *given, **static: (order.append("step"), step(*given, **static))[1])
    found = train_tenants(sweep_config(folder, tmp_path / "run", "0.03, 0.01", "eval.test=true")).tenants
    assert order[0] == "validation" and order[-3:] == ["test"] * 3 and order.count("test") == 3  # base, and two tenants
    assert len({entry["test_before"] for entry in found.values()} - {None}) == 1


@pytest.mark.parametrize("lost", [False, True])
def test_a_run_that_is_killed_after_tenants_ended_ends_with_the_same_entries(lost, folder, tmp_path, monkeypatch):
    """Of those before the newest checkpoint, after it, and still to come; also if a disk lost the file."""
    options = "sweep.seed=[0, 1, 2]", "train.tenants_at_once=1", "train.max_steps=2", "checkpoint.every=3"
    train_tenants(sweep_config(folder, tmp_path / "whole", "0.03", *options))
    config, file = sweep_config(folder, tmp_path / "run", "0.03", *options), tmp_path / "run" / "tenants.json"
    real, calls = loop.train_step, []

    def killed(*arguments, **settings):
        calls.append(None)
        if len(calls) == 6:
            raise RuntimeError("killed")
        return real(*arguments, **settings)

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
        patched.setattr(loop, "train_step", killed)
        train_tenants(config)
    assert "learning_rate-0.03-seed-0" in json.loads(file.read_text())
    if lost:
        file.unlink()
    train_tenants(config)
    assert file.read_bytes() == (tmp_path / "whole" / "tenants.json").read_bytes()


# --------------------------------------------------------------------------------------------------------------- sweeps


@pytest.mark.long
def test_a_sweep_trains_every_combination_on_the_same_data(folder, tmp_path):
    found = train_tenants(sweep_config(folder, tmp_path / "run", "0.03, 0.003", "sweep.seed=[0, 7]"))
    assert list(found.tenants) == [f"learning_rate-{r}-seed-{s}" for r in ("0.03", "0.003") for s in (0, 7)]
    for name in found.tenants:
        own, rows = load_config(tmp_path / "run" / name / "config.yaml"), metrics(tmp_path / "run" / name)
        peak = max(row["learning_rate"] for row in rows if "loss" in row)
        np.testing.assert_allclose(peak, own.train.learning_rate, rtol=1e-6)
        assert name == f"learning_rate-{own.train.learning_rate}-seed-{own.seed}" and not own.sweep
        assert own.train.per_device_batch_size == 4
    firsts = {name: metrics(tmp_path / "run" / name)[1]["loss"] for name in found.tenants}
    assert len(set(firsts.values())) == 2  # the order of the examples is the seed's
    alone = run_config(
        folder, f"output_dir={tmp_path / 'alone'}", "seed=7", "train.learning_rate=0.003", "train.max_steps=6",
        "train.per_device_batch_size=4",
    )  # fmt: skip
    train(alone)
    losses = [
        [row["loss"] for row in metrics(to) if "loss" in row]
        for to in (tmp_path / "run" / "learning_rate-0.003-seed-7", tmp_path / "alone")
    ]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_a_combination_is_named_by_what_is_swept(folder, tmp_path):
    def names(sweep):
        config = load_config(None, [f"output_dir={tmp_path}", *sweep])
        return list(sweep_configs(config))

    rates, seeds = ["sweep.learning_rate=[3e-4, 1e-3]"], ["sweep.seed=[0, 7]"]
    assert names(rates) == ["learning_rate-0.0003", "learning_rate-0.001"]
    assert names(seeds) == ["seed-0", "seed-7"]
    assert names(rates + seeds)[:2] == ["learning_rate-0.0003-seed-0", "learning_rate-0.0003-seed-7"]


# ----------------------------------------------------------------------------------------------------- stop and resume


@pytest.mark.parametrize("at", quick([1, 4, 7, 10], 4, 10))  # after the last of them a tenant has done its last step
def test_a_run_that_was_stopped_ends_with_the_bits_of_one_that_was_not(at, whole, folder, tmp_path, monkeypatch):
    config = tenants_config(folder, tmp_path / "run", "eval.test=true", "checkpoint.every=2")
    real = StopSignal.reached
    monkeypatch.setattr(StopSignal, "reached", lambda self, step: step == at or real(self, step))
    with pytest.raises(Stopped):
        train_tenants(config)
    monkeypatch.undo()
    train_tenants(config)
    assert all_that_stays(tmp_path / "run") == all_that_stays(whole[1].output_dir)


def test_a_finished_run_that_is_started_again_changes_nothing(whole):
    config, result = whole
    before = all_that_stays(result.output_dir)
    assert train_tenants(config).tenants == result.tenants
    assert all_that_stays(result.output_dir) == before


@pytest.mark.long
def test_a_run_stopped_at_its_very_end_logs_nothing_twice_when_started_again(whole, folder, tmp_path, monkeypatch):
    """Nothing is saved after its endings, which come anew each time: they must not be logged twice."""
    last = max(row["step"] for row in metrics(whole[1].output_dir))
    config = tenants_config(folder, tmp_path / "run", "eval.test=true", "checkpoint.every=2")
    monkeypatch.setattr(StopSignal, "reached", lambda self, step: step == last)
    with pytest.raises(Stopped):
        train_tenants(config)
    monkeypatch.undo()
    for _ in range(2):
        train_tenants(config)
        assert all_that_stays(tmp_path / "run") == all_that_stays(whole[1].output_dir)


@pytest.mark.long
def test_what_a_non_finite_tenant_changes_does_not_depend_on_a_stop(folder, tmp_path, monkeypatch):
    rates, ends = "1e30, 0.03", []
    for at in (None, 2, 3):
        config = sweep_config(folder, tmp_path / str(at), rates, "eval.every=4", "checkpoint.every=100")
        if at:
            monkeypatch.setattr(StopSignal, "reached", lambda self, step, at=at: step == at)
            with pytest.raises(Stopped):
                train_tenants(config)
            monkeypatch.undo()
        train_tenants(config)
        to = tmp_path / str(at)
        ends.append([(weights_of(to, p.name), metrics(p)) for p in sorted(to.glob("learning_rate-0*"))])
        ends[-1].append(metrics(to))  # who was in which batch, too
    assert ends[0] == ends[1] == ends[2] and len(ends[0]) == len(rates.split(","))


@pytest.mark.long
def test_a_longer_run_of_tenants_goes_on_with_the_bits_of_a_long_one(folder, tmp_path):
    own = "train.schedule=constant", "train.warmup_ratio=0", "train.sampling=uniform"
    short, long = ([*own, "eval.test=true", f"train.max_steps={steps}"] for steps in (3, 6))
    first = train_tenants(tenants_config(folder, tmp_path / "run", *short))
    assert {entry["steps"] for entry in first.tenants.values()} == {3}
    found = train_tenants(tenants_config(folder, tmp_path / "run", *long))
    expected = train_tenants(tenants_config(folder, tmp_path / "long", *long))
    assert {entry["steps"] for entry in found.tenants.values()} == {6}
    for name in SIZES:
        assert weights_of(tmp_path / "run", name) == weights_of(tmp_path / "long", name)
        assert metrics(tmp_path / "run" / name) == metrics(tmp_path / "long" / name)
        assert found.tenants[name] == expected.tenants[name]
    with pytest.raises(ValueError, match="train.max_steps: .*3 steps of acme.* has done 6"):
        train_tenants(tenants_config(folder, tmp_path / "run", *short))


def test_a_tenant_that_gave_its_place_away_does_not_go_on(folder, tmp_path):
    options = "sweep.seed=[0, 1]", "train.tenants_at_once=1", "eval.base=false"
    train_tenants(sweep_config(folder, tmp_path / "run", "0.03", *options, "train.max_steps=1"))
    with pytest.raises(ValueError, match="train.max_steps: learning_rate-0.03-seed-0 gave its place .*train.init_from"):
        train_tenants(sweep_config(folder, tmp_path / "run", "0.03", *options, "train.max_steps=2"))


# ------------------------------------------------------------------------------------------------------------- packing


@pytest.mark.long
def test_packed_tenants_learn_what_packed_runs_of_them_alone_learn(folder, tmp_path):
    packed = "data.packing=true", "data.max_seq_length=32", "adapter.summary=raw", "train.max_steps=3"
    found = train_tenants(tenants_config(folder, tmp_path / "run", *packed))
    assert {entry["steps"] for entry in found.tenants.values()} == {3}
    alone = f"data.train={folder / 'tenants' / 'acme'}", "train.per_device_batch_size=4"
    train(run_config(folder, f"output_dir={tmp_path / 'alone'}", *packed, *alone))
    for name in ("loss", "grad_norm", "tokens"):
        ours, theirs = (
            [row[name] for row in metrics(to) if name in row] for to in (tmp_path / "run" / "acme", tmp_path / "alone")
        )
        np.testing.assert_allclose(ours, theirs, rtol=2e-4)
        assert len(ours) == 3


@pytest.mark.long
def test_a_packed_sweep_resumes_with_its_bits(folder, tmp_path, monkeypatch):
    packed = "data.packing=true", "data.max_seq_length=32", "adapter.summary=raw"
    whole = train_tenants(sweep_config(folder, tmp_path / "whole", "0.03, 0.01", *packed))
    cut = sweep_config(folder, tmp_path / "cut", "0.03, 0.01", *packed)
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(StopSignal, "reached", lambda self, step: step == 3)
        train_tenants(cut)
    assert train_tenants(cut).tenants == whole.tenants
    for name in whole.tenants:
        assert weights_of(tmp_path / "cut", name) == weights_of(tmp_path / "whole", name)


# --------------------------------------------------------------------------------------------------------------- meshes


@pytest.mark.long
def test_a_mesh_equals_one_device(whole, folder, tmp_path):
    _, result = whole
    config = tenants_config(folder, tmp_path / "run", "mesh.data=2", "train.per_device_batch_size=4", "eval.test=true")
    found = train_tenants(config)
    for name, entry in result.tenants.items():
        assert found.tenants[name]["steps"] == entry["steps"]
        losses = [[row["loss"] for row in metrics(r.output_dir / name) if "loss" in row] for r in (result, found)]
        np.testing.assert_allclose(*losses, rtol=1e-3)


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.rows_per_tenant=3", r"train.rows_per_tenant .*train.per_device_batch_size \(8\).* 3"),
        ("sweep.seed=[1, 2]", "sweep .*data.tenants"),
    ],
)
def test_what_can_not_be_is_refused_in_one_line_before_anything_is_written(override, named, folder, tmp_path):
    with pytest.raises(ValueError, match=named) as error:
        train_tenants(tenants_config(folder, tmp_path / "run", override.format(folder=folder)))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_each_of_the_two_ways_to_train_refuses_the_others_config(folder, tmp_path):
    with pytest.raises(ValueError, match="use train_tenants"):
        train(tenants_config(folder, tmp_path / "run"))
    with pytest.raises(ValueError, match="use train:"):
        train_tenants(run_config(folder, f"output_dir={tmp_path / 'run'}"))
    assert not (tmp_path / "run").exists()
