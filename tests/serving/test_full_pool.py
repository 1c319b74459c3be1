"""Where the pool has no room for all rows, the youngest start again: every request has the answer that it has alone."""

import numpy as np
import pytest
from golden_models import FIXTURES
from tiny_engine import (
    BLOCK,
    LEAST,
    LENGTH,
    answers,
    answers_despite,
    bank_of,
    block_bytes,
    engine_of,
    fail_after,
    plain,
    require_empty,
    tenants_of,
)
from tiny_engine import prompt as words_of
from tiny_run import tokenizer

from para_jax import Request, load_backbone, make_mesh
from para_jax.data.examples import encode_prompt
from para_jax.serving import decoder


@pytest.fixture(scope="module")
def bank(model):
    return bank_of(model, tenants_of(model))


def engine_with(model, bank, blocks, **options):
    return engine_of(model, bank, kv_cache_bytes=blocks * block_bytes(model), **({"slots": 5} | options))


def requests(count, seed=0, new=(1, 30), **options):
    """Requests of mixed tenants and lengths, half of which begin alike."""
    draw = np.random.default_rng(seed)
    common, names = encode_prompt(tokenizer(), words_of(99, 9)), ["A", "R", None, "B", "R", None]
    made = []
    for i in range(count):
        ids = encode_prompt(tokenizer(), words_of(i % 4, int(draw.integers(1, 9))))
        ids = (*common, *ids)[: LENGTH - 1] if draw.integers(2) else tuple(ids)
        most = min(int(draw.integers(*new)), LENGTH - len(ids))
        made.append(Request(ids, names[i % len(names)], most, ignore_eos=True, seed=i, **options))
    return made


def answered(engine, asked):
    ids = [engine.submit(request) for request in asked]
    found = answers(engine)
    return [plain(found[id, i]) for id, request in zip(ids, asked, strict=True) for i in range(request.n)]


@pytest.mark.parametrize("blocks", [LEAST, LEAST + 3])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "n": 3}], ids=["greedy", "samples"])
def test_answers_are_those_of_a_pool_with_room_for_all(model, bank, blocks, options):
    asked = requests(14, **options)
    small, large = engine_with(model, bank, blocks), engine_of(model, bank)
    assert answered(small, asked) == answered(large, asked)
    assert small.preemptions > 0 and large.preemptions == 0
    require_empty(small)


def test_speculation_does_not_change_that(model, bank):
    asked = requests(10)
    small = engine_with(model, bank, LEAST + 2, speculative_tokens=3)
    small._decoder.verify_cost = {False: 0.0, True: 0.0}
    assert answered(small, asked) == answered(engine_of(model, bank), asked) and small.preemptions > 0


@pytest.mark.parametrize("tokens", [LENGTH - 1, 2 * BLOCK, 2])
@pytest.mark.parametrize("tenant", ["A", "R"])
def test_a_kept_prompt_does_not_stand_in_its_own_way(model, bank, tokens, tenant):
    ids = tuple(encode_prompt(tokenizer(), words_of(0, LENGTH)))[:tokens]
    small = engine_with(model, bank, LEAST)
    first, second = (answered(small, [Request(ids, tenant, LENGTH - tokens, ignore_eos=True)]) for _ in range(2))
    assert first == second


def test_without_shared_blocks_neither(model, bank):
    asked = requests(10, seed=1)
    small = engine_with(model, bank, LEAST, prefix_cache_bytes=0)
    assert answered(small, asked) == answered(engine_of(model, bank), asked) and small.preemptions > 0


def test_a_stream_goes_on_where_it_was(model, bank):
    """A preempted row decodes its tokens again, and no piece of text comes twice."""
    asked = requests(6, new=(20, 21))
    small = engine_with(model, bank, LEAST)
    streams = [small.open_stream(request) for request in asked]
    pieces = ["".join(piece.text for piece in stream) for stream in streams]
    assert pieces == [text for _, text, _ in answered(engine_of(model, bank), asked)] and small.preemptions > 0


@pytest.mark.parametrize("program", ["insert_prompt", "insert", "steps"])
def test_an_interrupt_loses_nothing(model, bank, monkeypatch, program):
    asked = requests(8)
    expected, small = answered(engine_of(model, bank), asked), engine_with(model, bank, LEAST + 1)
    fail_after(monkeypatch, decoder, program, {2, 3, 5})
    ids = [small.submit(request) for request in asked]
    found, raised = answers_despite(small)
    assert raised == 3 and [plain(found[id, 0]) for id in ids] == expected
    require_empty(small)


def test_cancelled_rows_give_their_blocks_back(model, bank):
    small = engine_with(model, bank, LEAST + 1)
    ids = [small.submit(request) for request in requests(9)]
    for id in ids:
        small.step()
        small.cancel(id)
    answers(small), small.step()
    require_empty(small)
    asked = requests(5, seed=3)
    assert answered(small, asked) == answered(engine_of(model, bank), asked)


def test_samples_share_their_prompts_complete_blocks(model, bank):
    prompt = tuple(encode_prompt(tokenizer(), words_of(0, 12)))[: 3 * BLOCK]
    engine = engine_of(model, bank, slots=5)
    engine.submit(Request(prompt, "R", 2, n=5, temperature=1.0, ignore_eos=True))
    most = 0
    while engine.open:
        engine.step()
        most = max(most, engine._prefills.cache.blocks - engine._prefills.cache.available)
    assert most <= 3 + 5, "three blocks of the prompt, and one for each answer"


def test_ragged_rows_need_half_the_memory_of_longest_ones(model, bank):
    """As many short rows decode at once in the memory of two longest ones as have room, not two."""
    engine = engine_with(model, bank, 2 * LEAST, slots=8)
    for i in range(8):
        engine.submit(Request(tuple(encode_prompt(tokenizer(), words_of(i, 2)))[:3], None, 4, ignore_eos=True))
    engine.step()
    assert engine.decoding == 8 and engine.preemptions == 0


def test_a_mesh_preempts_as_one_device_does(model, bank):
    asked = requests(8)
    over = load_backbone(FIXTURES / "llama", dtype="float32", mesh=make_mesh(tensor=2))
    # each device holds half of the heads, so half of a block's bytes
    small = engine_of(over, bank_of(over, tenants_of(over)), slots=5, kv_cache_bytes=LEAST * block_bytes(over) // 2)
    assert answered(small, asked) == answered(engine_of(model, bank), asked) and small.preemptions > 0


@pytest.mark.parametrize("blocks", [0, LEAST - 1])
def test_a_pool_too_small_for_one_row_is_named(model, blocks):
    bytes = blocks * block_bytes(model)
    with pytest.raises(ValueError, match=f"kv_cache_bytes.*: {bytes} .* {LEAST * block_bytes(model)},"):
        engine_of(model, None, kv_cache_bytes=bytes)
