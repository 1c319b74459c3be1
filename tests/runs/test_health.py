"""At its end, a run warns if its adapter is worse than the base model."""

from tiny_run import run_config, run_folder

from para_jax import train, train_tenants
from para_jax.reports.inspect import folder_report
from para_jax.runs import notices
from para_jax.runs.notices import worse_than_base


def scores(split, base, adapter, metric="loss", before=0.5, after=0.5):
    records = ((f"{split}_base", base, before), (split, adapter, after))
    return {name: {"metric": metric, "values": {metric: score} | {"loss": loss}} for name, loss, score in records}


def test_held_out_losses_are_compared_with_the_base_models_where_both_are_known():
    said = worse_than_base(scores("validation", 6.1, 7.4), 3e-3)
    assert said == "validation loss 7.4 is above the base model's 6.1; lower train.learning_rate (0.003)"
    assert str(worse_than_base(scores("test", 6.1, 7.4), 1.0)).startswith("test loss 7.4")
    for held in (scores("test", 6.1, 6.15), scores("test", 6.1, 1.0), {}, {"test": {}}):
        assert worse_than_base(held, 1.0) is None


def test_a_loss_that_rises_with_a_better_metric_is_no_warning():
    assert worse_than_base(scores("test", 6.1, 7.4, "accuracy", 0.5, 0.6), 1.0) is None
    assert worse_than_base(scores("test", 6.1, 7.4, "accuracy", 0.5, 0.5), 1.0)


def test_a_run_warns_at_its_end_and_in_its_report(tmp_path, monkeypatch):
    folder = run_folder(tmp_path)
    options = "eval.metric=loss", "train.max_steps=4", "eval.every=4"
    assert train(run_config(folder, f"output_dir={tmp_path / 'sound'}", *options)).warning is None
    monkeypatch.setattr(notices, "ABOVE_BASE", -1.0)  # then no adapter is good enough
    result = train_tenants(run_config(folder, f"output_dir={tmp_path / 'run'}", "sweep.seed=[0, 1]", *options))
    warnings = {name: entry["warning"] for name, entry in result.tenants.items()}
    assert all("above the base model's" in warning for warning in warnings.values())
    report = folder_report(tmp_path / "run")
    assert all(f"warning: {name}: {warning}" in report for name, warning in warnings.items())
