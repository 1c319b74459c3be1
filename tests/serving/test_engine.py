"""The engine answers each request as if it ran alone, whatever shares its slots, and loses nothing."""

import gc
import weakref
from copy import deepcopy
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny_tokenizers
from golden_models import strong
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_engine import (
    CONFIGS,
    LENGTH,
    SITES,
    SLOTS,
    answers,
    bank_of,
    block_bytes,
    engine_of,
    plain,
    prompt,
    tenants_of,
)
from tiny_run import tokenizer
from transformers import AddedToken

from para_jax import AdapterBank, Engine, LoraConfig, Request, generate, init_adapter
from para_jax.data.examples import encode_continuation, encode_prompt, turn_stop_ids
from para_jax.serving import decoder, prefills
from para_jax.serving.decoder import STEPS
from para_jax.serving.open_requests import QueueFull
from para_jax.serving.prefills import ROWS
from para_jax.serving.ticket import Sample, Ticket


@pytest.fixture(scope="module")
def tenants(model):
    made = tenants_of(model)
    return made | {"A2": strong(made["A"], 9, 0.3)}


@pytest.fixture
def bank(model, tenants):
    return bank_of(model, tenants)


# ------------------------------------------------------------------------------------------------------------- answers


def test_answers_equal_those_of_generate(model, bank):
    engine, names = engine_of(model, bank), ["A", None, "B", "C", "A", None]
    prompts = [prompt(i, 3 + i) for i in range(len(names))]
    ids = [engine.submit(Request(p, name, max_new_tokens=7)) for p, name in zip(prompts, names, strict=True)]
    found = answers(engine)
    texts = generate(model, prompts, tokenizer=tokenizer(), adapters=bank, tenants=names, max_new_tokens=7)
    assert [found[id, 0].text for id in ids] == texts
    assert len({text for text in texts}) == len(names)


def test_a_prompt_may_be_token_ids(model, bank):
    engine, ids = engine_of(model, bank), tuple(encode_prompt(tokenizer(), prompt(1)))
    text, same = (engine.submit(Request(p, "A", max_new_tokens=7)) for p in (prompt(1), ids))
    wrong = [engine.submit(Request(p, "A")) for p in ((), (-1,), (model.config.vocab_size,))]
    found = answers(engine)
    assert plain(found[text, 0]) == plain(found[same, 0])
    assert all(found[id, 0].error.startswith("prompt") for id in wrong)


def test_sampling_depends_on_the_request_alone_and_equals_generate(model, bank):
    options = dict(max_new_tokens=6, temperature=1.5, top_k=20, top_p=0.9)
    engine = engine_of(model, bank)
    ids = [engine.submit(Request(prompt(i), "A", seed=5, **options)) for i in range(5)]
    found = answers(engine)
    for i, id in enumerate(ids):
        alone = generate(model, [prompt(i)], tokenizer=tokenizer(), adapters=bank, tenants=["A"], seed=5, **options)
        assert [found[id, 0].text] == alone


def test_samples_share_a_prefill_and_equal_separate_requests(model, bank, monkeypatch):
    engine, calls = engine_of(model, bank), count_prefills(monkeypatch)
    options = dict(max_new_tokens=5, temperature=1.0)
    many = engine.submit(Request(prompt(0), "B", n=5, seed=3, **options))
    found = answers(engine)
    assert len(calls) == 1 and {key for key in found} == {(many, i) for i in range(5)}
    single = [engine.submit(Request(prompt(0), "B", seed=3 + i, **options)) for i in range(5)]
    alone = answers(engine)
    assert [plain(found[many, i]) for i in range(5)] == [plain(alone[id, 0]) for id in single]
    assert len({tuple(found[many, i].tokens) for i in range(5)}) > 1


def test_rows_stop_at_their_own_stop_texts_and_lengths(model, bank):
    engine = engine_of(model, bank)
    free = engine.submit(Request(prompt(1), "A", max_new_tokens=9))
    whole = answers(engine)[free, 0]
    assert (whole.finish_reason, len(whole.tokens)) == ("length", 9)
    end = f"w{whole.tokens[4]}"
    cut = engine.submit(Request(prompt(1), "A", max_new_tokens=9, stop=(end,)))
    short = engine.submit(Request(prompt(1), "A", max_new_tokens=1))
    found = answers(engine)
    assert found[cut, 0].finish_reason == "stop" and found[cut, 0].text == whole.text[: whole.text.index(end)]
    assert found[short, 0].tokens == whole.tokens[:1]


def test_an_end_token_stops_a_row_and_is_not_part_of_the_answer(model, bank):
    def answer(engine):
        id = engine.submit(Request(prompt(2), None, max_new_tokens=8))
        return answers(engine)[id, 0]

    whole = answer(engine_of(model, bank)).tokens
    found = answer(engine_of(model, bank, stop_ids=[whole[3]]))
    assert found.finish_reason == "stop" and found.tokens == whole[: whole.index(whole[3])]
    grown = deepcopy(tokenizer())
    grown.eos_token = f"w{whole[3]}"
    ends, goes_on = (Engine(model, bank, grown, slots=1, max_length=LENGTH, stop_ids=ids) for ids in (None, ()))
    assert answer(ends).tokens == found.tokens and answer(goes_on).tokens == whole


def test_a_request_may_go_on_past_end_tokens_and_still_ends_at_its_own(model, bank):
    grown = deepcopy(tokenizer())
    grown.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

    def answer(prompt, stop_ids=(), **options):
        engine = Engine(model, bank, grown, slots=1, max_length=LENGTH, stop_ids=stop_ids)
        engine.submit(Request(prompt, "A", 12, ignore_eos=True, **options))
        (found,) = engine.run()
        return found.tokens, found.finish_reason

    whole, _ = answer(prompt(1))
    own = next(token for token in whole if whole.index(token) > 2)
    grown.add_tokens([AddedToken(f"w{own}", special=True)])
    until = whole[: whole.index(own)], "stop"
    assert answer(prompt(1), whole) == (whole, "length")
    assert answer(prompt(1), whole, stop_token_ids=(own,)) == until == answer(prompt(1), whole, stop=f"w{own}")
    grown.chat_template += "{% if not add_generation_prompt %} " + f"w{own}" + "{% endif %}"
    chat = [{"role": "user", "content": prompt(1)}]
    assert turn_stop_ids(grown, chat) == (own,) and answer(chat) == (whole, "length")


# ----------------------------------------------------------------------------------------------------------- isolation

ASKED = st.fixed_dictionaries(
    {
        "tenant": st.sampled_from([*CONFIGS, None]),
        "seed": st.integers(0, 5),
        "length": st.integers(1, 20),  # prompts of one seed begin alike
        "new": st.integers(1, 12),
        "temperature": st.sampled_from([0.0, 0.0, 1.0]),
        "wait": st.integers(0, 2),
        "cancel": st.booleans(),
        "replace": st.sampled_from([None, None, "A", "A2"]),
    }
)


@pytest.mark.parametrize("end", ["answered", "streamed", "left", "cancelled"])
def test_nothing_keeps_an_adapter_after_its_last_request(model, bank, tenants, end):
    """Also without the garbage collector, which may not come by for long. LoadingBank counts the adapters that stay."""
    engine = engine_of(model, bank)
    weights = weakref.ref(next(iter(bank.entry("A").weights.values())))
    gc.disable()
    try:
        if end in ("streamed", "left"):
            stream = engine.open_stream(Request(prompt(1), "A", 20))
        else:
            engine.submit(Request(prompt(1), "A", 20, n=2, id="x"))
        engine.step()
        bank.replace("A", tenants["B"])
        assert weights() is not None
        if end == "streamed":
            assert list(stream)
            stream = None
        elif end == "left":
            stream.close()
            stream = None
            assert not engine.open and engine.wait(0), "nothing is open, but a slot still has the adapter"
            engine.step()
            assert not engine.wait(0)
        elif end == "cancelled":
            assert engine.cancel("x")
            engine.step()
        else:
            assert list(engine.run())
        assert weights() is None
    finally:
        gc.enable()


@pytest.fixture(scope="module")
def lab(model, tenants):
    """An engine that all schedules share, one for each request alone, and the answers of the latter. The first has a
    prefix cache of 8 blocks, the other one none."""
    banks = bank_of(model, tenants), bank_of(model, tenants)
    cached = engine_of(model, banks[0], prefix_cache_bytes=8 * block_bytes(model))
    return [cached, engine_of(model, banks[1], prefix_cache_bytes=0)], banks, {}


@settings(max_examples=30)
@given(st.lists(ASKED, min_size=1, max_size=8))
def test_any_schedule_gives_each_request_what_it_gets_alone(tenants, lab, schedule):
    (engine, alone), (bank, other), known = lab
    asked, cancelled, found = {}, set(), {}

    def take(rounds):
        for completion in [completion for _ in range(rounds) for completion in engine.step()]:
            assert completion.id not in found, "answered twice"
            found[completion.id] = completion

    for one in schedule:
        if one["replace"]:
            bank.replace("A", tenants[one["replace"]])
        heat = one["temperature"]
        request = Request(prompt(one["seed"], one["length"]), one["tenant"], one["new"], heat, seed=one["seed"])
        id = engine.submit(request)
        asked[id] = request, bank.entry("A").content
        take(one["wait"])
        if one["cancel"] and engine.cancel(id):
            cancelled.add(id)
    while len(found) < len(asked):
        take(1)
    assert set(found) == set(asked) and engine.open == 0
    for id, (request, content) in asked.items():
        if id in cancelled:
            assert (found[id].finish_reason, found[id].error) == ("error", "cancelled")
            continue
        key = (request, content if request.tenant == "A" else None)
        if key not in known:
            if request.tenant == "A":
                other.replace("A", tenants["A" if content == lab_content(other, tenants, "A") else "A2"])
            forget_prompts(alone)
            expected = alone.submit(request)
            known[key] = answers(alone)[expected, 0]
        assert plain(found[id]) == plain(known[key])


def forget_prompts(engine):
    """Makes the engine prefill others, so that it keeps none of the prompts before."""
    for i in range(ROWS):
        for tenant in (None, "B"):
            engine.submit(Request((20 + i,), tenant, max_new_tokens=1))
    answers(engine)


def watch_pools(monkeypatch):
    """The pool after each dispatch; all but the last are donated."""
    seen, real = [], decoder.steps

    def watched(*arguments):
        made = real(*arguments)
        seen.append(made[1])
        return made

    monkeypatch.setattr(decoder, "steps", watched)
    return seen


def lab_content(bank, tenants, name):
    bank.replace("A", tenants[name])
    return bank.entry("A").content


def test_a_hostile_tenant_affects_neither_its_slot_nor_its_neighbours(model, tenants, bank, monkeypatch):
    calm = engine_of(model, bank)
    ids = [calm.submit(Request(prompt(i), name, 6)) for i, name in enumerate(["A", None, "B", "A", None, "B"])]
    expected = answers(calm)
    hostile = jax.tree.map(lambda leaf: leaf * 1e25, tenants["A"])  # finite itself; what it leaves in the cache is not
    bank.add("hostile", hostile)
    troubled = engine_of(model, bank)
    for i in range(SLOTS):
        troubled.submit(Request(prompt(i, 20), "hostile", 15, id=f"h{i}"))
    mixed = []
    for i, name in enumerate(["A", None, "B", "A", None, "B"]):
        mixed.append(troubled.submit(Request(prompt(i), name, 6)))
        troubled.submit(Request(prompt(i), "hostile", 3, id=f"more {i}"))
    pools = watch_pools(monkeypatch)
    ended = {(one.id, one.index): one for one in troubled.step()}
    assert any(not np.isfinite(values).all() for _, values in pools[-1])
    found = ended | answers(troubled)
    assert len(found) == SLOTS + 12
    assert [plain(found[id, 0]) for id in mixed] == [plain(expected[id, 0]) for id in ids]
    hostile = [found[key] for key in found if key[0] not in mixed]
    assert {(one.finish_reason, "finite" in (one.error or ""), *one.tokens) for one in hostile} == {("error", True)}


def test_an_answer_whose_logits_overflow_halfway_ends_there_with_an_error(model, tenants, bank, monkeypatch):
    """Greedy and sampled, next to others, with the tokens that came before."""
    asked = [Request(prompt(1), "A", 9, t, seed=5, logprobs=n) for t, n in ((0.0, None), (0.9, None), (0.0, 1))]
    engine, steps = engine_of(model, bank, max_logprobs=1), decoder.steps
    ids = [engine.submit(one) for one in asked]
    found = answers(engine)
    expected = [found[id, 0] for id in ids]

    def overflow(treedef, leaves, state, *rest):
        broken = [leaf * np.nan if leaf.dtype == np.float32 else leaf for leaf in leaves]
        return steps(treedef, broken, state, *rest)

    ids = [engine.submit(one) for one in asked]
    engine.step()  # the prompts, and the first steps
    monkeypatch.setattr(decoder, "steps", overflow)
    found = answers(engine)
    for id, whole in zip(ids, expected, strict=True):
        one = found[id, 0]
        assert one.finish_reason == "error" and "finite" in one.error
        assert one.tokens == whole.tokens[: len(one.tokens)] and 0 < len(one.tokens) < 9
        assert (one.logprobs or []) == (whole.logprobs or [])[: len(one.tokens)]


# --------------------------------------------------------------------------------------------------------------- reuse


def count_prefills(monkeypatch):
    """The calls of the programs that read prompts, whole or in chunks."""
    calls = []

    def counted(real):
        return lambda *arguments, **options: calls.append(arguments) or real(*arguments, **options)

    monkeypatch.setattr(decoder, "prefill", counted(decoder.prefill))
    monkeypatch.setattr(prefills, "prefill_chunk", counted(prefills.prefill_chunk))
    return calls


def test_only_the_same_adapter_and_the_same_whole_prompt_are_reused(model, tenants, bank, monkeypatch):
    engine, calls = engine_of(model, bank), count_prefills(monkeypatch)

    def ask(text, tenant):
        before = len(calls)
        id = engine.submit(Request(text, tenant, 4))
        return answers(engine)[id, 0].tokens, len(calls) - before

    text = prompt(3)
    first, prefills = ask(text, "A")
    assert prefills == 1 and ask(text, "A") == (first, 0)
    other, prefills = ask(text, "B")
    assert prefills == 1 and other != first
    longer, prefills = ask(text + " w77", "A")  # the same prefix has another last token, so other factors
    assert prefills == 1 and longer != first
    bank.replace("A", tenants["A2"])  # the same name
    replaced, prefills = ask(text, "A")
    assert prefills == 1 and replaced != first
    bank.add("copy", tenants["A"])  # another name, the same adapter
    assert ask(text, "copy") == (first, 0)
    base, prefills = ask(text, None)
    assert prefills == 1 and base != first


def test_the_adapter_at_submission_answers_the_request(model, tenants, bank):
    engine = engine_of(model, bank)
    now = engine.submit(Request(prompt(4), "A", 5))
    bank.replace("A", tenants["A2"])
    later = engine.submit(Request(prompt(4), "A", 5))
    bank.remove("A")
    found = answers(engine)
    bank.add("A", tenants["A"]), bank.add("A2", tenants["A2"])
    expected = generate(
        model, [prompt(4)] * 2, tokenizer=tokenizer(), adapters=bank, tenants=["A", "A2"], max_new_tokens=5
    )
    assert [found[now, 0].text, found[later, 0].text] == expected


# --------------------------------------------------------------------------------------------- fairness, faults, limits


def test_requests_start_in_order_and_few_prefills_come_between_decode_steps(model, bank, monkeypatch):
    engine, calls = engine_of(model, bank, slots=4, max_prefill_tokens=2 * 16), count_prefills(monkeypatch)
    ids = [engine.submit(Request(prompt(i), "A", max_new_tokens=1 if i else 30)) for i in range(12)]
    rounds, ended = [], []
    while engine.open:
        before = len(calls)
        ended += [completion.id for completion in engine.step()]  # all but the first end in the round they start
        rounds.append(len(calls) - before)
    assert [id for id in ended if id != ids[0]] == ids[1:]
    assert max(rounds) == 2, "two prompts in the shortest padded length"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tenant": "AA"}, "no tenant 'AA'; the nearest are A"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 39}, "prompt: 6 tokens and max_new_tokens 39 are more than the engine's max_length 40"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"n": 129}, "n is 129"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": [{"role": "user"}]}, "prompt"),
    ],
)
def test_a_wrong_request_is_an_error_and_affects_no_other(model, bank, wrong, message):
    engine = engine_of(model, bank)
    good = Request(prompt(5), "A", 4)
    first = engine.submit(good)
    bad = engine.submit(replace(good, **wrong))
    second = engine.submit(good)
    found = answers(engine)
    assert found[bad, 0].finish_reason == "error" and message in found[bad, 0].error and found[bad, 0].text == ""
    assert plain(found[first, 0]) == plain(found[second, 0]) and found[first, 0].error is None
    assert len(found) == 3


def test_a_full_queue_refuses_clearly_and_goes_on(model, bank):
    engine = engine_of(model, bank, queue_limit=2)
    ids = [engine.submit(Request(prompt(i), max_new_tokens=3)) for i in range(2)]
    with pytest.raises(QueueFull, match="the queue holds 2 of 2 samples; take answers first"):
        engine.submit(Request(prompt(3), max_new_tokens=3))
    found = {completion.id for completion in engine.step()}
    ids.append(engine.submit(Request(prompt(4), max_new_tokens=3, n=2)))
    assert found | {key[0] for key in answers(engine)} == set(ids)


def test_cancelling_frees_the_slot_at_once(model, bank):
    engine = engine_of(model, bank)
    running = [engine.submit(Request(prompt(i), "A", 30)) for i in range(SLOTS)]
    waiting = [engine.submit(Request(prompt(9), "A", 3)), engine.submit(Request(prompt(8), "A", 3))]
    assert engine.step() == []
    assert engine.cancel(running[1]) and engine.cancel(waiting[1]) and not engine.cancel(running[1])
    assert not engine.cancel("unheard of")
    found = {(c.id, c.index): c for c in engine.step()}
    assert set(found) == {(running[1], 0), (waiting[1], 0), (waiting[0], 0)}, "the waiting one took the free slot"
    found |= answers(engine)
    assert len(found) == 5 and found[running[1], 0].error == found[waiting[1], 0].error == "cancelled"
    assert len(found[running[1], 0].tokens) == 1 + STEPS and found[waiting[0], 0].finish_reason == "length"


def test_ids_are_given_or_numbered_and_an_open_one_is_refused(model, bank):
    engine = engine_of(model, bank)
    assert engine.submit(Request(prompt(1), max_new_tokens=1, id=0)) == 0
    assert engine.submit(Request(prompt(1), max_new_tokens=1)) == 1
    with pytest.raises(ValueError, match="id: 0"):
        engine.submit(Request(prompt(1), id=0))
    assert set(answers(engine)) == {(0, 0), (1, 0)}
    assert engine.submit(Request(prompt(1), max_new_tokens=1, id=0)) == 0


@pytest.mark.long
def test_lora_joins_where_the_bank_lets_it_and_the_engine_says_so(model, tenants, capsys):
    lora = strong(init_adapter(LoraConfig(r=4), model.config), 5, 0.3)
    bank = AdapterBank(model.config, max_r=4, methods=("para", "lora"), sites=SITES)
    bank.add("A", tenants["A"]), bank.add("L", lora)
    engine = engine_of(model, bank)
    said = capsys.readouterr().err
    assert "engine: 3 slots of up to 40 tokens" in said and "methods that may join: para, lora" in said
    ids = [engine.submit(Request(prompt(i), name, 6)) for i, name in enumerate(["L", "A", None, "L"])]
    found = answers(engine)
    texts = generate(
        model, [prompt(i) for i in range(4)], tokenizer=tokenizer(), adapters=bank, tenants=["L", "A", None, "L"],
        max_new_tokens=6,
    )  # fmt: skip
    assert [found[id, 0].text for id in ids] == texts


def test_an_engine_without_a_bank_serves_the_base_model_alone(model):
    engine = engine_of(model, None)
    good, bad = engine.submit(Request(prompt(1), None, 5)), engine.submit(Request(prompt(1), "A", 5))
    found = answers(engine)
    assert [found[good, 0].text] == generate(model, [prompt(1)], tokenizer=tokenizer(), max_new_tokens=5)
    assert "tenant: 'A'" in found[bad, 0].error


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 10**6},
        {"max_length": 1},
    ],
)
def test_wrong_sizes_of_an_engine_are_refused(model, bank, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Engine(model, bank, tokenizer(), **({"slots": 2, "max_length": 32} | options))


def test_an_out_of_vocabulary_token_fails_only_its_own_request(model, bank):
    grown = deepcopy(tokenizer())
    grown.add_tokens(["<image>"])
    engine = Engine(model, bank, grown, slots=SLOTS, max_length=LENGTH)
    wrong, right = engine.submit(Request("w20 <image>")), engine.submit(Request(prompt(1), max_new_tokens=2))
    found = answers(engine)
    assert found[wrong, 0].finish_reason == "error" and "256" in found[wrong, 0].error
    assert found[right, 0].finish_reason == "length"


def test_warm_up_is_refused_while_rows_decode(model, bank):
    engine = engine_of(model, bank)
    stream = engine.stream(Request(prompt(0), max_new_tokens=15))
    next(stream)
    with pytest.raises(ValueError, match="warm_up: 1 requests"):
        engine.warm_up()


@pytest.mark.parametrize("stop", [(), ("\n\n",)])
def test_an_answer_is_without_white_space_at_its_ends_unless_the_request_keeps_it(stop):
    words = tiny_tokenizers.plain()
    tokens = words("  yes, \n a \n", add_special_tokens=False)["input_ids"]
    for strip, text in ((True, "yes, \n a"), (False, "  yes, \n a \n")):
        for streamed in (False, True):
            sample = Sample(Ticket(Request("a", stop=stop, strip=strip), streamed), 0, [1], None)
            followed(sample, words, tokens)
            if sample.text is not None:
                sample.text.finish()
                assert "".join(sample.text.pieces) == text
            assert sample.full_text(words, partial=False) == text
    words, tokens = tiny_tokenizers.own_space(), encode_continuation(tiny_tokenizers.own_space(), "    return x")
    for alone, text in ((False, "    return x"), (True, "   return x")):  # SentencePiece's decoder drops a space
        sample = Sample(Ticket(Request("a", stop=stop, strip=False, alone=alone), False), 0, [1], None)
        followed(sample, words, tokens)
        assert (sample.text is None or not sample.text.finish()) and sample.full_text(words, partial=False) == text


def followed(sample, words, tokens):
    sample.follow_text(words)
    sample.tokens = tokens
    for token in tokens if sample.text is not None else ():
        sample.text.add(token)
