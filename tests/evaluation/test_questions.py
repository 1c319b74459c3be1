"""The key of a question's answer: what it depends on, and what not."""

from golden_models import backbone
from tiny_questions import bank_of

from para_jax.backbone.content import backbone_content
from para_jax.evaluation.questions import Generation, Likelihood, key


def test_a_key_depends_on_question_adapter_content_and_backbone():
    a, b = (bank_of("llama").entry(name) for name in "AB")
    one = Likelihood((3, 4), (5,))
    keys = [key(one, *who, "w") for who in ((a, "x"), (b, "x"), (None, "x"), (a, "y"))]
    others = one._replace(context=(3,)), one._replace(reads=(6,)), Generation((3, 4), 5), Generation((3, 4), 5, seed=1)
    keys += [key(other, a, "x", "w") for other in others] + [key(others[2], a, "x", "v")]
    keys.append(key(one, a, "x", "w", "bfloat16"))
    assert len(set(keys)) == len(keys) and key(one, None, "x", "w", "bfloat16") == keys[2]
    assert key(one, a._replace(version=99), "x", "v") == keys[0]
    assert backbone_content(backbone("llama")) != backbone_content(backbone("qwen2"))


def test_another_version_of_our_answers_has_other_keys(monkeypatch):
    before = key(Likelihood((3,), (4,)), None, "b", "w")
    monkeypatch.setattr("para_jax.evaluation.questions.ANSWERS_VERSION", -1)
    assert key(Likelihood((3,), (4,)), None, "b", "w") != before
