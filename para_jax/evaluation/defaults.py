"""How a run's data is scored where the config leaves it open: metric, choices and answer length follow from the
training data.

Few different completions, each repeated several times, are labels: they are ranked. Other answers are written. Of free
text, which no answer matches exactly, the loss chooses the best adapter, and f1 is reported.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..backbone.load import load_model_config
from ..config import DataSection, ModelConfig, RunConfig
from ..data.batches import rounded_up
from ..data.examples import encode_completion
from ..data.records import Record, split_records
from ..data.sources import open_split, task_of
from ..data.tasks import TASKS
from ..io.progress import Progress
from .metrics import single_spaced

#: Labels are ranked by their likelihoods if there are at most this many; otherwise the answer is written.
RANKED = 20
#: Completions are labels if the training data has each this many times on average.
REPEATED = 4
#: Completions are free text if they have more than this many words on average, and at least this share are different.
FREE_WORDS, FREE_SHARE = 10, 0.9
#: Completions, from the start of the data, that are kept to see how many are different.
COMPARED = 10_000
#: How many of the longest completions, by bytes, are tokenised to find the longest by tokens.
COUNTED = 32
#: Tokens of a written answer where nothing is known about it, and the fewest and the most that the data can ask for.
NEW_TOKENS, FEWEST_NEW_TOKENS, MOST_NEW_TOKENS = 32, 16, 512


class Completions(NamedTuple):
    """The completions of the training data."""

    count: int
    different: tuple[str, ...]
    """empty: more than RANKED"""
    longest: list[Record]
    """by bytes"""
    free_text: bool


class ScoringRule(NamedTuple):
    """How a run's validation and test data are scored."""

    metric: str
    also: tuple[str, ...]
    choices: tuple[str, ...]
    max_new_tokens: int
    from_data: bool = False
    """whether the metric was chosen from the data"""

    def describe(self) -> str:
        """ "accuracy over the 6 different completions of the training data (eval.metric)"."""
        if self.metric == "accuracy":
            return f"accuracy over the {len(self.choices)} different completions of the training data (eval.metric)"
        written = f"of written answers of up to {self.max_new_tokens} tokens (eval.metric, eval.max_new_tokens)"
        if self.metric == "loss" and self.from_data:
            reported = " and ".join(self.also)
            return f"loss, because the completions are long and nearly all different; also {reported} {written}"
        return f"{' and '.join([self.metric, *self.also])} {written}"


def scoring_rule(config: RunConfig, tokenizer, *, model: ModelConfig | None = None) -> ScoringRule:
    """How the run's data is scored. What the config says always wins, then what its task says.

    Args:
        model: of the backbone; None: it is read.
    """
    known, given = TASKS.get(task_of(config.data) or ""), config.eval
    metric = given.metric or (known.metric if known else "accuracy" if given.choices else None)
    new = given.max_new_tokens or (known.max_new_tokens if known else None)
    also = given.also or (known.also if known and metric == known.metric else ())
    writes = bool(also) if metric == "loss" else metric != "accuracy"
    needed = metric is None or (new is None and writes)
    held = completions_of(config.data) if needed else None
    choices, from_data = given.choices, metric is None
    if metric is None:
        choices = held.different if held and 2 <= len(held.different) <= held.count / REPEATED else ()
        metric = "accuracy" if choices else "loss" if held and held.free_text else "exact_match"
        also = also or (() if choices else ("f1",))
    if new is None:
        new = NEW_TOKENS
        if held and held.longest and metric != "accuracy":
            model = model or load_model_config(config.backbone.source)
            new = answer_length(longest_completion(held.longest, tokenizer), model)
    return ScoringRule(metric, also, choices, new, from_data)


def completions_of(section: DataSection) -> Completions:
    """The completions of all training examples, because data may be sorted. There are none if the data is not here."""
    return completions_in((split_records(section, "train") if is_there(section) else None) or ())


def completions_in(records: Iterable[Record]) -> Completions:
    count, words, compared, different, often = 0, 0, 0, set[str](), Counter[str]()
    longest: list[tuple[int, int, Record]] = []  # a heap; the number tells records of one length apart
    with Progress("reading the completions", unit="example") as bar:
        for record in records:
            count += 1
            words += len(record.completion.split())
            if len(different) < COMPARED:
                compared = count
                different.add(single_spaced(record.completion))
            if len(different) <= RANKED:
                often[record.completion] += 1
            heapq.heappush(longest, (size_of(record), count, record))
            if len(longest) > COUNTED:
                heapq.heappop(longest)
            bar.advance()
    few = different_answers(often) if len(different) <= RANKED else ()
    free_text = words > FREE_WORDS * count and len(different) >= FREE_SHARE * compared
    return Completions(count, few, [record for *_, record in longest], free_text)


def different_answers(texts: Iterable[str]) -> tuple[str, ...]:
    """The different answers among texts, sorted, each as most of them write it: ` yes`, `yes` and `yes\\n` are one."""
    often = Counter(texts).most_common()
    return tuple(sorted({single_spaced(text): text for text, _ in reversed(often)}.values()))


def without_answer(records: Iterable[Record], choices: Iterable[str]) -> list[Record]:
    """The records that accept none of the choices as their answer."""
    answers = set(map(single_spaced, choices))
    return [record for record in records if answers.isdisjoint(map(single_spaced, record.references))]


def is_there(section: DataSection) -> bool:
    """Whether there is training data. A run may be evaluated on a machine that has its test data only."""
    try:
        return open_split(section, "train") is not None
    except ValueError:
        return False


def longest_completion(records: Sequence[Record], tokenizer) -> int:
    """Tokens of the longest completion, with its end token. Only those with the most bytes are counted."""
    most = heapq.nlargest(COUNTED, records, key=size_of)
    return max(len(encode_completion(tokenizer, record.prompt, record.completion)) for record in most)


def size_of(record: Record) -> int:
    """The bytes of a record's completion. Characters say less: tokenizers split some scripts into several each."""
    return len(record.completion.encode())


def answer_length(longest: int, model: ModelConfig) -> int:
    """The tokens that a written answer may have where the longest completion has `longest`: half as many again, so that
    an answer that goes on differs from it. A multiple of 8, but at most half of the model's positions."""
    new = max(rounded_up(longest * 3 // 2, 8), FEWEST_NEW_TOKENS)
    return max(1, min(new, MOST_NEW_TOKENS, model.max_positions // 2))
