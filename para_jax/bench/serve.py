"""`para-jax bench serve`: the engine against static batches, on a ragged workload of many tenants; and the workloads in
which PARA's factors, made of the whole prompt, cost more than a shared adapter or a shared prefix would."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from ..adapters.bank import AdapterBank
from ..backbone.load import load_backbone
from ..data.tokenizer import load_tokenizer
from ..inference.generate import generate_tokens
from ..model import prefill
from ..serving.decoder import STEPS
from ..serving.engine import Engine
from ..serving.request import Request
from .decode import METHODS, bank_of
from .rounds import interleaved, paired, single, summary

COMPARED = ("PARA", "(IA)^3", "LoRA r=8")
LONGEST = 256  # tokens a row, prompt and answer
PREFIX, QUESTION, TURNS = 192, 16, 6  # tokens of a shared prefix and of a question on it; turns of a chat


class Workload(NamedTuple):
    """Requests as token ids, each for a tenant of its own."""

    prompts: list[list[int]]
    new_tokens: list[int]

    @property
    def tokens(self) -> int:
        return sum(self.new_tokens)


def bench_serve(backbone: str, *, rows: tuple[int, ...] = (8,), requests: int = 96, rounds: int = 2) -> dict:
    """Tokens a second of the engine and of static batches of as many rows, by method, all tenants different; time to
    the first token and time a token in the engine; and the prefill that a shared prefix and a chat cost.

    Args:
        rows: the engine's slots; one number.
    """
    slots = single(rows)
    model, tokenizer = load_backbone(backbone), load_tokenizer(backbone)
    work = ragged(requests, model.config.vocab_size)
    banks: dict[str, AdapterBank | None] = {"base": None} | {m: bank_of(model, METHODS[m], requests) for m in COMPARED}
    sides: dict[str, Callable[[], float]] = {}
    engines = {}
    for method, bank in banks.items():
        engines[method] = Timed(model, bank, tokenizer, slots=slots, max_length=LONGEST)
        engines[method].warm_up()
        static(model, bank, work, slots, ended=lambda rows: [True] * len(rows))  # compiles
        sides[f"{method}, engine"] = lambda m=method: engines[m].serve(work)
        sides[f"{method}, static batches"] = lambda b=bank: static(model, b, work, slots)
    found = summary("tokens/s", [{name: measure() for name, measure in sides.items()} for _ in range(rounds)])
    ratios = {f"{m}: engine / static": paired(found["rounds"], f"{m}, engine", f"{m}, static batches") for m in banks}
    ratios |= {f"{m} / base, engine": paired(found["rounds"], f"{m}, engine", "base, engine") for m in COMPARED}
    latencies = {m: engine.latencies() for m, engine in engines.items()}
    losing = summary("ms", interleaved(losing_sides(model, banks["PARA"]), 5 * rounds))
    return found | {
        "ratios": ratios,
        "latencies_ms": latencies,
        "prefill": losing,
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


class Timed(Engine):
    """An engine that serves a workload, and notes when its rounds end."""

    rounds: list[float]
    """the end of each round, in seconds since the requests came"""
    ended: list[tuple[int, int]]
    """of each request: the round in which it ended, and its tokens"""

    def serve(self, work: Workload) -> float:
        """Tokens a second of all requests, submitted at once. They decode past end tokens, up to their lengths."""
        begun, self.rounds, self.ended = time.perf_counter(), [], []
        names = [None] * len(work.prompts) if self.bank is None else self.bank.names
        for ids, new, name in zip(work.prompts, work.new_tokens, names, strict=False):
            self.submit(Request(tuple(ids), name, new, ignore_eos=True))
        while self.open:
            answers = self.step()
            self.rounds.append(time.perf_counter() - begun)
            self.ended += [(len(self.rounds) - 1, len(answer.tokens)) for answer in answers]
        assert sum(count for _, count in self.ended) == work.tokens
        return work.tokens / self.rounds[-1]

    def latencies(self) -> dict[str, float]:
        """Milliseconds of the last run: to the first token, from the start of all, and a token after it."""
        first, each = [], []
        for end, count in self.ended:
            begin = self.rounds[end - max(1, -(-(count - 1) // STEPS)) + 1]  # a first token, then STEPS a round
            first.append(1e3 * begin)
            if count > 8:
                each.append(1e3 * (self.rounds[end] - begin) / (count - 1))
        quantiles = {"p50": 50, "p95": 95}
        return {f"first token {name}": float(np.percentile(first, q)) for name, q in quantiles.items()} | {
            f"a token {name}": float(np.percentile(each, q)) for name, q in quantiles.items()
        }


def static(model, bank: AdapterBank | None, work: Workload, rows: int, ended: Callable | None = None) -> float:
    """Tokens a second of batches in the order of arrival, each decoding until its longest answer is whole."""
    begun = time.perf_counter()
    for start in range(0, len(work.prompts), rows):
        chosen = slice(start, start + rows)
        adapters = None if bank is None else bank.rows(bank.names[chosen])
        generate_tokens(model, adapters, work.prompts[chosen], max_new_tokens=max(work.new_tokens[chosen]), ended=ended)
    return work.tokens / (time.perf_counter() - begun)


def losing_sides(model, bank) -> dict[str, Callable[[], float]]:
    """Milliseconds of prefill for one request. PARA reads its whole prompt anew; a server with a cache of prefixes,
    which LoRA and the base model allow, reads what is new alone (the least it can cost: its attention to the prefix is
    left out)."""

    def prefilled(adapters, lengths: list[int]) -> Callable[[], float]:
        tokens = [np.ones((1, length), np.int32) for length in lengths]

        def milliseconds() -> float:
            begun = time.perf_counter()
            for each in tokens:
                made = prefill(model, adapters, each, each.shape[1], max_length=LONGEST)
                jax.block_until_ready(made)
            return (time.perf_counter() - begun) * 1e3

        return milliseconds

    para, turn = bank.rows(bank.names[:1]), LONGEST // TURNS
    return {
        "a question on a shared prefix, PARA": prefilled(para, [PREFIX + QUESTION]),
        "a question on a shared prefix, cached prefix": prefilled(None, [QUESTION]),
        f"a chat of {TURNS} turns, PARA": prefilled(para, [turn * (i + 1) for i in range(TURNS)]),
        f"a chat of {TURNS} turns, cached history": prefilled(None, [turn] * TURNS),
    }
