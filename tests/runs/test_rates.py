"""train.learning_rate=auto: trials on validation loss, then the run with the best rate; all of it can be resumed."""

import json
import os
import signal
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny_run import metrics, run_config, run_folder, words, write_rows, write_tenants

from para_jax import load_config, make_mesh, train, train_tenants
from para_jax.runs import plan, rates
from para_jax.runs.rates import choice
from para_jax.runs.standing import TenantStanding
from para_jax.training.checkpoint import finish_saving
from para_jax.training.log import TIMES
from para_jax.training.passes import lay_out
from para_jax.training.stop import Stopped, StopSignal


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return run_folder(tmp_path_factory.mktemp("rates"))


@pytest.fixture
def short(monkeypatch):
    """Trials of two steps."""
    monkeypatch.setattr(rates, "FEWEST", 2)


def auto_config(folder, output, *overrides):
    given = "train.learning_rate=auto", "train.max_steps=3", "eval.every=5"
    return run_config(folder, f"output_dir={output}", *given, *overrides)


def test_the_mesh_has_room_for_the_trials_of_one_adapter(folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(plan, "run_mesh", lambda config, tenants: asked.append((config, tenants)))
    for config in (auto_config(folder, tmp_path), run_config(folder, f"output_dir={tmp_path}")):
        plan.mesh_of_run(config, {"": config})
    (trials, count), (alone, one) = asked
    assert (count, one, alone.many) == (len(rates.FIRST), 1, False)
    slots = lay_out(trials, make_mesh(devices=jax.devices()[:1]), count).slots
    assert slots == count and trials.train.per_device_batch_size == alone.train.per_device_batch_size


# ----------------------------------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize(("losses", "chosen", "said"), [
    ((2.0, 1.0, 1.0, 3.0), 3e-4, ""),
    ((None, 2.0, None, None), 3e-4, ""),
    ((4.0, 3.0, 2.0, 1.0), 3e-3, "edge"),
    ((None,) * 4, 1e-4, "every rate of acme diverged"),
])  # fmt: skip
def test_the_lowest_loss_wins_and_of_equal_ones_the_smaller_rate(losses, chosen, said, capsys):
    tenant = SimpleNamespace(name="acme", config=load_config(None, ["train.learning_rate=auto"]), validation=[])
    found = {}
    for rate, loss in zip(rates.rates_of(tenant.config), losses, strict=True):
        scores = {} if loss is None else {"validation": {"values": {"loss": loss}}}
        name = rates.trial_name(tenant, rate)
        found[name] = TenantStanding(name, steps=20, best_step=20, ended="done", scores=scores)
    assert choice(tenant, found) == chosen
    assert said in capsys.readouterr().err


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
    entries = json.loads((tmp_path / "run" / "learning_rates" / "trials" / "tenants.json").read_text())
    losses = {float(name.removeprefix("learning_rate-")): -one["best_score"] for name, one in entries.items()}
    assert list(losses) == [1e-4, 3e-4, 1e-3, 3e-3] and all(one["steps"] == 2 for one in entries.values())
    best = min(losses, key=losses.__getitem__)
    assert f"{losses[best]:.4f} ± " in said and "chosen" in said
    assert load_config(tmp_path / "run" / "config.yaml").train.learning_rate == best
    (tmp_path / "alone").mkdir()
    alone = load_config(tmp_path / "run" / "config.yaml", [f"output_dir={tmp_path / 'alone' / 'run'}"])
    assert train(alone).best_score == result.best_score and without_times(alone) == without_times(config)

    stopped = auto_config(folder, tmp_path / "stopped")
    for at in (3, 2):  # in the trials, whose run has 8 steps, and then in the run itself
        monkeypatch.setattr(StopSignal, "reached", lambda self, step, at=at: step == at)
        with pytest.raises(Stopped):
            train(stopped)
        monkeypatch.undo()
        monkeypatch.setattr(rates, "FEWEST", 2)
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


def test_each_tenant_has_its_own_rate_and_the_written_config_trains_them_again_to_the_same_bits(
    folder, tmp_path, short, capfd
):
    """Without validation data the rate is the method's default."""
    write_tenants(tmp_path / "tenants", {"acme": 20, "initech": 12})
    options = "train.rows_per_tenant=4", "eval.metric=null", "data.max_seq_length=null"
    first = train_tenants(auto_config(folder, tmp_path / "run", f"data.tenants={tmp_path / 'tenants'}", *options))
    assert "no validation data of initech" in capfd.readouterr().err
    rates = {name: load_config(tmp_path / "run" / name / "config.yaml").train.learning_rate for name in first.tenants}
    assert rates["initech"] == 1e-3 and rates["acme"] in (1e-4, 3e-4, 1e-3, 3e-3)
    again = train_tenants(load_config(tmp_path / "run" / "config.yaml", [f"output_dir={tmp_path / 'again'}"]))
    assert again.tenants == first.tenants
    for name in first.tenants:
        weights = [to / name / "adapter" / "adapter_model.safetensors" for to in (tmp_path / "run", tmp_path / "again")]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_trial_is_scored_once_at_its_end_on_a_bounded_number_of_examples(folder, tmp_path, short, monkeypatch):
    monkeypatch.setattr(rates, "EXAMPLES", 5)
    config = auto_config(folder, tmp_path / "run", "eval.every=1", "eval.patience=1")
    train(config)
    found = tmp_path / "run" / "learning_rates" / "trials"
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
