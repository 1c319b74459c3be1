"""Tenants of scope `response` share prompts: each is computed once, and the answers are those of each tenant alone."""

import numpy as np
import pytest
from golden_models import backbone
from long_cases import slow
from tiny_questions import CONFIGS, ROWS, answers, asked, bank_of, by_hand
from tiny_run import tokenizer

from para_jax.data.examples import Example
from para_jax.data.records import Record
from para_jax.evaluation import shared_prompts
from para_jax.evaluation.answers import Answerer
from para_jax.evaluation.questions import Generation
from para_jax.evaluation.shapes import plan_shapes
from para_jax.evaluation.shared_prompts import shared_batches, shares_prompts
from para_jax.evaluation.tasks import EncodedTask, EvalTask
from para_jax.model.tail import prompt_states

NAMES = "AEF"


def planned(questions):
    """Shapes in which whole rows are scored, and answers of 4 tokens are written."""
    examples = [Example(list(one.context), list(one.continuation)) for one in questions]
    records = [Record("", "", ("",), None, "")] * len(examples)
    task = EvalTask("t", records, "exact_match", max_new_tokens=4, examples=examples)
    return plan_shapes([EncodedTask(task, examples, [])])


def computed(monkeypatch):
    """The prompts that are computed for all tenants, as they come."""
    seen, real = [], prompt_states

    def noted(model, tokens):
        seen.extend(tuple(row[row > 0].tolist()) for row in tokens if row.any())  # others fill up a batch
        return real(model, tokens)

    monkeypatch.setattr(shared_prompts, "prompt_states", noted)
    return seen


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "layout", "whole_rows"),
    [
        slow("llama", "layers", False),
        ("gemma3_text", "stacked", True),
        slow("llama", "layers", True),
        slow("gemma3_text", "stacked", False),
    ],
)
def test_scores_are_those_of_the_teacher_forced_pass(family, layout, whole_rows):
    questions = [(tenant, one) for one in asked()[:9] for tenant in (*NAMES, None)]
    shapes = planned([one for _, one in questions]) if whole_rows else None
    answerer = Answerer(backbone(family, layout), bank_of(family, NAMES), tokenizer(), rows=ROWS, shapes=shapes)
    for (tenant, one), found in zip(questions, answerer.answer(questions), strict=True):
        nats, greedy = by_hand(family, NAMES, tenant, one)
        assert found.logprob == pytest.approx(nats, rel=2e-5, abs=2e-4)
        assert found.greedy == greedy


@pytest.mark.long
def test_scores_do_not_depend_on_who_else_is_asked():
    mixed = answers("llama", [(tenant, one) for one in asked() for tenant in NAMES], NAMES)
    assert len({one.logprob for one in mixed}) == len(mixed)  # every tenant scores otherwise
    for i, tenant in enumerate(NAMES):
        assert answers("llama", [(tenant, one) for one in asked()], NAMES) == mixed[i :: len(NAMES)]
    few = answers("llama", [("F", one) for one in asked()[5:8]], NAMES)
    assert few == mixed[NAMES.index("F") :: len(NAMES)][5:8]


@pytest.mark.long
def test_a_prompt_is_computed_once_for_all_who_share_it(monkeypatch):
    seen = computed(monkeypatch)
    answers("llama", [(tenant, one) for one in asked() for tenant in (*NAMES, None)], NAMES)
    assert sorted(seen) == sorted({one.context for one in asked()})
    seen.clear()
    answers("llama", [(tenant, one) for one in asked()[:3] for tenant in ("A", None)], NAMES)
    assert seen == []


@pytest.mark.parametrize("name", CONFIGS)
def test_those_share_whose_prompts_run_plain(name):
    assert shares_prompts(bank_of("llama", name).entry(name)) == (name in "EFGH")


@pytest.mark.long
def test_texts_are_those_that_generate_writes(monkeypatch):
    seen = computed(monkeypatch)
    contexts = sorted({one.context for one in asked()})
    model, bank, own = backbone("llama"), bank_of("llama", NAMES), tokenizer()
    answerer = Answerer(model, bank, own, rows=ROWS, shapes=planned(asked()))
    found = answerer.answer([(name, Generation(one, 4)) for one in contexts for name in NAMES])
    assert sorted(ids for ids in seen if ids != (0,)) == contexts
    assert len({one.text for one in found}) > len(contexts)
    for i, name in enumerate(NAMES):
        alone = Answerer(model, bank, own, rows=ROWS)  # its engine writes
        assert [one.text for one in found[i :: len(NAMES)]] == [
            one.text for one in alone.answer([(name, Generation(ids, 4)) for ids in contexts])
        ]


@pytest.mark.long
def test_with_planned_shapes_a_prompt_that_one_tenant_reads_is_not_shared(monkeypatch):
    seen = computed(monkeypatch)
    questions = [("E", one) for one in asked()] + [("A", one) for one in asked()]
    answerer = Answerer(backbone("llama"), bank_of("llama", NAMES), tokenizer(), rows=ROWS, shapes=planned(asked()))
    found = answerer.answer(questions)
    assert seen == [] and len({one.logprob for one in found}) == len(found)


@pytest.mark.parametrize("repeats", [[1, 1, 1], [5, 1, 9, 2, 1, 1], [4, 4, 4, 4, 4], [13]])
def test_every_question_is_in_one_batch_with_the_states_of_its_own_prompt(repeats):
    model = backbone("llama")
    distinct = [tuple(range(3, 6 + i)) for i in range(len(repeats))]
    contexts = [one for one, times in zip(distinct, repeats, strict=True) for _ in range(times)]
    met = []
    for batch, states in shared_batches(model, contexts, ROWS, lambda _: 16):
        assert 0 < len(batch) <= ROWS
        met += batch
        for row, i in enumerate(batch):
            tokens = np.zeros((ROWS, 16), np.int32)
            tokens[0, : len(contexts[i])] = contexts[i]
            own = prompt_states(model, tokens)
            place, n = states.row[row], len(contexts[i])
            np.testing.assert_allclose(states.keys[:, place, :, :n], own.keys[:, 0, :, :n], atol=1e-5)
    assert met == list(range(len(contexts)))
