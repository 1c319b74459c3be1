"""Many tenants scored in one pass: each gets the score that it gets alone."""

import numpy as np
import pytest
from golden_models import FIXTURES, strong
from long_cases import long
from tiny_run import rows_of_text, tokenizer, words, write_rows
from tiny_scores import samples, score

from para_jax import Ia3Config, LoraConfig, ParaConfig, init_adapter, load_backbone, stack_adapters
from para_jax.data.records import read_records
from para_jax.evaluation import writing
from para_jax.evaluation.scoring import Tasks
from para_jax.evaluation.tasks import EvalTask

CHOICES = ("w9", "w9 w10", "w30 w31 w32 w33")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Three tenants' tasks of 5, 3 and 6 records, and one tenant without."""
    made = []
    for tenant, count in enumerate((5, 3, 6)):
        rows = rows_of_text(count, seed=tenant)
        draw = np.random.default_rng(tenant)
        for row in rows:
            row["prompt"] = words(draw.integers(20, 256, int(draw.integers(3, 9))))
        made.append(read_records(write_rows(tmp_path_factory.mktemp("data") / "test.jsonl", rows)))
    return made


def of(tasks, metric):
    choices, also = (CHOICES, ("macro_f1",)) if metric in ("accuracy", "matthews") else ((), ())
    how = dict(max_new_tokens=4, also=also)
    made = [EvalTask(f"t{i}", r, metric, choices, **how) for i, r in enumerate(tasks)]
    return [*made[:2], None, made[2]]


def answered(model, adapter, task):
    """The task, where every second reference is what this adapter answers alone: a score that no other has."""
    if task.metric == "loss":
        return task
    given = samples(model, adapter, task, tokenizer())
    right = [one._replace(references=(its["given"],)) for one, its in zip(task.records, given, strict=True)]
    return task._replace(records=[one if i % 2 else right[i] for i, one in enumerate(task.records)])


@pytest.mark.parametrize("metric", ["loss", long("accuracy"), long("matthews"), "exact_match", long("f1")])
def test_a_tenants_score_in_a_mixed_pass_is_its_score_alone(tasks, metric):
    model = load_backbone(FIXTURES / "llama")
    adapters = [strong(init_adapter(ParaConfig(r=4), model.config), seed=i) for i in range(3)]
    stack = stack_adapters(adapters)
    alone, made = {0: adapters[2], 1: adapters[0], 3: None}, of(tasks, metric)
    made = [one and answered(model, alone[i], one) for i, one in enumerate(made)]
    found = Tasks(model, tokenizer(), made, rows=4).scores(stack, {0: 2, 1: 0, 2: 1, 3: -1})
    assert sorted(found) == [0, 1, 3]  # tenant 2 has no task
    for tenant, adapter in alone.items():
        theirs = score(model, adapter, made[tenant], tokenizer(), rows=4)
        assert metric in ("loss", "matthews") or theirs.score > 0
        named = found[tenant].name, found[tenant].metric, found[tenant].count
        assert named == (theirs.name, theirs.metric, theirs.count)
        np.testing.assert_allclose(found[tenant].loss, theirs.loss, rtol=1e-5)
        np.testing.assert_allclose(found[tenant].score, theirs.score, rtol=1e-5)
        np.testing.assert_allclose(found[tenant].stderr, theirs.stderr, rtol=1e-5)
        assert found[tenant].also == theirs.also and len(theirs.also) == (metric in ("accuracy", "matthews"))
    assert len({round(score.loss, 4) for score in found.values()}) == 3


@pytest.mark.parametrize("order", [(0, 1, 2), long((2, 0, 1))])
def test_tenants_of_different_metrics_score_in_one_pass_as_they_do_alone(tasks, order):
    """One ranks choices, one writes short and one long answers, one has a loss only."""
    model, metrics = load_backbone(FIXTURES / "llama"), ("accuracy", "exact_match", "loss", "f1")
    given = [tasks[i] for i in (*order, 0)]
    mixed = [
        EvalTask(f"t{i}", records, metric, CHOICES if metric == "accuracy" else (), max_new_tokens=new)
        for i, (records, metric, new) in enumerate(zip(given, metrics, (4, 3, 4, 7), strict=True))
    ]
    adapters = [strong(init_adapter(ParaConfig(r=4), model.config), seed=i, scale=0.3) for i in range(4)]
    mixed = [answered(model, adapter, task) for adapter, task in zip(adapters, mixed, strict=True)]
    found = Tasks(model, tokenizer(), mixed, rows=4).scores(stack_adapters(adapters), {i: i for i in range(4)})
    for i, adapter in enumerate(adapters):
        alone = score(model, adapter, mixed[i], tokenizer(), rows=4)
        np.testing.assert_allclose([found[i].loss, found[i].score], [alone.loss, alone.score], rtol=1e-5)
        assert (found[i].metric, found[i].count) == (alone.metric, alone.count)
    assert len({round(score.loss, 4) for score in found.values()}) == 4
    assert all(found[i].score > 0 for i in (0, 1, 3))


@pytest.mark.parametrize("method", [ParaConfig(r=4), LoraConfig(r=4), Ia3Config()], ids=lambda m: type(m).__name__)
def test_a_score_has_the_same_bits_whoever_else_is_scored(tasks, method):
    model = load_backbone(FIXTURES / "llama")
    adapters = [strong(init_adapter(method, model.config), seed=i) for i in range(3)]
    made, stack = Tasks(model, tokenizer(), of(tasks, "loss"), rows=4), stack_adapters(adapters)
    for tenant in (0, 3):
        alone = made.scores(stack, {tenant: 1})[tenant]
        assert made.scores(stack, {0: 1, 1: 0, 3: 1})[tenant] == alone
        adapters[1], kept = strong(adapters[1], seed=9), adapters[1]
        assert made.scores(stack_adapters(adapters), {tenant: 1})[tenant] != alone
        adapters[1] = kept


def test_a_question_of_two_tenants_to_one_adapter_is_answered_once(tasks, monkeypatch):
    """So a sweep's combinations, which share their data, score the backbone once before they are trained."""
    model, rows = load_backbone(FIXTURES / "llama"), []
    real = writing.generate_tokens
    monkeypatch.setattr(writing, "generate_tokens", lambda *a, **k: rows.append(len(a[2])) or real(*a, **k))
    shared = of([tasks[0]] * 3, "f1")
    stack = stack_adapters([strong(init_adapter(ParaConfig(r=4), model.config))])
    made = Tasks(model, tokenizer(), shared, rows=4)
    once = made.scores(stack, {0: -1})
    alone = len(rows)
    thrice = made.scores(stack, {0: -1, 1: -1, 3: -1})
    assert len(rows) == 2 * alone
    assert {(score.score, score.loss) for score in thrice.values()} == {(once[0].score, once[0].loss)}
    mixed = made.scores(stack, {0: -1, 1: 0})
    assert len(rows) > 3 * alone and mixed[1].loss != mixed[0].loss
