"""train.learning_rate=auto: trials on validation loss, then the run with the best rate; all of it can be resumed."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny_run import metrics, run_config, run_folder, words, write_rows, write_tenants

from para_jax import load_config, make_mesh, train, train_tenants
from para_jax.data.examples import Example
from para_jax.data.records import Record
from para_jax.evaluation.tasks import EvalTask
from para_jax.runs import rates
from para_jax.runs import train as runs
from para_jax.runs.chosen import chosen_rates
from para_jax.runs.rates import Trial, best_step, choice, next_step, rate_of, trial_steps
from para_jax.training.checkpoint import finish_saving
from para_jax.training.log import TIMES
from para_jax.training.passes import lay_out
from para_jax.training.stop import Stopped, StopSignal


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return run_folder(tmp_path_factory.mktemp("rates"))


@pytest.fixture
def short(monkeypatch):
    """Trials of two steps, and no more rounds than the first."""
    monkeypatch.setattr(rates, "FEWEST", 2)
    monkeypatch.setattr(rates, "MORE_ROUNDS", 0)


def auto_config(folder, output, *overrides):
    given = "train.learning_rate=auto", "train.max_steps=3", "eval.every=5"
    return run_config(folder, f"output_dir={output}", *given, *overrides)


def trials(**losses):
    """Trials by their step of the grid: _2 is -2."""
    steps = {int(name.replace("_", "-").removeprefix("s")): loss for name, loss in losses.items()}
    return {step: Trial(rate_of(1e-3, step), loss, 0.1, 20) for step, loss in steps.items()}


def test_the_mesh_has_room_for_the_trials_of_one_adapter(folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(runs, "run_mesh", lambda config, tenants: asked.append((config, tenants)))
    for config in (auto_config(folder, tmp_path), run_config(folder, f"output_dir={tmp_path}")):
        runs.mesh_of_run(config, [config], [SimpleNamespace(names=[""])])
    (trials, count), (alone, one) = asked
    assert (count, one, alone.many) == (len(rates.FIRST), 1, False)
    slots = lay_out(trials, make_mesh(devices=jax.devices()[:1]), count).slots
    assert slots == count and trials.train.per_device_batch_size == alone.train.per_device_batch_size


# ----------------------------------------------------------------------------------------------------------- the choice


def test_the_grid_is_1_3_10_around_the_default():
    assert [rate_of(1e-3, step) for step in range(-4, 4)] == [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
    assert [rate_of(3e-3, step) for step in rates.FIRST] == [3e-4, 9e-4, 3e-3, 9e-3]


def test_the_lowest_loss_wins_and_of_equal_ones_the_smaller_rate():
    assert best_step(trials(s_2=2.0, s_1=1.0, s0=1.0, s1=3.0)) == -1
    assert choice(trials(s_2=2.0, s_1=1.5, s0=1.0, s1=None), 1e-3) == 1e-3


@pytest.mark.parametrize(("limit", "first", "last"), [(None, 0, 2985), (500, 0, 497)])
def test_trials_are_scored_on_examples_of_the_whole_file(limit, first, last):
    """A file may be sorted: the first 200 examples would have few of its answers."""
    records = [Record(str(i), "a", ("a",), None, f"line {i}") for i in range(3000)]
    task = EvalTask("sorted", records, examples=[Example((i,), (1,)) for i in range(3000)])
    found = rates.spread(task, limit)
    assert [int(record.prompt) for record in found.records] == [ids[0] for ids, _ in found.examples]
    assert len(found.records) == 200 and (found.records[0].prompt, found.records[-1].prompt) == (str(first), str(last))
    few = task._replace(records=records[:7], examples=None)
    assert rates.spread(few, limit) == few


def test_a_diverged_trial_never_wins_and_an_edge_is_followed():
    assert best_step(trials(s0=2.0, s1=None)) == 0
    assert next_step(trials(s_1=2.0, s0=1.0, s1=2.0)) is None
    assert next_step(trials(s_1=2.0, s0=1.0)) == 1 and next_step(trials(s_1=1.0, s0=2.0)) == -2
    assert next_step(trials(s0=1.0, s1=None)) == -1  # above the best one is one that diverged
    every = trials(s_1=None, s0=None)
    assert best_step(every) is None and next_step(every) == -2 and choice(every, 1e-3) == 3e-4


@pytest.mark.parametrize(("steps", "of_trial"), [(6, 6), (60, 20), (200, 50), (10_000, 100)])
def test_a_trial_has_a_share_of_the_steps(steps, of_trial):
    assert trial_steps(steps) == of_trial


@pytest.mark.parametrize("sweep", ["sweep.learning_rate=[0.1]", "sweep.seed=[1, 2]"])
def test_a_sweep_of_rates_or_seeds_does_not_go_with_auto(sweep):
    with pytest.raises(ValueError, match=r"train.learning_rate=auto.*sweep"):
        load_config(None, ["train.learning_rate=auto", sweep])
    assert load_config(None, ["train.learning_rate=auto", "sweep.method=[para, lora]"]).train.learning_rate == "auto"


# ----------------------------------------------------------------------------------------------------------------- runs


def without_times(config):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in metrics(config)]


@pytest.mark.long
def test_a_run_with_auto_takes_the_best_rate_and_resumes_in_its_trials_and_after(
    folder, tmp_path, short, monkeypatch, capfd
):
    config = auto_config(folder, tmp_path / "run")
    result = train(config)
    said = capfd.readouterr().err
    held = json.loads((tmp_path / "run" / "learning_rates" / "chosen.json").read_text())
    losses = {one["learning_rate"]: one["loss"] for one in held["trials"]}
    assert list(losses) == [1e-4, 3e-4, 1e-3, 3e-3] and all(one["steps"] == 2 for one in held["trials"])
    best = min(losses, key=losses.__getitem__)
    assert held["rates"] == {"": best} and f"{losses[best]:.4f} ± " in said and "chosen" in said
    assert load_config(tmp_path / "run" / "config.yaml").train.learning_rate == best
    (tmp_path / "alone").mkdir()
    alone = auto_config(folder, tmp_path / "alone" / "run", f"train.learning_rate={best}")
    assert train(alone).best_score == result.best_score and without_times(alone) == without_times(config)

    stopped = auto_config(folder, tmp_path / "stopped")
    for at in (3, 2):  # in the trials, whose run has 8 steps, and then in the run itself
        monkeypatch.setattr(StopSignal, "reached", lambda self, step, at=at: step == at)
        with pytest.raises(Stopped):
            train(stopped)
        monkeypatch.undo()
        monkeypatch.setattr(rates, "FEWEST", 2)
        monkeypatch.setattr(rates, "MORE_ROUNDS", 0)
    assert train(stopped).best_score == result.best_score
    assert without_times(stopped) == without_times(config)
    with pytest.raises(ValueError, match="train.learning_rate.*0.5"):
        train(auto_config(folder, tmp_path / "run", "train.learning_rate=0.5"))


@pytest.mark.long
def test_a_signal_during_the_last_save_of_the_trials_stops_before_the_run(folder, tmp_path, short, monkeypatch, capsys):
    config = auto_config(folder, tmp_path / "run")

    def finish(checkpoints):
        os.kill(os.getpid(), signal.SIGTERM)
        finish_saving(checkpoints)

    with monkeypatch.context() as told, pytest.raises(Stopped):
        told.setattr("para_jax.runs.loop.finish_saving", finish)
        train(config)
    assert capsys.readouterr().err.endswith("\nstopped, and saved; the same command resumes\n")
    assert (tmp_path / "run" / "learning_rates").is_dir() and not (tmp_path / "run" / "metrics.jsonl").exists()
    train(config)
    assert metrics(config)


def test_a_run_that_was_killed_before_the_number_was_written_goes_on(folder, tmp_path, short, monkeypatch):
    doubted = []
    monkeypatch.setattr(runs, "say_doubt", lambda _, own, __: doubted.append([one.train.learning_rate for one in own]))
    config = auto_config(folder, tmp_path / "run")
    first = train(config)
    file = tmp_path / "run" / "config.yaml"
    rate = load_config(file).train.learning_rate
    file.write_text(file.read_text().replace(f"learning_rate: {rate}", "learning_rate: auto", 1))
    assert load_config(file).train.learning_rate == "auto"
    assert train(config).best_score == first.best_score
    assert load_config(file).train.learning_rate == rate
    assert doubted == [["auto"], []]  # a rate that trials chose is not doubted when the run goes on


def test_a_trials_loss_is_that_of_its_checkpoint_whatever_its_log_has_lost(folder, tmp_path, short, monkeypatch):
    config = auto_config(folder, tmp_path / "run")

    def killed(*_):
        for log in (tmp_path / "run").glob("learning_rates/**/metrics.jsonl"):
            log.write_bytes(log.read_bytes()[:-40])
        raise KeyError("as a kill")

    with monkeypatch.context() as patched, pytest.raises(KeyError):
        patched.setattr(rates, "write_chosen", killed)
        train(config)
    train(config)
    trials = json.loads((tmp_path / "run" / "learning_rates" / "chosen.json").read_text())["trials"]
    assert trials and all(one["loss"] is not None for one in trials)


@pytest.mark.long
def test_each_tenant_has_its_own_rate_and_one_without_validation_data_the_default(folder, tmp_path, short, capfd):
    write_tenants(tmp_path / "tenants", {"acme": 20, "initech": 12})
    config = auto_config(folder, tmp_path / "run", f"data.tenants={tmp_path / 'tenants'}", "train.rows_per_tenant=4")
    result = train_tenants(config)
    said = capfd.readouterr().err
    assert "initech" in said and "no validation data" in said
    chosen = chosen_rates(tmp_path / "run")
    assert chosen["initech"] == 1e-3 and set(chosen) == set(result.tenants) == {"acme", "initech"}
    for name, rate in chosen.items():
        assert load_config(tmp_path / "run" / name / "config.yaml").train.learning_rate == rate
    assert train_tenants(config).tenants == result.tenants
    assert sorted(path.name for path in Path(tmp_path / "run" / "learning_rates" / "1").glob("acme-*")) == [
        "acme-0.0001", "acme-0.0003", "acme-0.001", "acme-0.003",
    ]  # fmt: skip


@pytest.mark.long
def test_the_next_rate_is_tried_where_the_best_is_at_the_edge(folder, tmp_path, short, monkeypatch):
    monkeypatch.setattr(rates, "MORE_ROUNDS", 1)
    monkeypatch.setattr(rates, "FIRST", (0,))
    train(auto_config(folder, tmp_path / "run"))
    held = json.loads((tmp_path / "run" / "learning_rates" / "chosen.json").read_text())
    assert [one["learning_rate"] for one in held["trials"]] == [3e-4, 1e-3]


def test_a_trial_is_scored_once_at_its_end_on_a_bounded_number_of_examples(folder, tmp_path, short, monkeypatch):
    monkeypatch.setattr(rates, "EXAMPLES", 5)
    config = auto_config(folder, tmp_path / "run", "eval.every=1", "eval.patience=1")
    train(config)
    found = tmp_path / "run" / "learning_rates" / "1"
    for name in ("learning_rate-0.0001", "learning_rate-0.003"):
        rows = [json.loads(line) for line in (found / name / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if "validation_loss" in row] == [2]
        assert load_config(found / name / "config.yaml").eval.limit == 5
    entries = json.loads((found / "tenants.json").read_text())
    assert all(entry["ended"] == "done" and entry["scores"]["validation"]["count"] == 5 for entry in entries.values())


@pytest.mark.long
def test_trials_of_one_tenant_may_share_steps_of_different_lengths(folder, tmp_path, monkeypatch):
    """Four trials in three groups: one is always behind the others, whose rows have another length."""
    monkeypatch.setattr(rates, "FEWEST", 6)
    monkeypatch.setattr(rates, "MORE_ROUNDS", 0)
    draw = np.random.default_rng(0)
    sizes = [(3, 9), (20, 1)] * 12
    rows = [{"prompt": words(draw.integers(20, 250, p)), "completion": words([9] * c)} for p, c in sizes]
    for split in ("train", "validation"):
        write_rows(tmp_path / "tenants" / "acme" / f"{split}.jsonl", rows)
    config = auto_config(
        folder, tmp_path / "run", f"data.tenants={tmp_path / 'tenants'}", "data.buckets=2", "train.max_steps=6",
        "train.rows_per_tenant=2", "train.per_device_batch_size=6", "adapter.summary=raw",
    )  # fmt: skip
    assert train_tenants(config).tenants["acme"]["steps"] == 6
