"""A run that goes wrong says so, once and again at its end, and a sound one says nothing."""

from dataclasses import replace

import numpy as np
import pytest
from tiny_run import run_config, run_folder

from para_jax import train, train_tenants
from para_jax.cli import main
from para_jax.config import load_config, save_config
from para_jax.reports.inspect import folder_report
from para_jax.runs import loop
from para_jax.runs.health import Health, Seen, above_base, risen_loss, take
from para_jax.training.stop import Stopped, StopSignal

#: Losses of short runs with 4 rows a step, as they were logged: what a step holds changes the loss by a fifth and more.
SOUND = [
    [6.1, 5.2, 6.4, 4.9, 5.8, 4.1, 4.6, 3.9, 4.8, 3.5, 4.2, 3.1, 3.9, 3.6, 2.8, 3.3],
    [2.5, 1.9, 2.8, 2.1, 2.2, 2.9, 1.8, 2.4, 2.0, 2.7, 2.3, 1.9, 2.6, 2.2, 2.8, 2.4],
]
DIVERGED = [
    [6.1, 5.9, 6.2, 6.0, 5.6, 5.9, 6.3, 6.6, 6.9, 7.0, 6.8, 7.3, 7.2, 7.5, 7.4, 7.4],
    [2.5, 2.3, 2.6, 2.2, 3.1, 4.5, 6.0, 7.4, 8.8, 9.5, 9.9, 10.3, 9.8, 10.1, 10.4, 9.9],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return run_folder(tmp_path_factory.mktemp("health"))


# ------------------------------------------------------------------------------------------------------------ the rules


def seen_of(losses):
    """What Health keeps of these values."""
    seen = Seen()
    for i, loss in enumerate(losses, 1):
        take(seen, i, {"loss": loss, "grad_norm": 1.0})
    return seen


@pytest.mark.parametrize("losses", SOUND)
def test_noise_is_no_rise(losses):
    for length in range(1, len(losses) + 1):
        assert risen_loss(seen_of(losses[:length])) is None


@pytest.mark.parametrize("losses", DIVERGED)
def test_a_loss_above_its_start_has_risen(losses):
    said = risen_loss(seen_of(losses))
    assert said and f"from {np.mean(losses[:4]):.3g} to {np.mean(losses[-4:]):.3g}" in said


def test_a_long_run_is_judged_by_its_ends_and_its_noise_which_are_all_that_is_kept():
    draw, wrong = np.random.default_rng(1), 0
    for _ in range(200):
        losses = np.linspace(3, draw.uniform(3, 4), 150) + draw.normal(0, 0.7, 150)
        rise, noise = losses[-20:].mean() - losses[:20].mean(), np.sqrt((np.diff(losses) ** 2).mean() / 2)
        expected = rise > max(0.05 * losses[:20].mean(), 3 * noise * np.sqrt(2 / 20))
        seen = seen_of(losses)
        said = risen_loss(seen)
        assert (said is not None) == expected and len(seen.losses) == 40
        assert not expected or f"from {losses[:20].mean():.3g} to {losses[-20:].mean():.3g}" in str(said)
        wrong += expected
    assert 20 < wrong < 180


def test_losses_that_do_not_change_seldom_count_as_risen():
    draw = np.random.default_rng(0)
    runs = [3 + draw.normal(0, 0.7, draw.integers(10, 200)) for _ in range(1000)]
    assert sum(risen_loss(seen_of(run)) is not None for run in runs) <= 5
    falling = [run - 2 * np.linspace(0, 1, len(run)) for run in runs]
    assert not any(risen_loss(seen_of(run)) for run in falling)


def test_held_out_losses_are_compared_with_the_base_models_where_both_are_known():
    said = above_base("validation", 7.4, 6.1)
    assert said and "validation" in said and "7.4" in said and "6.1" in said
    assert above_base("test", 6.1, 6.1) is above_base("test", 1.0, 6.1) is above_base("test", 6.15, 6.1) is None
    assert above_base("test", None, 6.1) is above_base("test", 7.0, None) is None


def watched(monkeypatch, rows, name="qtype"):
    said = []
    monkeypatch.setattr("para_jax.runs.health.warn", said.append)
    health = Health(name, load_config(None, ["train.learning_rate=3e-3"]), {})
    for step, values in rows:
        health.watch(step, values)
    return health, said


def test_a_warning_is_said_once_as_soon_as_it_is_seen(monkeypatch):
    losses = [6.0] * 5 + [7.4] * 60
    rows = [(i + 1, {"loss": loss, "grad_norm": 1.0}) for i, loss in enumerate(losses)]
    for length, count in ((9, 0), (10, 1), (65, 1)):
        health, said = watched(monkeypatch, rows[:length])
        assert len(said) == count
    assert said[0].startswith("qtype: loss rose from 6") and "lower train.learning_rate (0.003)" in said[0]
    recovered = [(66 + i, {"loss": 1.0, "grad_norm": 1.0}) for i in range(30)]
    health, said = watched(monkeypatch, rows + recovered, "")
    assert len(said) == 1 and said[0].startswith("loss rose") and health.warning() is None


def test_the_best_validation_loss_counts_against_that_of_step_0(monkeypatch):
    rows = [(0, {"validation_loss": 6.1}), (20, {"validation_loss": 7.4}), (40, {"validation_loss": 9.0})]
    health, said = watched(monkeypatch, rows)
    assert said == [f"qtype: {health.warning()}"] and "7.4 is above the base model's 6.1" in said[0]
    health, _ = watched(monkeypatch, [*rows, (60, {"validation_loss": 3.0})])
    assert health.warning() is None
    tested = [(0, {"test_before_loss": 6.1}), (40, {"test_after_loss": 7.4})]
    assert "test loss 7.4" in str(watched(monkeypatch, tested)[0].warning())


# -------------------------------------------------------------------------------------------------------------- in runs


def losing(monkeypatch, slot):
    """Lets the loss in a slot be logged as one that rises from its 7th step on."""
    real = loop.train_step

    def step(state, *arguments, **settings):
        after = int(state.step[slot])
        state, values = real(state, *arguments, **settings)
        loss = np.array(values["loss"])
        loss[slot] = 6.0 if after < 6 else 7.4
        return state, values | {"loss": loss}

    monkeypatch.setattr(loop, "train_step", step)


def test_a_run_of_one_adapter_that_goes_wrong_says_so_at_its_end(folder, tmp_path, capsys, monkeypatch):
    sound = run_config(
        folder, f"output_dir={tmp_path / 'sound'}", "train.max_steps=12", "eval.every=20", "logging.every=4"
    )
    assert train(sound).warning is None
    save_config(replace(sound, output_dir=str(tmp_path / "run")), tmp_path / "run.yaml")
    losing(monkeypatch, 0)
    for _ in range(2):  # the second time nothing is left to do
        assert main(["train", str(tmp_path / "run.yaml")]) == 0
        said = capsys.readouterr().out.splitlines()[-1]
        assert said == "warning: loss rose from 6 to 7.4; lower train.learning_rate (0.03)"


@pytest.mark.long
def test_each_tenant_has_its_own_warning_also_after_a_resume(folder, tmp_path, monkeypatch):
    config = run_config(
        folder, f"output_dir={tmp_path / 'run'}", "sweep.learning_rate=[0.03, 0.01]", "eval.every=20",
        "train.rows_per_tenant=4", "train.max_steps=12",
    )  # fmt: skip
    losing(monkeypatch, 1)
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(StopSignal, "reached", lambda self, step: step == 8)
        train_tenants(config)
    result = train_tenants(config)
    sound, wrong = result.tenants.values()
    assert sound["warning"] is None
    assert wrong["warning"] == "loss rose from 6 to 7.4; lower train.learning_rate (0.01)"
    report = folder_report(tmp_path / "run")
    assert (
        f"warning: {list(result.tenants)[1]}: {wrong['warning']}" in report and "combinations of a sweep on" in report
    )


@pytest.mark.parametrize("many", [False, True])
def test_a_resumed_run_warns_as_one_that_was_never_stopped_whatever_is_logged(many, folder, tmp_path, monkeypatch):
    losing(monkeypatch, 0)
    sweep = ["sweep.learning_rate=[0.03]", "train.rows_per_tenant=8"] if many else []
    options, warnings = ["train.max_steps=12", "eval.every=20", "logging.every=5", *sweep], []
    for name, stops in (("whole", []), ("cut", [3, 8])):
        config = run_config(folder, f"output_dir={tmp_path / name}", *options)
        for stop in stops:
            with monkeypatch.context() as patched, pytest.raises(Stopped):
                patched.setattr(StopSignal, "reached", lambda self, step, stop=stop: step == stop)
                (train_tenants if many else train)(config)
        result = train_tenants(config).tenants["learning_rate-0.03"]["warning"] if many else train(config).warning
        warnings.append(result)
    assert warnings == ["loss rose from 6 to 7.4; lower train.learning_rate (0.03)"] * 2
