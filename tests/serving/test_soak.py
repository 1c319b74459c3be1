"""A long day: thousands of requests of hundreds of tenants, while adapters come, go and are replaced."""

from pathlib import Path

import numpy as np
import pytest
from golden_models import backbone, strong
from tiny_engine import plain, prompt
from tiny_run import tokenizer

from para_jax import AdapterBank, Engine, Ia3Config, ParaConfig, Request, init_adapter

TENANTS, REQUESTS, SLOTS = 200, 5000, 8
SITES = ("q_proj", "v_proj", "up_proj")


def anonymous_bytes() -> int:
    """RssAnon of this process: its memory without mapped files."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


@pytest.mark.slow
def test_a_long_day_gives_every_request_its_own_answer_in_flat_memory():
    model, draw = backbone("llama"), np.random.default_rng(0)
    fresh = [init_adapter(ParaConfig(r=4), model.config), init_adapter(Ia3Config(target_modules=SITES), model.config)]
    pool = [strong(fresh[i % 2], i, 0.3) for i in range(40)]
    bank, other = (AdapterBank(model.config, max_r=4, sites=SITES) for _ in range(2))
    for i, adapter in enumerate(pool):
        other.add(str(i), adapter)
    of_content = {other.entry(name).content: name for name in other.names}
    for i in range(TENANTS):
        bank.add(f"t{i}", pool[i % 40])
    engine, alone = (Engine(model, b, tokenizer(), slots=SLOTS, max_length=32) for b in (bank, other))
    engine.warm_up()
    asked, found, memory, fresh_names = {}, {}, [], iter(range(TENANTS, 10**6))
    while len(found) < REQUESTS:
        for _ in range(min(3 * SLOTS, REQUESTS - len(asked))):
            change(bank, draw, pool, fresh_names)
            tenant = None if draw.random() < 0.1 else bank.names[draw.integers(len(bank))]
            request = Request(prompt(draw.integers(4), 3 + draw.integers(4)), tenant, int(draw.integers(1, 9)))
            id = engine.submit(request)
            asked[id] = request, bank.entry(tenant).content if tenant else None
        for completion in engine.run():
            assert completion.id not in found
            found[completion.id] = completion
        memory.append((len(found), anonymous_bytes()))
    known = {}
    for id, (request, content) in asked.items():
        key = request.prompt, request.max_new_tokens, content
        if key not in known:
            tenant = content and of_content[content]
            expected = alone.submit(Request(request.prompt, tenant, request.max_new_tokens))
            known[key] = next(c for c in alone.run() if c.id == expected)
        assert plain(found[id]) == plain(known[key])
    later = np.array(memory[len(memory) // 3 :])
    slope = np.polyfit(later[:, 0], later[:, 1], 1)[0]
    print(f"\n{REQUESTS} requests, {TENANTS} tenants, {len(known)} different; memory grows {slope:.0f} bytes a request")
    assert slope < 4000, "a request leaves its prompt, answer and the test's own records behind, no more"


def change(bank, draw, pool, fresh_names):
    """Now and then a tenant's adapter is replaced, a tenant leaves, and another comes."""
    name, adapter = bank.names[draw.integers(len(bank))], pool[draw.integers(len(pool))]
    if draw.random() < 0.1:
        bank.replace(name, adapter)
    elif draw.random() < 0.05:
        bank.remove(name)
        bank.add(f"t{next(fresh_names)}", adapter)
