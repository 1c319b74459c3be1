"""Scores in a mixed pass: those of the teacher-forced pass, the same bits alone and mixed, from the context alone."""

import numpy as np
import pytest
from golden_models import backbone
from long_cases import slow
from tiny_questions import answers, asked, bank_of, by_hand

from para_jax import forward
from para_jax.evaluation import likelihood
from para_jax.evaluation.questions import Likelihood


@pytest.mark.parametrize(("family", "layout"), [("llama", "layers"), slow("gemma3_text", "stacked")])
def test_a_score_is_that_of_the_teacher_forced_pass(family, layout):
    names = "ABCD" if family == "llama" else "A"
    long = [one for one in asked() if len(one.context) > 16] if family != "llama" else asked()
    questions = [(tenant, one) for one in long[:6:2] for tenant in (*names, None)]
    for (tenant, one), found in zip(questions, answers(family, questions, names, layout=layout), strict=True):
        nats, greedy = by_hand(family, names, tenant, one)
        assert found.logprob == pytest.approx(nats, rel=2e-5, abs=2e-4)
        assert found.greedy == greedy


def test_only_what_greedy_decoding_writes_is_greedy():
    context = asked()[0].context
    ids = list(context)
    for _ in range(4):
        padded = np.array([ids + [0] * (32 - len(ids))])
        logits = forward(backbone("llama"), bank_of("llama").rows(["A"]), padded, len(context), len(ids))
        ids.append(int(logits[0, len(ids) - 1].argmax()))
    best = tuple(ids[len(context) :])
    tried = [best[:n] for n in (1, 2, 4)] + [(*best[:i], (best[i] + 1) % 200, *best[i + 1 :]) for i in range(4)]
    found = answers("llama", [("A", Likelihood(context, one)) for one in tried])
    assert [one.greedy for one in found] == [True] * 3 + [False] * 4


def test_scores_alone_and_mixed_have_the_same_bits():
    mixed = answers("llama", [(tenant, one) for one in asked() for tenant in ("A", "B", "C", "D", None)])
    assert len({one.logprob for one in mixed}) > 80  # every tenant scores otherwise
    for i, tenant in enumerate(("A", "B", "C", "D", None)):
        assert answers("llama", [(tenant, one) for one in asked()]) == mixed[i::5]
    few = answers("llama", [("B", one) for one in asked()[5:8]])  # nor does it matter what else is asked
    assert few == mixed[1::5][5:8]


def test_the_factors_never_see_the_continuation(monkeypatch):
    """Whatever follows the context, prefill gets the context and nothing else, once for an adapter."""
    seen, real = [], likelihood.prefill

    def noted(model, adapters, tokens, lengths, **options):
        seen.extend(tuple(row[:length].tolist()) for row, length in zip(tokens, lengths, strict=True))
        return real(model, adapters, tokens, lengths, **options)

    monkeypatch.setattr(likelihood, "prefill", noted)
    answers("llama", [(tenant, one) for one in asked() for tenant in ("A", "B")])
    contexts = {one.context for one in asked()}
    assert {ids for ids in seen if ids in contexts} == contexts and all(seen.count(ids) == 2 for ids in contexts)
    assert {ids for ids in seen if ids not in contexts} <= {(0,)}  # rows that fill up a batch
