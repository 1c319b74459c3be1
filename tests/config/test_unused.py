"""What a config sets although nothing reads it is named, and nothing else is."""

from pathlib import Path

import pytest

from para_jax import load_config
from para_jax.config.unused import unused_fields

ROOT = Path(__file__).parents[2]


def unused(*overrides, file=None):
    return [line.split("=")[0] for line in unused_fields(load_config(file, overrides))]


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_configs_that_come_along_set_nothing_in_vain(file):
    assert unused(file=file) == []


TENANTS = "data.tenants=tenants"
RANKED = "eval.choices=[good, bad]"


@pytest.mark.parametrize(
    "vain, useful",
    [
        (("data.validation=b.jsonl", TENANTS), ("data.validation=b.jsonl",)),
        (("train.num_epochs=3", "train.max_steps=5"), ("train.num_epochs=3",)),
        (("train.learning_rate=0.5", "sweep.learning_rate=[0.1, 0.2]"), ("train.learning_rate=0.5",)),
        (("train.rows_per_tenant=4",), ("train.rows_per_tenant=4", TENANTS)),
        (("train.sampling=sqrt",), ("train.sampling=sqrt", TENANTS)),
        ((RANKED, "eval.metric=exact_match"), (RANKED,)),
        ((RANKED, "eval.metric=loss"), (RANKED, "eval.metric=macro_f1")),
        (("eval.max_new_tokens=8", "eval.metric=accuracy"), ("eval.max_new_tokens=8", "eval.metric=macro_f1")),
        (("eval.test_limit=8",), ("eval.test_limit=8", "eval.test=true")),
    ],
)
def test_a_field_that_nothing_reads_is_named(vain, useful):
    assert unused(*vain) == [vain[0].split("=")[0]]
    assert unused(*useful) == []


@pytest.mark.parametrize(
    ("override", "metrics"),
    [(RANKED, {"exact_match"}), (RANKED, {"f1", "loss"}), ("eval.max_new_tokens=8", {"accuracy"})],
)
def test_the_metric_of_the_data_decides_where_the_config_has_none(override, metrics):
    (line,) = unused_fields(load_config(None, [override]), metrics)
    assert line.startswith(override.split("=")[0]) and all(metric in line for metric in metrics)
    assert not list(unused_fields(load_config(None, [override]), {*metrics, "macro_f1"}))


def test_what_a_field_says_already_is_not_named():
    assert unused("train.sampling=proportional", "eval.choices=[]", "eval.metric=loss") == []
