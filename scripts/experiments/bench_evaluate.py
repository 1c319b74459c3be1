"""Answers of many adapters in one mixed pass, compared with a loop over the adapters with
batches of their own."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from measure import main

from para_jax.adapters.bank import AdapterBank
from para_jax.backbone.load import load_backbone
from para_jax.backbone.transformer import Transformer
from para_jax.bench.decode import METHODS, bank_of
from para_jax.bench.rounds import measurement, paired, single
from para_jax.data.batches import rounded_up
from para_jax.data.tokenizer import load_tokenizer
from para_jax.evaluation.answers import Answerer
from para_jax.evaluation.questions import Generation, Written
from para_jax.inference.answer_text import text_of
from para_jax.inference.generate import generate_tokens
from para_jax.inference.sampling import Sampling
from para_jax.serving.engine import Engine

PROMPT, NEW = 48, 32  # tokens of a prompt, and of its answer


class EvaluationWorkload(NamedTuple):
    """How many adapters answer how many examples."""

    adapters: int
    prompts: list[list[int]]
    """each adapter's, all of PROMPT tokens"""

    @property
    def name(self) -> str:
        return f"{self.adapters} adapters x {len(self.prompts)} examples"


def bench_evaluate(
    backbone: str, *, rows: tuple[int, ...] = (32,), adapters: tuple[int, ...] = (64, 8), rounds: int = 2
) -> dict:
    """The seconds that PARA adapters take to write NEW tokens for each of their examples: mixed in one pass, and one
    adapter after the other. The first workload has two examples per adapter; in the second, each adapter's examples
    fill a whole batch.

    The first run of each side of each workload starts without compiled programs, and is reported separately.

    Args:
        rows: of a batch; one number.
        adapters: how many, in each workload.
    """
    batch = single(rows)
    model, tokenizer = load_backbone(backbone), load_tokenizer(backbone)
    bank = bank_of(model, METHODS["PARA"], max(adapters))
    draw = np.random.default_rng(0)
    measured: list[dict[str, float]] = [{} for _ in range(rounds)]
    first, ratios, equal = {}, {}, {}
    written: dict[str, list[str]] = {}
    workloads = [
        EvaluationWorkload(count, draw.integers(3, model.config.vocab_size, (examples, PROMPT)).tolist())
        for count, examples in zip(adapters, (2, batch), strict=True)
    ]
    for work in workloads:
        one, other = f"{work.name}, mixed", f"{work.name}, loop"
        given = model, bank, tokenizer, work
        runs = {one: partial(mixed, *given, batch), other: partial(loop, *given)}
        sides = {name: partial(timed, run, name, written) for name, run in runs.items()}
        for name, measure in sides.items():
            jax.clear_caches()  # the sides and the workloads have programs in common
            first[name] = measure()
        sides[one]()  # compiles once more what was cleared for the other side
        for found in measured:
            found |= {name: measure() for name, measure in sides.items()}
        ratios[f"{work.name}: mixed / loop"] = paired(measured, one, other)
        ratios[f"{work.name}, compiling too: mixed / loop"] = first[one] / first[other]
        equal[work.name] = float(np.mean([a == b for a, b in zip(written[one], written[other], strict=True)]))
    about = {"ratios": ratios, "first_run": first, "equal_texts": equal, "rows": batch, "new_tokens": NEW}
    return measurement("s", measured) | about


def timed(run: Callable[[], list[str]], name: str, written: dict[str, list[str]]) -> float:
    """The seconds of a side; its texts are kept under its name."""
    begun = time.perf_counter()
    written[name] = run()
    return time.perf_counter() - begun


def mixed(model: Transformer, bank: AdapterBank, tokenizer, work: EvaluationWorkload, rows: int) -> list[str]:
    """All adapters' answers in one pass."""
    longest = rounded_up(PROMPT + NEW, 32)
    # As in the loop, no token ends an answer before its length.
    engine = Engine(model, bank, tokenizer, slots=rows, max_length=longest, stop_ids=())
    answerer = Answerer(model, bank, tokenizer, rows=rows, engine=engine)
    names = bank.names[: work.adapters]
    questions = [(name, Generation(tuple(prompt), NEW)) for name in names for prompt in work.prompts]
    return [answer.text for answer in answerer.answer(questions) if isinstance(answer, Written)]


def loop(model: Transformer, bank: AdapterBank, tokenizer, work: EvaluationWorkload) -> list[str]:
    """One adapter after the other, each with its examples as one batch."""
    texts = []
    for name in bank.names[: work.adapters]:
        adapters = bank.rows([name] * len(work.prompts))
        tokens = generate_tokens(model, adapters, work.prompts, Sampling(NEW))
        texts += [text_of(tokenizer, one) for one in tokens]
    return texts


if __name__ == "__main__":
    main(bench_evaluate)
