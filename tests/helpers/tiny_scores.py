"""The score of one adapter on one task, as a run scores it, with all that it holds."""

from para_jax import stack_adapters
from para_jax.evaluation.answers import Answerer
from para_jax.evaluation.batch_adapters import StackBank
from para_jax.evaluation.samples import logged_samples
from para_jax.evaluation.score import score_answers
from para_jax.evaluation.scoring import Tasks, answer_tasks


def answers(model, adapter, task, tokenizer, *, limit=None, shuffle=None, rows=8):
    """The task as token ids, and the answers to its questions."""
    tasks = Tasks(model, tokenizer, [task], limit)
    bank = None if adapter is None else StackBank(stack_adapters([adapter]))
    answerer = Answerer(model, bank, tokenizer, rows=rows, shapes=tasks.shapes)
    (found,) = answer_tasks(answerer, [(None if bank is None else 0, tasks.encoded[0])], shuffle, "scoring")
    return tasks.encoded[0], found


def score(model, adapter, task, tokenizer, **options):
    return score_answers(*answers(model, adapter, task, tokenizer, **options))


def samples(model, adapter, task, tokenizer, **options):
    return logged_samples(*answers(model, adapter, task, tokenizer, **options))
