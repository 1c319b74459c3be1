"""`para-jax bench evaluate`: answers of many adapters in one mixed pass against a loop over the adapters, each with its
own batches, inside one process."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from ..backbone.load import load_backbone
from ..data.tokenizer import load_tokenizer
from ..evaluation.answers import Pass
from ..evaluation.journal import Journal
from ..evaluation.questions import Generation, Written
from ..inference.generate import generate_tokens, up_to_multiple
from ..inference.sampling import Sampling
from ..serving.engine import Engine
from .decode import METHODS, bank_of
from .rounds import paired, single, summary

PROMPT, NEW = 48, 32  # tokens of a prompt, and of its answer


class Workload(NamedTuple):
    """So many examples for each of so many adapters."""

    adapters: int
    prompts: list[list[int]]
    """of each adapter, all of PROMPT tokens"""

    @property
    def name(self) -> str:
        return f"{self.adapters} adapters x {len(self.prompts)} examples"


def bench_evaluate(
    backbone: str, *, rows: tuple[int, ...] = (32,), adapters: tuple[int, ...] = (64, 8), rounds: int = 2
) -> dict:
    """Seconds in which PARA adapters write NEW tokens for each of their examples: in one pass that mixes them, and one
    adapter after the other. The first workload has two examples an adapter; the second fills whole batches with each.

    The first run of each side of each workload begins without any compiled program, and is reported by itself.

    Args:
        rows: of a batch; one number.
        adapters: of the two workloads.
    """
    batch = single(rows)
    model, tokenizer = load_backbone(backbone), load_tokenizer(backbone)
    bank = bank_of(model, METHODS["PARA"], max(adapters))
    draw = np.random.default_rng(0)
    measured: list[dict[str, float]] = [{} for _ in range(rounds)]
    first, ratios, equal = {}, {}, {}
    written: dict[str, list[str]] = {}
    workloads = [
        Workload(count, draw.integers(3, model.config.vocab_size, (examples, PROMPT)).tolist())
        for count, examples in zip(adapters, (2, batch), strict=True)
    ]
    for work in workloads:
        asking = Pass(model, bank, tokenizer, "", Journal())
        one, other = f"{work.name}, mixed", f"{work.name}, loop"
        runs = {one: partial(mixed, asking, work, batch), other: partial(loop, asking, work)}
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
    return summary("s", measured) | about


def timed(run: Callable[[], list[str]], name: str, written: dict[str, list[str]]) -> float:
    """Seconds of a side; what it wrote is kept under its name."""
    begun = time.perf_counter()
    written[name] = run()
    return time.perf_counter() - begun


def mixed(asking: Pass, work: Workload, rows: int) -> list[str]:
    """All adapters' answers in one pass."""
    asking.journal = Journal()
    longest = up_to_multiple(PROMPT + NEW, 32)
    # As in the loop, no token ends an answer before its length.
    engine = Engine(asking.model, asking.bank, asking.tokenizer, slots=rows, max_length=longest, stop_ids=())
    names = asking.bank.names[: work.adapters] if asking.bank else ()
    questions = [(name, Generation(tuple(prompt), NEW)) for name in names for prompt in work.prompts]
    return [answer.text for answer in asking.answer(questions, rows=rows, engine=engine) if isinstance(answer, Written)]


def loop(asking: Pass, work: Workload) -> list[str]:
    """One adapter after the other, its examples as one batch."""
    texts = []
    for name in asking.bank.names[: work.adapters] if asking.bank else ():
        adapters = asking.bank.rows([name] * len(work.prompts)) if asking.bank else None
        tokens = generate_tokens(asking.model, adapters, work.prompts, Sampling(NEW))
        texts += [
            asking.tokenizer.decode(one, skip_special_tokens=True, clean_up_tokenization_spaces=False) for one in tokens
        ]
    return texts
