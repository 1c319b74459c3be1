"""The score of one adapter on one task, as a run scores it, with all that it holds."""

from para_jax.evaluation.samples import logged_samples
from para_jax.evaluation.score import score_answers
from para_jax.evaluation.scoring import Tasks


def answers(model, adapter, task, tokenizer, *, limit=None, shuffle=None, rows=8):
    """The task as token ids, and the answers to its questions."""
    tasks = Tasks(model, tokenizer, [task], limit, rows=rows)
    return tasks.encoded[0], tasks.answer_one(adapter, shuffle=shuffle)[0]


def score(model, adapter, task, tokenizer, **options):
    return score_answers(*answers(model, adapter, task, tokenizer, **options))


def samples(model, adapter, task, tokenizer, **options):
    return logged_samples(*answers(model, adapter, task, tokenizer, **options))
