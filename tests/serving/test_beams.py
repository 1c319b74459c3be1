"""Beams of the engine share blocks and end with the answers of a plain beam search, whatever else decodes."""

from dataclasses import replace

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
    require_empty,
    tenants_of,
)
from tiny_engine import prompt as words_of
from tiny_run import tokenizer

from para_jax import Request, load_backbone, make_mesh
from para_jax.data.examples import encode_prompt
from para_jax.inference.generate import beam_searches
from para_jax.serving import decoder

ENDS = tuple(range(60, 74))
NAMES = ("A", "R", None, "C", "R", "B")


@pytest.fixture(scope="module")
def tenants(model):
    return tenants_of(model)


@pytest.fixture(scope="module")
def bank(model, tenants):
    return bank_of(model, tenants)


def engine_with(model, bank, **options):
    return engine_of(model, bank, **({"slots": 5, "max_logprobs": 20} | options))


def requests(count=8, beams=(3, 1, 2, 4), new=(2, 14), **options):
    """Requests of mixed tenants, lengths and beams; two prompts come twice."""
    draw, made = np.random.default_rng(7), []
    for i in range(count):
        ids = tuple(encode_prompt(tokenizer(), words_of(i % 6, 3 + 2 * (i % 6))))
        most = min(int(draw.integers(*new)), LENGTH - len(ids))
        k = beams[i % len(beams)]
        made.append(
            Request(
                ids, NAMES[i % 6], most, num_beams=k, n=min(k, 2), stop_token_ids=ENDS, ignore_eos=True, keep_end=True,
                length_penalty=(1.0, 0.5, -0.5)[i % 3] if k > 1 else 1.0, seed=i, **options,
            )
        )  # fmt: skip
    return made


@pytest.fixture(scope="module")
def expected(model, tenants):
    """The tokens and scores of requests, by a plain beam search alone."""

    def searched(request):
        adapter = tenants.get(request.tenant)
        ends = () if request.num_beams == 1 else ENDS
        (search,) = beam_searches(model, adapter, [list(request.prompt)], request.sampling, [ends])
        if request.num_beams == 1:
            tokens = search.answers[0].tokens
            end = next((i + 1 for i, token in enumerate(tokens) if token in ENDS), len(tokens))
            return [(tokens[:end], None)]
        return [(beam.tokens, round(beam.score, 3)) for beam in search.answers[: request.n]]

    return [searched(request) for request in requests()]


def answered(engine, asked, **despite):
    ids = [engine.submit(request) for request in asked]
    found = answers_despite(engine, **despite)[0]
    return [
        [(one.tokens, one.score and round(one.score, 3)) for i in range(request.n) for one in [found[id, i]]]
        for id, request in zip(ids, asked, strict=True)
    ]


def close(found, expected):
    """Equal tokens, and equal scores up to rounding."""
    both = zip(sum(found, []), sum(expected, []), strict=True)
    return all(a == b and (s is t or abs(s - t) < 0.002) for (a, s), (b, t) in both)


@pytest.mark.parametrize("options", [{}, {"prefix_cache_bytes": 0}, {"speculative_tokens": 3}], ids=str)
def test_answers_are_those_of_a_plain_search(model, bank, expected, options):
    engine = engine_with(model, bank, **options)
    assert close(answered(engine, requests()), expected)
    assert any(tokens[-1] in ENDS for answers in expected for tokens, _ in answers), "else no search ends early"
    require_empty(engine)


@pytest.mark.parametrize("more", [7, 9, 13])
def test_a_full_pool_gives_the_same(model, bank, more):
    asked = [replace(request, stop_token_ids=()) for request in requests(10, beams=(2, 1), new=(20, 30))]
    small = engine_with(model, bank, kv_cache_bytes=(LEAST + more) * block_bytes(model))
    assert close(answered(small, asked), answered(engine_with(model, bank), asked)) and small.preemptions > 0
    require_empty(small)


def test_after_an_exception_the_search_is_made_again(model, bank, expected, monkeypatch):
    engine = engine_with(model, bank)
    for program, numbers in {"fork": {2, 5}, "steps": {4}, "insert": {3}}.items():
        fail_after(monkeypatch, decoder, program, numbers)
    assert close(answered(engine, requests(), error=KeyboardInterrupt), expected)
    require_empty(engine)


def test_a_mesh_gives_the_same(bank, expected):
    over = load_backbone(FIXTURES / "llama", dtype="float32", mesh=make_mesh(tensor=2))
    engine = engine_with(over, bank_of(over, tenants_of(over)))
    assert close(answered(engine, requests()), expected)


def test_other_rows_decode_as_without_beams(model, bank):
    """Sampled and guided rows draw the same tokens next to beams."""
    plain = [Request(words_of(i, 5), name, 9, temperature=1.0, seed=i) for i, name in enumerate(("A", "R", None))]
    plain.append(Request(words_of(3, 5), "A", 9, structured_outputs={"choice": ["w30 w40", "w50"]}))
    alone = answered(engine_with(model, bank), plain)
    both = [*requests(2), *plain]
    assert answered(engine_with(model, bank), both)[2:] == alone


@pytest.mark.parametrize("tenant, whole", [("R", False), ("A", True)])
def test_beams_share_the_blocks_that_agree(model, bank, tenant, whole):
    """Complete blocks of the prompt are held once, and so are those of an answer in which all beams agree."""
    ids, beams = tuple(encode_prompt(tokenizer(), words_of(0, 14)))[: 4 * BLOCK], 4
    engine = engine_with(model, bank)
    engine.submit(Request(ids, tenant, 12, num_beams=beams, ignore_eos=True))
    most = 0
    while engine.open:
        engine.step()
        most = max(most, engine._decoder.rows.used)
    assert 4 + beams <= most <= 4 + beams * 3


def test_cancelled_beams_give_their_slots_back(model, bank):
    engine = engine_with(model, bank)
    ids = [engine.submit(request) for request in requests()]
    for id in ids:
        engine.step()
        engine.cancel(id)
    assert all(one.error == "cancelled" for one in answers(engine).values() if one.finish_reason == "error")
    engine.step()
    require_empty(engine)
    assert engine.open == 0 and engine.running == {}


def test_a_stream_gives_the_answers_at_the_end(model, bank):
    (request, *_) = requests(1)
    engine = engine_with(model, bank)
    (found,) = answered(engine, [request])
    pieces = list(engine.stream(request))
    assert [[piece.tokens for piece in pieces if piece.index == i] for i in range(2)] == [[t] for t, _ in found]


def test_many_small_requests_do_not_hold_up_beams(model, bank):
    engine = engine_with(model, bank, slots=4)
    first = [engine.submit(Request(words_of(i, 4), "A", 8, ignore_eos=True)) for i in range(4)]
    engine.step()
    wide = engine.submit(Request(words_of(9, 4), "B", 4, num_beams=4, ignore_eos=True))
    later = [engine.submit(Request(words_of(i, 4), "R", 8, ignore_eos=True)) for i in range(8)]
    order = [completion.id for completion in engine.run()]
    assert order.index(wide) <= len(first) + 1 and set(order) == {*first, wide, *later}


def test_nothing_is_compiled_after_warm_up(model, bank, compiled):
    engine = engine_with(model, bank, max_length=28)  # shapes that no other test has
    engine.warm_up()
    before = len(compiled)
    for tenant, beams in (("A", 2), ("R", 3)):
        engine.submit(Request(words_of(0, 4), tenant, 8, num_beams=beams))
    assert all(one.finish_reason != "error" for one in answers(engine).values())
    assert 0 < before == len(compiled)


@pytest.mark.parametrize(
    "options, name",
    [
        ({"num_beams": 6}, "num_beams is 6.*5"),
        ({"num_beams": 5, "stop_token_ids": ENDS + (80, 81)}, "num_beams is 5.*4.*20"),
        ({"num_beams": 2, "n": 3}, "n is 3.*2"),
        ({"num_beams": 2, "logprobs": 1}, "logprobs"),
        ({"num_beams": 2, "structured_outputs": {"choice": ["w30"]}}, "structured_outputs"),
        ({"num_beams": 2, "temperature": 1.0}, "temperature"),
        ({"num_beams": 0}, "num_beams is 0"),
    ],
)
def test_a_request_that_can_not_be_served_is_an_error(model, bank, options, name):
    engine = engine_with(model, bank)
    engine.submit(Request(words_of(0, 4), "A", 8, **({"ignore_eos": True} | options)))
    (answer,) = answers(engine).values()
    assert answer.finish_reason == "error"
    with pytest.raises(ValueError, match=name):
        raise ValueError(answer.error)


def test_beams_that_the_pool_can_not_hold_are_an_error(model, bank):
    engine = engine_with(model, bank, kv_cache_bytes=LEAST * block_bytes(model))
    engine.submit(Request(words_of(0, 4), "A", 30, num_beams=3, ignore_eos=True))
    (answer,) = answers(engine).values()
    assert answer.finish_reason == "error" and f"{LEAST - 1}" in answer.error
