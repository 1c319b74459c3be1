"""What prompts that share a beginning cost in an engine: questions after one prefix, the turns of a chat, and many
tenants with one system prompt. Adapters of scope `response` share the plain prefix, as the base model does. Those of
scope `all` change a prompt's own keys and values, so each request pays for its whole prompt.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from measure import main

from para_jax.adapters.bank import AdapterBank
from para_jax.backbone.load import load_backbone
from para_jax.bench.decode import METHODS, bank_of
from para_jax.bench.rounds import in_turns, interleaved, measurement, paired, single
from para_jax.bench.serve import ragged
from para_jax.data.tokenizer import load_tokenizer
from para_jax.serving.engine import Engine
from para_jax.serving.request import Request

PREFIX, QUESTION, TURNS = 192, 16, 6  # tokens of a shared prefix and of a question after it; turns of a chat
SYSTEM, TENANTS = 256, 32  # tokens of a system prompt, and tenants that share it
LONG = 2000  # tokens of a prompt that comes while another row decodes
SIDES = {
    "base": None,
    "PARA, response": replace(METHODS["PARA"], scope="response"),
    "LoRA r=8, response": replace(METHODS["LoRA r=8"], scope="response"),
    "PARA, all": METHODS["PARA"],
    "LoRA r=8, all": METHODS["LoRA r=8"],
}


def bench_prefix(backbone: str, *, rows: tuple[int, ...] = (8,), requests: int = 96, rounds: int = 2) -> dict:
    """Time to the first token of questions and chats that share a prefix, tokens per second of tenants that share a
    system prompt, and the longest gap of a row that decodes, by method and scope."""
    model, tokenizer = load_backbone(backbone), load_tokenizer(backbone)
    work = ragged(requests, model.config.vocab_size)
    parts = {
        f"one system prompt of {SYSTEM} tokens": bench_system_prompt(model, tokenizer, *work, single(rows), rounds),
        "longest gap of a decoding row": bench_gaps(model, tokenizer, rounds),
    }
    return bench_prefixes(model, tokenizer, 5 * rounds) | {"parts": parts}


class Prompts(NamedTuple):
    """Random token ids, never the same twice."""

    draw: np.random.Generator
    vocab_size: int

    def __call__(self, count: int) -> tuple[int, ...]:
        return tuple(self.draw.integers(3, self.vocab_size, count).tolist())


def engines(model, tokenizer, slots: int, max_length: int, tenants: int = TENANTS) -> dict[str, Engine]:
    """An engine for each of SIDES, warmed up."""
    banks: dict[str, AdapterBank | None] = {
        name: None if config is None else bank_of(model, config, tenants) for name, config in SIDES.items()
    }
    made = {name: Engine(model, bank, tokenizer, slots=slots, max_length=max_length) for name, bank in banks.items()}
    for engine in made.values():
        engine.warm_up()
    return made


def first_token(engine: Engine, prompt: tuple[int, ...], tenant: int = 0) -> float:
    """Milliseconds from a request to its first token. No other request is open."""
    name = None if engine.bank is None else engine.bank.names[tenant]
    begun = time.perf_counter()
    engine.submit(Request(prompt, name, 1, ignore_eos=True))
    (answer,) = engine.run()
    assert answer.error is None, answer.error
    return 1e3 * (time.perf_counter() - begun)


def bench_prefixes(model, tokenizer, rounds: int) -> dict:
    """Milliseconds to the first token of a question after a prefix that another request has read, and of all turns of a
    chat together; by method and scope."""
    new = Prompts(np.random.default_rng(0), model.config.vocab_size)
    sides: dict[str, Callable[[], float]] = {}
    made = engines(model, tokenizer, 1, 2 * SYSTEM, tenants=2)
    prefix, turn = new(PREFIX), SYSTEM // TURNS
    for name, engine in made.items():
        first_token(engine, prefix + new(QUESTION), -1)  # another tenant, where there are two
        sides[f"a question, {name}"] = lambda e=engine: first_token(e, prefix + new(QUESTION))
        sides[f"a chat, {name}"] = lambda e=engine: chat(e, [new(turn) for _ in range(TURNS)])
    found = measurement("ms", interleaved(sides, rounds))
    kinds = [name for name in SIDES if name != "base"]
    return found | {
        "ratios": {
            f"{what}, {name} / base": paired(found["rounds"], f"{what}, {name}", f"{what}, base")
            for what in ("a question", "a chat")
            for name in kinds
        }
    }


def chat(engine: Engine, turns: list[tuple[int, ...]]) -> float:
    """Milliseconds to the first tokens of all turns, each after all turns before it."""
    return sum(first_token(engine, sum(turns[: i + 1], ())) for i in range(len(turns)))


def bench_system_prompt(
    model, tokenizer, prompts: list[list[int]], new_tokens: list[int], slots: int, rounds: int
) -> dict:
    """Tokens per second of ragged requests of TENANTS tenants, which all begin with one system prompt; by method and
    scope. Each round has another system prompt."""
    new = Prompts(np.random.default_rng(1), model.config.vocab_size)

    def served(engine: Engine) -> float:
        system, begun = new(SYSTEM), time.perf_counter()
        for i, (ids, count) in enumerate(zip(prompts, new_tokens, strict=True)):
            name = None if engine.bank is None else engine.bank.names[i % TENANTS]
            engine.submit(Request((*system, *ids), name, count, ignore_eos=True))
        answered = sum(len(answer.tokens) for answer in engine.run())
        assert answered == sum(new_tokens), (answered, sum(new_tokens))
        return answered / (time.perf_counter() - begun)

    made = engines(model, tokenizer, slots, 2 * SYSTEM)
    sides = {name: lambda e=engine: served(e) for name, engine in made.items()}
    found = measurement("tokens/s", in_turns(sides, rounds))
    others = [name for name in SIDES if name != "PARA, response"]
    ratios = {f"PARA, response / {name}": paired(found["rounds"], "PARA, response", name) for name in others}
    return found | {"ratios": ratios}


def bench_gaps(model, tokenizer, rounds: int) -> dict:
    """The longest gap, in milliseconds, between two rounds of a row that decodes, without and with a prompt of LONG
    tokens that comes meanwhile: of the base and of scope `response` in chunks, of scope `all` in one piece."""
    new = Prompts(np.random.default_rng(2), model.config.vocab_size)
    banks = {scope: bank_of(model, SIDES[f"PARA, {scope}"], 1) for scope in ("response", "all")}
    (tenant,) = banks["all"].names
    made = {}
    for scope, bank in banks.items():
        made[scope] = Engine(model, bank, tokenizer, slots=2, max_length=LONG + SYSTEM)
        made[scope].warm_up()

    def longest_gap(engine: Engine, meanwhile: int) -> float:
        engine.submit(Request(new(QUESTION), tenant, SYSTEM // 2, ignore_eos=True, id="decodes"))
        engine.step()
        if meanwhile:
            engine.submit(Request(new(meanwhile), tenant, 1, ignore_eos=True))
        gaps, last, decoding = [], time.perf_counter(), True
        while engine.open:
            ended = engine.step()
            if decoding:
                gaps.append(1e3 * (time.perf_counter() - last))
            last, decoding = time.perf_counter(), decoding and all(answer.id != "decodes" for answer in ended)
        return max(gaps)

    sides = {}
    for name, engine in made.items():
        sides[f"scope {name}, alone"] = lambda e=engine: longest_gap(e, 0)
        sides[f"scope {name}, with a prompt of {LONG} tokens"] = lambda e=engine: longest_gap(e, LONG)
    return measurement("ms", interleaved(sides, rounds))


if __name__ == "__main__":
    main(bench_prefix)
