"""`para-jax bench serve`: the engine against static batches, on a ragged workload of many tenants."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..adapters.bank import AdapterBank
from ..backbone.load import load_backbone
from ..data.tokenizer import load_tokenizer
from ..inference.generate import generate_tokens
from ..inference.sampling import Sampling
from ..serving.decoder import STEPS
from ..serving.engine import Engine
from ..serving.request import Request
from .decode import METHODS, bank_of
from .rounds import in_turns, measurement, paired, single

COMPARED = ("PARA", "(IA)^3", "LoRA r=8")
LONGEST = 256  # tokens per row, prompt and answer


class Workload(NamedTuple):
    """Requests as token ids, each for its own tenant."""

    prompts: list[list[int]]
    new_tokens: list[int]

    @property
    def tokens(self) -> int:
        return sum(self.new_tokens)


class ServingTimes(NamedTuple):
    """When an engine ended the rounds and the requests of a workload."""

    rounds: list[float]
    """the end of each round, in seconds since the requests came"""
    ended: list[tuple[int, int]]
    """per request: the round in which it ended, and its tokens"""
    live: list[int]
    """per round: slots that decoded"""
    waiting: list[bool]
    """per round: whether requests waited at its end"""

    @property
    def tokens_per_second(self) -> float:
        return sum(count for _, count in self.ended) / self.rounds[-1]

    @property
    def live_while_waiting(self) -> float:
        """The mean number of slots that decoded while requests waited."""
        return float(np.mean([live for live, waits in zip(self.live, self.waiting, strict=True) if waits]))

    def latencies(self) -> dict[str, float]:
        """Milliseconds to the first token, since the requests came, and per token after it; and the longest gap of a
        row that decodes, between the ends of consecutive rounds."""
        first, each = [], []
        for end, count in self.ended:
            begin = self.rounds[end - max(1, -(-(count - 1) // STEPS)) + 1]  # a first token, then STEPS per round
            first.append(1e3 * begin)
            if count > 8:
                each.append(1e3 * (self.rounds[end] - begin) / (count - 1))
        found = {}
        for name, values in (("first token", first), ("a token", each)):
            found |= {f"{name} p{q}": float(np.percentile(values, q)) for q in (50, 95)}
        decoding = np.minimum(self.live[1:], self.live[:-1]) > 0
        return found | {"longest gap": 1e3 * float(np.max(np.diff(self.rounds) * decoding, initial=0.0))}


def bench_serve(backbone: str, *, rows: tuple[int, ...] = (8,), requests: int = 96, rounds: int = 2) -> dict:
    """Tokens per second of the engine and of static batches with as many rows, by method, all tenants different; time
    to the first token and time per token in the engine.

    Args:
        rows: the engine's slots; one number.
    """
    slots = single(rows)
    model, tokenizer = load_backbone(backbone), load_tokenizer(backbone)
    work = ragged(requests, model.config.vocab_size)
    banks: dict[str, AdapterBank | None] = {"base": None} | {m: bank_of(model, METHODS[m], requests) for m in COMPARED}
    sides: dict[str, Callable[[], float]] = {}
    served: dict[str, ServingTimes] = {}

    def by_engine(method: str, engine: Engine) -> float:
        served[method] = serve(engine, work)
        return served[method].tokens_per_second

    for method, bank in banks.items():
        engine = Engine(model, bank, tokenizer, slots=slots, max_length=LONGEST, prefix_cache_bytes=0)
        engine.warm_up()
        static(model, bank, work, slots, ended=lambda rows: [True] * len(rows))  # compiles
        sides[f"{method}, engine"] = lambda m=method, e=engine: by_engine(m, e)
        sides[f"{method}, static batches"] = lambda b=bank: static(model, b, work, slots)
    found = measurement("tokens/s", in_turns(sides, rounds))
    ratios = {f"{m}: engine / static": paired(found["rounds"], f"{m}, engine", f"{m}, static batches") for m in banks}
    ratios |= {f"{m} / base, engine": paired(found["rounds"], f"{m}, engine", "base, engine") for m in COMPARED}
    return found | {
        "ratios": ratios,
        "latencies_ms": {method: served[method].latencies() for method in banks},
        "live_slots": {method: served[method].live_while_waiting / slots for method in banks},
        "slots": slots,
        "requests": requests,
    }


def ragged(requests: int, vocab_size: int) -> Workload:
    """The lengths of Punica's text generation benchmark (arXiv:2310.18547; benchmarks/bench_textgen.py): prompts
    -1 + 18 exp(0.8 N(0, 1)), total lengths uniform, here up to 256 instead of 2048."""
    draw = np.random.default_rng(0)
    prompts = np.minimum(-1 + 18 * np.exp(0.8 * draw.standard_normal(requests)), LONGEST - 2).astype(int).clip(1)
    totals = np.maximum(prompts + 2, draw.integers(0, LONGEST, requests)).clip(max=LONGEST)
    ids = [draw.integers(3, vocab_size, length).tolist() for length in prompts]
    return Workload(ids, (totals - prompts).tolist())


def serve(engine: Engine, work: Workload) -> ServingTimes:
    """Serves all requests, submitted at once, each for the next tenant. They decode past end tokens, up to their
    lengths."""
    begun, served = time.perf_counter(), ServingTimes([], [], [], [])
    names = itertools.cycle([None] if engine.bank is None else engine.bank.names)
    for ids, new, name in zip(work.prompts, work.new_tokens, names, strict=False):
        engine.submit(Request(tuple(ids), name, new, ignore_eos=True))
    while engine.open:
        answers = engine.step()
        served.rounds.append(time.perf_counter() - begun)
        served.live.append(engine.decoding)
        served.waiting.append(bool(engine.waiting))
        served.ended.extend((len(served.rounds) - 1, len(answer.tokens)) for answer in answers)
    assert sum(count for _, count in served.ended) == work.tokens
    return served


def static(model, bank: AdapterBank | None, work: Workload, rows: int, ended: Callable | None = None) -> float:
    """Tokens per second of batches in the order of arrival, each decoding until its longest answer is complete."""
    begun = time.perf_counter()
    for start in range(0, len(work.prompts), rows):
        chosen = slice(start, start + rows)
        adapters = None if bank is None else bank.rows(bank.names[chosen])
        generate_tokens(model, adapters, work.prompts[chosen], Sampling(max(work.new_tokens[chosen])), ended=ended)
    return work.tokens / (time.perf_counter() - begun)
