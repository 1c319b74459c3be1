"""An engine of three slots on a golden backbone, with tenants of different methods, sites and scopes. Its blocks are
small, so that short prompts have several."""

import numpy as np
from golden_models import strong
from tiny_run import tokenizer, words

from para_jax import AdapterBank, Engine, Ia3Config, ParaConfig, init_adapter

SLOTS, LENGTH, BLOCK = 3, 40, 4
LEAST = -(-LENGTH // BLOCK) + 2
"""blocks of the smallest pool: those of a longest row, a copy of its prompt's last one, and block 0"""
CONFIGS = {
    "A": ParaConfig(r=4),
    "B": ParaConfig(r=2, target_modules=("q_proj", "up_proj")),
    "C": Ia3Config(target_modules=("v_proj", "down_proj")),
    "R": ParaConfig(r=4, scope="response"),
}
SITES = ("q_proj", "v_proj", "up_proj")


def tenants_of(model, configs=CONFIGS):
    """Adapters of random weights that change the answers, by name."""
    named = enumerate(configs.items())
    return {name: strong(init_adapter(config, model.config), i, 0.3) for i, (name, config) in named}


def bank_of(model, tenants):
    bank = AdapterBank(model.config, max_r=4, sites=SITES)
    for name in CONFIGS:
        bank.add(name, tenants[name])
    return bank


def engine_of(model, bank, **options):
    sizes = {"slots": SLOTS, "max_length": LENGTH, "prefill_chunk": 8, "block_size": BLOCK}
    return Engine(model, bank, tokenizer(), **(sizes | options))


def block_bytes(model):
    """Bytes of a block of such an engine."""
    config = model.config
    return BLOCK * 2 * config.num_layers * config.kv_width * model.dtype.itemsize


def require_empty(engine):
    """Only kept prompts hold blocks."""
    used = {block for prompt in engine._prefills.table.kept.values() for block in getattr(prompt, "blocks", ())}
    assert engine._prefills.cache.available == engine._prefills.cache.blocks - len(used)


def prompt(seed, length=6):
    return words(np.random.default_rng(seed).integers(20, 256, length))


def answers(engine):
    return answers_despite(engine, error=())[0]


def fail_after(monkeypatch, owner, name, numbers, error=KeyboardInterrupt):
    """Makes these calls (from 1) of a function raise after their work, when what they donate is gone."""
    real, calls = getattr(owner, name), []

    def failing(*arguments, **options):
        calls.append(1)
        made = real(*arguments, **options)
        if len(calls) in numbers:
            raise error
        return made

    monkeypatch.setattr(owner, name, failing)


def answers_despite(engine, error=KeyboardInterrupt):
    """The answers of an engine with rounds that raise this error, and how often it was raised."""
    found, raised = {}, 0
    while True:
        try:
            for completion in engine.run():
                key = (completion.id, completion.index)
                assert key not in found, "answered twice"
                found[key] = completion
            return found, raised  # a run that nothing interrupts gives all answers
        except error:
            raised += 1


def plain(completion):
    return completion.tokens, completion.text, completion.finish_reason
