"""What compare_methods.py measures of an adapter: its score row by row, what it forgets, and what it costs to serve."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
from compare_cells import packed

from para_jax import init_adapter, pick, prefill, stack_adapters
from para_jax.bench.decode import Side, Step, tenant
from para_jax.bench.rounds import interleaved, medians, milliseconds, paired, random_tokens
from para_jax.data.examples import Example, joined_completion
from para_jax.data.records import Record
from para_jax.evaluation.answers import Answerer
from para_jax.evaluation.batch_adapters import StackBank
from para_jax.evaluation.questions import Answer, Written
from para_jax.evaluation.samples import logged_samples
from para_jax.evaluation.score import likelihoods_of, score_answers
from para_jax.evaluation.scoring import Tasks, answer_tasks
from para_jax.evaluation.tasks import EncodedTask, EvalTask


def scored(tasks: Tasks, adapters: list, shuffle: int | None = None, one_line: bool = False) -> list[dict]:
    """The score of the only task with each of these adapters of one config (or [None]: the backbone), and the score and
    the loss of each of its rows. The adapters are asked together.

    Args:
        one_line: an answer is the first line of what is written.
    """
    (encoded,) = tasks.encoded.values()
    return [
        record(encoded, [without_more(encoded, answer) for answer in answers] if one_line else answers)
        for answers in answers_of(tasks, adapters, shuffle)
    ]


def answers_of(tasks: Tasks, adapters: list, shuffle: int | None = None) -> list[list[Answer]]:
    """The answers of each adapter to the only task."""
    (encoded,) = tasks.encoded.values()
    bank = None if adapters == [None] else StackBank(stack_adapters(adapters))
    asked = [(None if bank is None else i, encoded) for i in range(len(adapters))]
    answerer = Answerer(tasks.model, bank, tasks.tokenizer, rows=tasks.rows, shapes=tasks.shapes)
    what = f"scoring {len(encoded.examples)} test examples with {len(adapters)} adapters"
    return answer_tasks(answerer, asked, shuffle, what)


def without_more(encoded: EncodedTask, answer: Answer) -> Answer:
    """The answer up to where the model would write one more example: the next line or, if answers have several lines,
    the next empty line."""
    if not isinstance(answer, Written):
        return answer
    several = any("\n" in record.completion.strip() for record in encoded.task.records)
    return answer._replace(text=answer.text.strip().partition("\n\n" if several else "\n")[0])


def record(encoded: EncodedTask, answers) -> dict:
    samples, metric = logged_samples(encoded, answers), encoded.task.metric
    rows = {"loss": [one["loss"] for one in samples]}
    if metric != "loss":
        rows = {"score": [one.get(metric, one.get("correct")) for one in samples]} | rows
    held = {"of": content_of(encoded), "rows": {name: packed(values) for name, values in rows.items()}}
    return score_answers(encoded, answers).record() | held


def content_of(encoded: EncodedTask) -> str:
    """Two digits for each row, a hash of its completion: only scores of the same rows are compared row by row. The
    prompt may have examples before it."""
    return "".join(hashlib.sha256(record.completion.encode()).hexdigest()[:2] for record in encoded.task.records)


# --------------------------------------------------------------------------------------------- examples in the prompt


def with_examples(task: EvalTask, training: Iterable[Record], count: int) -> EvalTask:
    """The task with `count` training examples before each prompt, the same ones in the same order."""
    shown = [f"{one.prompt}{joined_completion(one.prompt, one.completion)}\n\n" for one in balanced(training, count)]
    records = [one._replace(prompt="".join(shown) + str(one.prompt)) for one in task.records]
    return task._replace(records=records, examples=None)


def balanced(training: Iterable[Record], count: int) -> list[Record]:
    """The first training rows, but for those whose completion was taken more often than another row's."""
    left, times, taken = list(islice(training, 1000)), Counter(), []
    for _ in range(min(count, len(left))):
        rarest = min(left, key=lambda one: times[one.completion])  # the first of equals
        left.remove(rarest)
        times[rarest.completion] += 1
        taken.append(rarest)
    return taken


# --------------------------------------------------------------------------------------------------------- forgetting


def plain_text(file: Path, tokenizer, count: int, length: int) -> EvalTask:
    """Texts of `length` tokens: the first half is the prompt, from which factors are made, and the second is scored.
    They are the file's first passages that are long enough, each once."""
    with file.open("rb") as lines:
        texts = dict.fromkeys(passage(json.loads(line)["prompt"]) for line in lines if line.strip())
    ids = (tokenizer(text)["input_ids"] for text in texts)
    whole = [one[:length] for one in ids if len(one) >= length][:count]
    if not whole:
        raise ValueError(f"{file}: no passage has {length} tokens; choose another --text")
    examples = [Example(one[: length // 2], one[length // 2 :]) for one in whole]
    return EvalTask("text", [Record("", "", ("",), None, str(file))] * len(whole), "loss", examples=examples)


def passage(prompt: str) -> str:
    """The plain sentences of a prompt "Passage: ...\\nQuestion: ..."."""
    return prompt.partition("\nQuestion:")[0].removeprefix("Passage: ")


def text_losses(tasks: Tasks, adapter) -> np.ndarray:
    """The loss of each text, in nats per token."""
    (encoded,) = tasks.encoded.values()
    (answers,) = answers_of(tasks, [adapter])
    nats, tokens = likelihoods_of(encoded, answers)
    return nats / tokens


# ---------------------------------------------------------------------------------------------------- cost of serving


def serving_cost(model, config, *, rows: int = 8, context: int = 128, rounds: int = 20, prefills: int = 5) -> dict:
    """Prefill of `context` tokens and one decode step of `rows` rows, each of another tenant, relative to the base
    model's. The two take turns; a ratio is the median over the rounds."""
    fresh = init_adapter(config, model.config)
    many = pick(stack_adapters([tenant(fresh, i) for i in range(rows)]), np.arange(rows))
    sides = {"base": Side("base", rows, 0, None), "adapter": Side("adapter", rows, rows, many)}
    steps = {name: Step(model, side, context) for name, side in sides.items()}
    tokens = random_tokens(model, rows, context)

    def prefill_time(side: Side):
        return milliseconds(lambda: prefill(model, side.adapters, tokens, context, max_length=context + 32))

    prefilled = interleaved({name: prefill_time(side) for name, side in sides.items()}, prefills)
    cache, decoded = steps["base"].prefill(context)[1].cache, []
    for _ in range(rounds + 1):  # the first one compiles
        taken = {}
        for name, step in steps.items():
            taken[name], _, cache = step(cache)
        decoded.append(taken)
    return {
        "decode": paired(decoded[1:], "adapter", "base"),
        "prefill": paired(prefilled, "adapter", "base"),
        "decode_ms": medians(decoded[1:]),
        "prefill_ms": medians(prefilled),
        "tenants": rows,
        "context": context,
    }
