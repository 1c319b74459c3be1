"""What a run says before training about examples that its scores leave out."""

import pytest

from para_jax.config import load_config
from para_jax.data.records import Record
from para_jax.evaluation.tasks import EvalTask
from para_jax.runs.notices import say_unscored
from para_jax.runs.tenants import Tenant


def tenants_of(overrides, names, validation, test=None):
    config = load_config(None, overrides)
    tasks = [
        answers and EvalTask(name, [Record("p", answer, (answer,), None, "here") for answer in answers])
        for name, answers in (("validation", validation), ("test", test))
    ]
    return config, [Tenant(name, config, None, None, *tasks) for name in names]


def test_test_data_that_is_missing_is_named(capsys):
    say_unscored(*tenants_of(["eval.test=true"], [""], ["w9"]))
    assert "eval.test=true scores nothing: there is no test data; set data.test\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("split", "advice"), [("null", "set data.validation_split=0.1"), ("0.1", "out none of so few")]
)
def test_tenants_without_validation_data_are_named(capsys, split, advice):
    config, tenants = tenants_of(["data.tenants=x", f"data.validation_split={split}"], ["acme", "late", "new"], ["w9"])
    say_unscored(config, tenants)
    assert capsys.readouterr().err == ""
    say_unscored(config, [tenants[0], *(tenant._replace(validation=None) for tenant in tenants[1:])])
    said = capsys.readouterr().err
    assert "late, new (2 of 3 " in said and "acme" not in said and advice in said


@pytest.mark.parametrize("split", ["null", "0.1"])
def test_a_run_without_validation_data_says_that_nothing_is_scored(capsys, split):
    say_unscored(*tenants_of([f"data.validation_split={split}"], [""], None))
    reason = "set data.validation_split=0.1, or" if split == "null" else "holds out none of so few rows"
    assert "no validation data, so nothing is scored: " in (said := capsys.readouterr().err) and reason in said
