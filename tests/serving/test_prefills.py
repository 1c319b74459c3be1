"""Prompts in blocks: the prefix cache changes no answer, a long prompt stalls no one, and whatever ends a prompt early
leaves nothing behind."""

import jax
import numpy as np
import pytest
from golden_models import backbone, strong
from long_cases import long, quick, slow
from tiny_engine import BLOCK, answers, answers_despite, block_bytes, fail_after, plain, tenants_of
from tiny_run import tokenizer, words

from para_jax import AdapterBank, Engine, Ia3Config, LoraConfig, ParaConfig, Request, generate, init_adapter
from para_jax.adapters import padding
from para_jax.backbone.block_pool import rows_of_blocks
from para_jax.serving import decoder, prefills
from para_jax.serving.capacity import capacity
from para_jax.serving.prefills import token_bytes
from para_jax.serving.prefix_cache import prompt_key
from para_jax.serving.prompt_table import ROWS, ChunkedPrompt

SITES = ("q_proj", "k_proj", "v_proj", "up_proj")
CHUNK = 8
CONFIGS = {
    "all": ParaConfig(r=4),
    "w1": ParaConfig(r=4, scope="response"),
    "w4": Ia3Config(scope="response", scope_window=4),
    "constant": ParaConfig(r=2, scope="response", pooler="constant"),
    "prompt": ParaConfig(r=4, scope="prompt"),
    "ia3": Ia3Config(scope="response", scope_window=3),
    "lora": LoraConfig(r=3, scope="response", scope_window=6),
}
IN_BLOCKS = ("w1", "w4", "constant", "ia3", "lora", None)


@pytest.fixture(scope="module")
def tenants(model):
    return tenants_of(model, CONFIGS)


@pytest.fixture(scope="module")
def bank(model, tenants):
    return bank_of(model, tenants, CONFIGS)


def bank_of(model, tenants, names):
    bank = AdapterBank(model.config, max_r=4, methods=("para", "ia3", "lora"), sites=SITES)
    for name in names:
        bank.add(name, tenants[name])
    return bank


def engine_of(model, bank, blocks=30, **options):
    sizes = {"slots": 3, "max_length": 64, "prefill_chunk": CHUNK, "block_size": BLOCK, "stop_ids": ()}
    sizes["max_prefill_tokens"] = options.get("prefill_chunk", CHUNK)  # a chunk per round
    return Engine(model, bank, tokenizer(), prefix_cache_bytes=blocks * block_bytes(model), **(sizes | options))


def ids_of(seed, length):
    return tuple(np.random.default_rng(seed).integers(20, 250, length).tolist())


def answer(engine, ids, tenant=None, new=6, **options):
    id = engine.submit(Request(tuple(ids), tenant, new, **options))
    return plain(answers(engine)[id, 0])


def watch(monkeypatch, owner, name, log, note=lambda arguments: None):
    """Appends (name, note(arguments)) to a log at each call of a program."""
    real = getattr(owner, name)

    def watched(*arguments, **options):
        log.append((name, note(arguments)))
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, watched)


def require_idle(engine):
    """No row and no prompt at work refers to a block, and every block can be used again."""
    cache, kept = engine._prefills.cache, engine._prefills.table.kept.values()
    used = {block for prompt in kept if isinstance(prompt, ChunkedPrompt) for block in prompt.blocks}
    assert not engine._prefills.table.working and len(kept) <= ROWS
    assert {block for block, count in enumerate(cache._references) if count} == used
    assert cache.available + len(used) == cache.blocks


# ------------------------------------------------------------------------------------------------------------- answers


@pytest.mark.long
@pytest.mark.parametrize("blocks", [0, 5, 30])
def test_a_mixed_batch_equals_each_tenant_alone_and_generate(model, bank, blocks):
    names = [*CONFIGS, None] * 2
    shared = ids_of(0, 11)
    prompts = [shared + ids_of(i, 1 + i % 7) for i in range(len(names))]
    texts = generate(
        model, list(map(words, prompts)), tokenizer=tokenizer(), adapters=bank, tenants=names, max_new_tokens=8
    )
    engine, alone = (engine_of(model, bank, blocks, stop_ids=None) for _ in range(2))
    ids = [engine.submit(Request(words(ids), name, 8)) for ids, name in zip(prompts, names, strict=True)]
    given = answers(engine)
    assert [given[id, 0].text for id in ids] == texts
    assert [answer(alone, prompt, name, 8)[1] for prompt, name in zip(prompts, names, strict=True)] == [
        answer(engine, prompt, name, 8)[1] for prompt, name in zip(prompts, names, strict=True)
    ]
    require_idle(engine)


@pytest.mark.parametrize("family", [long("gemma3_text"), slow("qwen3"), slow("olmo2")])
def test_other_families_answer_the_same(family):
    model = backbone(family)
    made = {name: strong(init_adapter(CONFIGS[name], model.config), i) for i, name in enumerate(("all", "w1", "w4"))}
    bank, names = bank_of(model, made, made), ["w1", "w4", None, "all", "w4", "w1"]
    prompts = [ids_of(0, 17) + ids_of(i, 2) for i in range(len(names))]
    engine = engine_of(model, bank, slots=2, stop_ids=None)
    ids = [engine.submit(Request(words(ids), name, 8)) for ids, name in zip(prompts, names, strict=True)]
    given = answers(engine)
    texts = generate(
        model, list(map(words, prompts)), tokenizer=tokenizer(), adapters=bank, tenants=names, max_new_tokens=8
    )
    assert [given[id, 0].text for id in ids] == texts and engine.prefix_cache.hits > 0


def test_samples_of_one_prompt_are_drawn_as_if_each_were_alone(model, bank):
    prompt, options = ids_of(1, 13), dict(temperature=1.2, top_p=0.9)
    for tenant in ("w1", "w4", None):
        engine = engine_of(model, bank)
        id = engine.submit(Request(prompt, tenant, 5, n=5, seed=3, **options))
        given = answers(engine)
        assert engine.prefix_cache.queries == len(prompt), "one prefill for all of them"
        alone = [answer(engine_of(model, bank), prompt, tenant, 5, seed=3 + i, **options) for i in range(5)]
        assert [plain(given[id, i]) for i in range(5)] == alone and len({tokens for _, tokens, _ in alone}) > 1


def rows_and_logits(engine, key):
    prompt = engine._prefills.table.find(key)
    assert prompt is not None
    held = [rows_of_blocks(layer, np.array([prompt.blocks])) for layer in engine._prefills.pool]
    row, logits, adjustments = prompt.made
    of_row = jax.tree.map(np.asarray, (logits[row], adjustments))
    return [np.stack(row)[:, 0, :, : len(prompt.ids)] for row in held], *jax.tree.leaves(of_row)


@pytest.mark.parametrize("tenant", [None, "w1", "w4"])
def test_a_cached_prefix_gives_the_same_bits_as_a_fresh_one(model, bank, tenant):
    prefix, prompt = ids_of(2, 22), ids_of(2, 22) + ids_of(3, 5)
    fresh, cached = engine_of(model, bank), engine_of(model, bank)
    answer(cached, prefix + ids_of(4, 9), "w4")
    answer(cached, ids_of(5, 30), None)
    before = cached.prefix_cache.hits
    assert answer(fresh, prompt, tenant) == answer(cached, prompt, tenant)
    assert cached.prefix_cache.hits == before + len(prefix) // BLOCK * BLOCK and fresh.prefix_cache.hits == 0
    key = prompt_key(None if tenant is None else bank.entry(tenant).content, prompt)
    for mine, theirs in zip(rows_and_logits(fresh, key), rows_and_logits(cached, key), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_base_and_response_tenants_share_blocks_and_others_neither_read_nor_write_them(model, bank):
    engine, prompt = engine_of(model, bank), ids_of(6, 21)
    for tenant in ("all", "prompt"):
        answer(engine, prompt, tenant)
        assert engine.prefix_cache == (0, 0, 0)
    answer(engine, prompt, None)
    hits = 0
    for i, tenant in enumerate(IN_BLOCKS[:-1]):
        answer(engine, prompt, tenant)
        hits += (21 - CONFIGS[tenant].scope_window) // BLOCK * BLOCK
        assert engine.prefix_cache.queries == 21 * (i + 2) and engine.prefix_cache.hits == hits
    assert engine.prefix_cache.bytes == 5 * block_bytes(model)


def test_prompts_of_different_salts_share_nothing_and_have_the_same_answers(model, bank):
    engine, fresh, prompt = engine_of(model, bank), engine_of(model, bank), ids_of(6, 21)
    expected = {tenant: answer(fresh, prompt, tenant) for tenant in (None, "w1")}
    hits = []
    for tenant, salt in ((None, None), (None, "a"), ("w1", "b"), ("w1", "a"), (None, "a"), (None, None)):
        assert answer(engine, prompt, tenant, cache_salt=salt) == expected[tenant]
        hits.append(engine.prefix_cache.hits)
    assert np.diff([0, *hits]).tolist() == [0, 0, 0, 20, 0, 0]  # at the end the prompts themselves are still kept


@pytest.mark.parametrize("blocks", quick([1, 2, 5, 9], slow=(2, 5, 9)))
def test_eviction_never_changes_an_answer(model, bank, blocks):
    draw, small, without = np.random.default_rng(blocks), engine_of(model, bank, blocks), engine_of(model, bank, 0)
    asked = []
    for _ in range(40):
        ids = ids_of(draw.integers(3), int(draw.integers(1, 40)))  # prompts of one seed begin alike
        asked.append((ids + ids_of(draw.integers(9), int(draw.integers(0, 5))), draw.choice([*IN_BLOCKS, "all"])))
    ids = [small.submit(Request(prompt, tenant, 5)) for prompt, tenant in asked]
    given = answers(small)
    assert [plain(given[id, 0]) for id in ids] == [answer(without, prompt, tenant, 5) for prompt, tenant in asked]
    assert small.prefix_cache.hits > 0 and without.prefix_cache.hits == without.prefix_cache.bytes == 0
    require_idle(small), require_idle(without)


def test_prompts_that_end_alike_but_begin_differently_share_nothing(model, bank):
    engine, without, end = engine_of(model, bank), engine_of(model, bank, 0), ids_of(7, 2 * BLOCK + 1)
    for start in (8, 9):
        prompt = ids_of(start, BLOCK) + end
        assert answer(engine, prompt, "w1") == answer(without, prompt, "w1")
    assert engine.prefix_cache.hits == 0


# --------------------------------------------------------------------------------------------------------------- chats


@pytest.mark.parametrize("tenant", ["w4", "lora", None])
def test_a_chats_next_turn_finds_its_history_up_to_the_last_plain_block(model, bank, tenant):
    """The window's adapted keys and values, and those of decoded tokens, are never found."""
    window = 0 if tenant is None else CONFIGS[tenant].scope_window
    engine, turn = engine_of(model, bank), ids_of(10, 4 * BLOCK + window)
    tokens, *_ = answer(engine, turn, tenant, 9)
    following = (*turn, *tokens, *ids_of(11, 3))
    second = answer(engine, following, tenant, 9)
    assert engine.prefix_cache.hits == 4 * BLOCK, "the prompt's complete blocks, and none of the answer's"
    assert second == answer(engine_of(model, bank, 0), following, tenant, 9)
    base = engine_of(model, None)
    answer(base, turn, None, 1)
    mine, theirs = (one._prefills.cache for one in (engine, base))
    for key in mine.keys(turn):
        for layer, plain_layer in zip(engine._prefills.pool, base._prefills.pool, strict=True):
            for held, expected in zip(layer, plain_layer, strict=True):
                np.testing.assert_array_equal(held[mine._of_key[key]], expected[theirs._of_key[key]])


# -------------------------------------------------------------------------------------------------------------- rounds


@pytest.mark.long
def test_a_long_prompt_delays_decoding_rows_by_one_chunk_per_round(model, bank, monkeypatch):
    engine, log = engine_of(model, bank, max_length=340), []
    decoding = engine.submit(Request(ids_of(14, 5), "w1", 300))
    engine.step()
    watch(monkeypatch, decoder, "steps", log)
    watch(monkeypatch, prefills, "prefill_chunk", log, lambda arguments: int(arguments[3].count.sum()))
    long = engine.submit(Request(ids_of(15, 300), "w4", 3))
    short = engine.submit(Request(ids_of(16, 7), None, 3))
    ended = []
    while long not in ended:
        ended += [completion.id for completion in engine.step()]
    chunks = [count for name, count in log if name == "prefill_chunk"]
    assert len(chunks) == -(-307 // CHUNK) and max(chunks) == CHUNK
    names = [name for name, _ in log]
    assert all(pair != ("prefill_chunk",) * 2 for pair in zip(names, names[1:], strict=False))
    assert ended == [short, long], "the short prompt shares the first chunks and does not wait for the long one"
    assert engine.cancel(decoding)
    texts = generate(
        model, [words(ids_of(15, 300))], tokenizer=tokenizer(), adapters=bank, tenants=["w4"], max_new_tokens=9
    )
    assert answer(engine_of(model, bank, max_length=340, stop_ids=None), ids_of(15, 300), "w4", 9)[1] == texts[0]


@pytest.mark.long
def test_the_samples_of_a_request_do_not_count_as_its_own_cache(model, bank):
    engine = engine_of(model, bank, slots=2)
    names = ["w1", "w4", "ia3", "lora", "constant"]  # more prompts than are kept
    asked = [Request(ids_of(i, 24), name, 3, n=4, temperature=1.0) for i, name in enumerate(names)]
    streams = [engine.open_stream(request) for request in asked]
    while engine.open:
        engine.step()
    assert [stream.cached_tokens for stream in streams] == [0] * len(names)
    (again,) = [engine.open_stream(asked[0])]
    assert list(again) and again.cached_tokens == 20


@pytest.mark.long
def test_prompts_that_come_together_compute_what_they_share_once(model, bank, monkeypatch):
    engine, log, shared = engine_of(model, bank, prefill_chunk=16), [], ids_of(17, 6 * BLOCK)
    watch(monkeypatch, prefills, "prefill_chunk", log, lambda arguments: int(arguments[3].count.sum()))
    prompts = [shared + (30 + i,) for i in range(3)]
    ids = [engine.submit(Request(prompt, "w1", 4)) for prompt in prompts]
    given = answers(engine)
    assert sum(count for _, count in log) == len(shared) + 3
    without = engine_of(model, bank, 0)
    assert [plain(given[id, 0]) for id in ids] == [answer(without, prompt, "w1", 4) for prompt in prompts]


@pytest.mark.long
def test_nothing_is_compiled_after_warm_up(model, tenants, compiled):
    bank = bank_of(model, tenants, CONFIGS)
    engine = engine_of(model, bank, 7, slots=4, max_length=68)
    engine.warm_up()
    other = strong(tenants["all"], 99)
    before = len(compiled)
    for i in range(30):
        name = [*CONFIGS, None][i % 8]
        engine.submit(Request(ids_of(i % 2, 1 + 2 * i), name, 1 + i % 5, temperature=i % 2, n=1 + i % 3, seed=i))
    bank.replace("all", other)
    assert len(answers(engine)) == 60 and len(compiled) == before and engine.prefix_cache.hits > 0
    jax.jit(lambda x: 2 * x)(np.zeros(72))
    assert len(compiled) > before


@pytest.mark.long
def test_warm_up_compiles_for_adapters_that_are_loaded_later(model):
    """A bank of more adapters than fit the memory holds none when the server starts."""
    adapter = strong(init_adapter(LoraConfig(r=5, scope="response", scope_window=3), model.config), 1)
    bank = AdapterBank.fitting([adapter.config], model.config, capacity=1)
    engine = engine_of(model, bank, max_length=20)  # shapes that no other test has
    programs = prefills.prefill_chunk, prefills.one_row, padding.put_in_place
    before = [program._cache_size() for program in programs]
    engine.warm_up()
    compiled = [program._cache_size() for program in programs]
    assert all(now > then for now, then in zip(compiled, before, strict=True))
    bank.add("late", adapter)
    assert answer(engine, ids_of(1, 9), "late")[2] == "length"
    assert [program._cache_size() for program in programs] == compiled


# ------------------------------------------------------------------------------------------------- cancels and failures


def test_a_prompt_cancelled_between_its_chunks_leaves_nothing_but_its_blocks(model, bank):
    engine, long = engine_of(model, bank), ids_of(18, 50)
    cancelled = engine.submit(Request(long, "w4", 3))
    kept = engine.submit(Request(ids_of(19, 30), "w4", 3))
    engine.step(), engine.step()
    assert engine.cancel(cancelled)
    given = answers(engine)
    assert given[cancelled, 0].error == "cancelled"
    without = engine_of(model, bank, 0)
    assert plain(given[kept, 0]) == answer(without, ids_of(19, 30), "w4", 3)
    require_idle(engine)
    assert answer(engine, long, "w1") == answer(without, long, "w1") and engine.prefix_cache.hits > 0


def test_one_of_two_samples_with_one_prompt_may_be_cancelled(model, bank):
    engine, long = engine_of(model, bank), ids_of(18, 50)
    first, second = (engine.submit(Request(long, "w1", 4)) for _ in range(2))
    engine.step()
    assert engine.cancel(first)
    given = answers(engine)
    assert plain(given[second, 0]) == answer(engine_of(model, bank, 0), long, "w1", 4)
    assert engine.prefix_cache.queries == len(long)


@pytest.mark.long
def test_as_many_short_prompts_start_at_once_as_a_chunk_has_blocks(model, bank):
    sizes = {"slots": 10, "prefill_chunk": 10 * BLOCK}
    engine, alone = engine_of(model, bank, **sizes), engine_of(model, bank, 0)
    tenants = ("w1", None, "w4")
    short = [engine.submit(Request(ids_of(i, 1 + i % BLOCK), tenants[i % 3], 9)) for i in range(10)]
    engine.step()
    assert sum(engine.running.values()) == 10, "all of them decode after one round"
    asked = [(ids_of(i, 1 + i % BLOCK), tenants[i % 3], 9) for i in range(10)]
    asked += [(ids_of(30 + i, (63, 2, 17)[i % 3]), tenants[i % 2], 1) for i in range(12)]
    short += [engine.submit(Request(*one)) for one in asked[10:]]
    given = {}
    while engine.open:
        given |= {completion.id: completion for completion in engine.step()}
    for id, one in zip(short, asked, strict=True):
        assert plain(given[id]) == answer(alone, *one)
    answer(engine, ids_of(99, 3))
    engine.step()
    assert len(engine._prefills.table.kept) <= ROWS + 1, "the others, and their adapters, are given up"


@pytest.mark.parametrize("program", ["prefill_chunk", "take_rows", "one_row"])
@pytest.mark.parametrize("call", [1, 2, 4])
def test_an_interrupt_between_chunks_loses_nothing(model, bank, monkeypatch, program, call):
    engine = engine_of(model, bank)
    prompts = [ids_of(20, 16) + ids_of(i, 3 * i) for i in range(6)]
    expected = [answer(engine_of(model, bank, 0), prompt, "w4") for prompt in prompts]
    fail_after(monkeypatch, prefills, program, [call])
    ids = [engine.submit(Request(prompt, "w4", 6)) for prompt in prompts]
    given, interrupts = answers_despite(engine)
    assert interrupts and [plain(given[id, 0]) for id in ids] == expected
    require_idle(engine)


def test_a_prompt_that_always_fails_ends_alone(model, bank, monkeypatch):
    """It fails in its second chunk, together with others at first."""
    engine, real, raised = engine_of(model, bank), prefills.prefill_chunk, 0

    def failing(treedef, leaves, pool, lanes, *more):
        made = real(treedef, leaves, pool, lanes, *more)
        if (lanes.tokens == 251).any():
            raise ZeroDivisionError("a division")
        return made

    monkeypatch.setattr(prefills, "prefill_chunk", failing)
    bad = engine.submit(Request(ids_of(21, 30) + (251, 20), "w1", 3))
    good = [engine.submit(Request(ids_of(22 + i, 20 + 9 * i), "w1", 3)) for i in range(3)]
    given = {}
    while engine.open:
        try:
            for completion in engine.run():
                given[completion.id] = completion
        except ZeroDivisionError:
            raised += 1
    assert raised == 2 and "a division" in given[bad].error
    assert [plain(given[id]) for id in good] == [
        answer(engine_of(model, bank, 0), ids_of(22 + i, 20 + 9 * i), "w1", 3) for i in range(3)
    ]


# -------------------------------------------------------------------------------------------------------------- memory


def test_the_reported_memory_of_the_pool_is_that_of_its_arrays(model):
    engine = engine_of(model, None)
    held, row = engine._prefills, engine._decoder.row
    every = (held.cache.blocks + 1) * held.size * token_bytes(row)  # block 0 is no row's
    assert every == sum(leaf.nbytes for leaf in jax.tree.leaves(held.pool))
    said = capacity(None, row, 2, 64, blocks=10**6, size=BLOCK)
    assert f"1000000 blocks of {BLOCK} tokens, {10**6 * BLOCK * token_bytes(row) / 1e9:.2f} GB" in said


# ------------------------------------------------------------------------------------------------- tenants that join


@pytest.mark.long
def test_a_tenant_that_decodes_adapted_may_join_those_of_scope_prompt(model, tenants):
    bank, prompt = AdapterBank.holding({"prompt": tenants["prompt"]}, model.config), ids_of(25, 14)
    larger = AdapterBank(model.config, capacity=9, max_r=4, methods=("para",), sites=bank.sites)
    larger.add("prompt", tenants["prompt"])
    engine = engine_of(model, larger)
    decoding = engine.submit(Request(prompt, "prompt", 30))
    engine.step()
    for name in ("w1", "all"):
        larger.add(name, tenants[name])
    asked = {name: engine.submit(Request(prompt, name, 6)) for name in ("w1", "all", "prompt", None)}
    given = answers(engine)
    whole = bank_of(model, tenants, CONFIGS)
    for name, id in asked.items():
        assert plain(given[id, 0]) == answer(engine_of(model, whole, 0), prompt, name)
    assert plain(given[decoding, 0]) == answer(engine_of(model, whole, 0), prompt, "prompt", 30)


def test_an_adapter_that_overflows_spoils_neither_the_cache_nor_its_neighbours(model, tenants):
    hostile = jax.tree.map(lambda leaf: leaf * 1e25, tenants["w4"])
    bank, calm = bank_of(model, tenants, CONFIGS), bank_of(model, tenants, CONFIGS)
    bank.add("hostile", hostile)
    engine, without = engine_of(model, bank), engine_of(model, calm, 0)
    prompts = [ids_of(26, 20) + ids_of(i, 2 + i) for i in range(6)]
    ids = []
    for i, prompt in enumerate(prompts):
        engine.submit(Request(prompt, "hostile", 9, id=f"h{i}"))
        ids.append(engine.submit(Request(prompt, IN_BLOCKS[i], 9)))
    given = answers(engine)
    expected = [answer(without, prompt, IN_BLOCKS[i], 9) for i, prompt in enumerate(prompts)]
    assert [plain(given[id, 0]) for id in ids] == expected
