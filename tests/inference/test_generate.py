"""Generation writes what the teacher-forced pass would choose, each row by itself, and ends where it should."""

from copy import deepcopy
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from characters import character_tokenizer
from golden_models import backbone, golden, golden_tenants, strong
from long_cases import long
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerFast

from para_jax import (
    AdapterBank,
    Engine,
    ParaConfig,
    Request,
    forward,
    generate,
    init_adapter,
    pick,
    stack_adapters,
)
from para_jax.inference.draw import NO_TOKEN, row_keys, sample
from para_jax.inference.generate import beam_searches, generate_tokens
from para_jax.inference.sampling import Sampling

WORDS = ["<pad>", "<s>", "</s>"] + [f"w{i}" for i in range(3, 256)]
CHAT = (
    "{% for m in messages %}{{ 'w9 ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}w8{% endif %}"
)
PROMPTS = [[7, 8, 9], [20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30], [5], list(range(40, 57))]


@pytest.fixture(scope="module")
def tokenizer():
    """One word a token: w<id>, as many as the model has."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.Metaspace(replacement="|")  # no space of its own between words
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=CHAT
    )


@pytest.fixture(scope="module")
def model():
    return backbone("llama")


@pytest.fixture(scope="module")
def tenants(model):
    """Two strong adapters: they move the logits, and differ, by more than 0.1."""
    fresh = init_adapter(ParaConfig(r=4), model.config)
    made = [strong(fresh, seed) for seed in (1, 2)]
    logits = [forward(model, adapter, np.array(PROMPTS[:1]), 3) for adapter in (None, *made)]
    assert all(abs(logits[i] - logits[j]).max() > 0.1 for i, j in ((0, 1), (0, 2), (1, 2)))
    return made


def write(model, adapters, prompts=PROMPTS, count=12, stop_ids=(), ended=None, **settings):
    return generate_tokens(model, adapters, prompts, Sampling(count, **settings), stop_ids=stop_ids, ended=ended)


def chosen(model, adapter, prompt, count):
    """The argmax of the whole teacher-forced pass, one token at a time."""
    ids = np.zeros((1, 64), np.int32)
    ids[0, : len(prompt)] = prompt
    for length in range(len(prompt), len(prompt) + count):
        logits = forward(model, adapter, ids, len(prompt), length)
        ids[0, length] = logits[0, length - 1].argmax()
    return ids[0, len(prompt) : len(prompt) + count].tolist()


# ---------------------------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("family", ["llama", long("gemma3_text")])
def test_cached_tokens_are_those_of_the_teacher_forced_pass(family):
    model = backbone(family)
    adapter = strong(init_adapter(ParaConfig(r=4), model.config), 3)
    written = write(model, adapter, count=20)
    assert written == [chosen(model, adapter, prompt, 20) for prompt in PROMPTS]
    assert written != write(model, None, count=20)


def test_a_mixed_batch_equals_each_tenant_alone(model, tenants):
    rows = [-1, 0, 1, 0]
    mixed = write(model, pick(stack_adapters(tenants), np.array(rows)))
    adapters = {-1: None, 0: tenants[0], 1: tenants[1]}
    assert mixed == [write(model, adapters[row], [prompt])[0] for row, prompt in zip(rows, PROMPTS, strict=True)]
    assert (
        len(
            {
                tuple(tokens)
                for tokens in write(model, pick(stack_adapters(tenants), np.array([-1, 0, 1])), PROMPTS[:1] * 3)
            }
        )
        == 3
    )


@pytest.mark.parametrize("stop", [(), ("nowhere",)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error_with_the_prompt(model, tenants, tokenizer, stop, temperature):
    """And not the text of some token."""
    broken = jax.tree.map(lambda leaf: leaf * 1e25, tenants[0])
    rows, how = pick(stack_adapters([tenants[1], broken]), np.array([0, 1])), {"stop": stop, "temperature": temperature}
    with pytest.raises(ValueError, match="prompt 1: .*finite"):
        generate(model, ["w7 w8", "w20"], tokenizer=tokenizer, adapters=rows, max_new_tokens=9, **how)
    ends = generate_tokens(model, rows, PROMPTS[:2], Sampling(9, temperature))
    assert [tokens.index(NO_TOKEN) + 1 if NO_TOKEN in tokens else 0 for tokens in ends] == [0, len(ends[1])]


def test_a_stacked_model_writes_the_same(model, tenants):
    assert write(backbone("llama", "stacked"), tenants[0]) == write(model, tenants[0])


def test_the_golden_tokens_are_written(model):
    expected = golden("llama")
    prompts = [ids[:n].tolist() for ids, n in zip(expected["input_ids"], expected["lengths"], strict=True)]
    assert write(model, None, prompts) == expected["greedy_tokens"].tolist()
    expected = golden("llama", "para")
    prompts = [ids[:n].tolist() for ids, n in zip(expected["input_ids"], expected["prompt_lengths"], strict=True)]
    rows = pick(stack_adapters(golden_tenants("llama")), expected["tenant"])
    assert write(model, rows, prompts) == expected["greedy_tokens"].tolist()


def test_seeds_reproduce_and_rows_draw_by_themselves(model, tenants):
    settings = {"temperature": 1.3, "top_k": 50, "top_p": 0.95}
    together = write(model, tenants[0], seed=7, **settings)
    assert together == write(model, tenants[0], seed=7, **settings)
    assert together != write(model, tenants[0], seed=8, **settings)
    alone = [write(model, tenants[0], [prompt], seed=7 + i, **settings)[0] for i, prompt in enumerate(PROMPTS)]
    assert together == alone
    twins = write(model, tenants[0], PROMPTS[:1] * 2, seed=7, **settings)
    assert twins[0] != twins[1]


def test_a_token_is_drawn_from_the_teacher_forced_logits_with_its_position_key(model, tenants):
    prompt, seed = PROMPTS[0], 11
    ids = prompt + write(model, tenants[0], [prompt], 6, temperature=2.0, seed=seed)[0]
    logits = forward(model, tenants[0], np.array([ids]), len(prompt))[0]
    for position in range(6):
        settings = (np.full(1, value, dtype) for value, dtype in ((2.0, np.float32), (0, np.int32), (1.0, np.float32)))
        keys = row_keys(jnp.full(1, seed, jnp.uint32), position)
        assert sample(logits[None, len(prompt) - 1 + position], keys, *settings).item() == ids[len(prompt) + position]


def test_the_likeliest_token_alone_is_greedy(model):
    greedy = write(model, None)
    assert write(model, None, temperature=1e-40) == greedy == write(model, None, temperature=1e-300)
    assert write(model, None, temperature=0.9, top_k=1) == greedy == write(model, None, temperature=0.9, top_p=1e-6)


# ---------------------------------------------------------------------------------------------------------------- ends


@pytest.mark.parametrize("count", [1, 7, 8, 9, 17])
def test_as_many_tokens_as_asked_for(model, count):
    assert write(model, None, count=count) == [row[:count] for row in write(model, None, count=20)]


def test_a_row_ends_before_its_stop_token_and_the_others_go_on(model):
    free = write(model, None, count=20)
    stop = free[1][4]
    expected = [row[: row.index(stop)] if stop in row else row for row in free]
    assert write(model, None, count=20, stop_ids=[stop]) == expected
    assert len(expected[1]) <= 4 and any(len(row) == 20 for row in expected)


def test_text_ends_before_a_stop_string_that_spans_tokens(model, tokenizer):
    whole = generate(model, ["w7 w8 w9"], tokenizer=tokenizer, max_new_tokens=20)[0]
    words = [f"w{i}" for i in write(model, None, PROMPTS[:1], count=20)[0]]
    assert whole == "".join(words)
    end = words[5][-1] + words[6] + words[7][:1]  # parts of three tokens
    cut = generate(model, ["w7 w8 w9"], tokenizer=tokenizer, max_new_tokens=20, stop=["no such", end])[0]
    assert cut == whole[: whole.index(end)] and 0 < len(cut) < len(whole)
    assert generate(model, ["w7 w8 w9"], tokenizer=tokenizer, max_new_tokens=20, stop=words[0])[0] == ""


def test_beams_write_the_best_answer_up_to_its_end(model, tokenizer, tenants):
    texts, rows = ["w7 w8 w9", "w5"], pick(stack_adapters(tenants), [0, 1])
    settings = {"num_beams": 3, "length_penalty": 0.5}
    searches = beam_searches(model, rows, [[7, 8, 9], [5]], Sampling(8, **settings), [{2}, {2}])
    best = [search.answers[0].tokens for search in searches]
    given = {"tokenizer": tokenizer, "adapters": rows, "max_new_tokens": 8}
    assert generate(model, texts, **given, **settings) == ["".join(f"w{i}" for i in row if i != 2) for row in best]
    assert generate(model, texts, **given, **settings) != generate(model, texts, **given)


@pytest.mark.parametrize("named", [True, False])
def test_text_ends_before_a_stop_text_that_is_a_special_token(model, tokenizer, named):
    """Which decoded text does not show. Most special tokens of a vocabulary, such as Llama 3's <|eot_id|>, have no name
    among the tokenizer's settings."""
    written = [f"w{i}" for i in write(model, None, PROMPTS[:1], count=20)[0]]
    special, at = deepcopy(tokenizer), written.index(written[5])
    if named:
        special.add_special_tokens({"additional_special_tokens": [written[5]]})
    else:
        special.add_tokens([AddedToken(written[5], special=True)])
    assert (written[5] in special.all_special_tokens) == named
    ask = partial(generate, model, ["w7 w8 w9"], tokenizer=special, max_new_tokens=20)
    assert written[5] not in ask()[0]
    assert ask(stop=["no such", written[5]]) == ["".join(written[:at])] != ask()
    engine = Engine(model, None, special, slots=1, max_length=64)
    engine.submit(Request("w7 w8 w9", max_new_tokens=20, stop=(written[5],)))
    (answer,) = engine.run()
    assert (answer.text, answer.finish_reason, len(answer.tokens)) == ("".join(written[:at]), "stop", at)


def test_a_chat_ends_before_its_templates_end_token_and_a_text_does_not(model, tokenizer):
    """The same prompt ids as text and as chat, in one batch."""
    written = [f"w{i}" for i in write(model, None, PROMPTS[:1], count=20)[0]]
    special, at = deepcopy(tokenizer), written.index(written[5])
    special.add_special_tokens({"additional_special_tokens": [written[5]]})
    answer = "{{ ' ' + m.content + ' " + written[5] + "' }}"
    special.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}" + answer + "{% endif %}{% endfor %}"
    )
    asked = ["w7 w8 w9", [{"role": "user", "content": "w7 w8 w9"}]]
    expected = ["".join(word for word in written if word != written[5]), "".join(written[:at])]
    assert generate(model, asked, tokenizer=special, max_new_tokens=20) == expected
    assert generate(model, asked[1:], tokenizer=special, max_new_tokens=20) == expected[1:]
    engine = Engine(model, None, special, slots=2, max_length=64)
    for i, prompt in enumerate(asked):
        engine.submit(Request(prompt, max_new_tokens=20, id=i))
    assert [answer.text for answer in sorted(engine.run())] == expected


def test_text_ends_before_the_end_token_of_config_or_tokenizer(model, tokenizer):
    expected = golden("llama")
    prompts = [ids[:n].tolist() for ids, n in zip(expected["input_ids"], expected["lengths"], strict=True)]
    free = write(model, None, prompts)
    tokenizer.eos_token, before = WORDS[free[0][3]], tokenizer.eos_token
    try:
        texts = [" ".join(WORDS[i] for i in ids) for ids in prompts]
        written = generate(model, texts, tokenizer=tokenizer, max_new_tokens=12)
    finally:
        tokenizer.eos_token = before
    stops = {free[0][3], *model.config.eos_token_ids}
    ends = [next((i for i, token in enumerate(row) if token in stops), 12) for row in free]
    assert written == ["".join(WORDS[i] for i in row[:end]) for row, end in zip(free, ends, strict=True)]
    assert ends[0] <= 3


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompts": []}, "prompts.*empty"),
        ({"prompts": "w7"}, "prompts is a str"),
        ({"prompts": ["w7", " "]}, "prompt 1: prompt is missing or empty"),
        ({"tenants": ["a"]}, r"tenants is \['a'\].*AdapterBank"),
        ({"max_new_tokens": 511}, r"prompt 1: 2 tokens and max_new_tokens 511 are more than the model's 512 positions"),
        ({"top_p": 1.1}, "top_p is 1.1"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_computed(model, tokenizer, monkeypatch, options, message):
    monkeypatch.setattr("para_jax.model.adapted._prefill", lambda *args: pytest.fail("something was computed"))
    arguments = {"prompts": ["w7", "w7 w8"]} | options
    with pytest.raises(ValueError, match=message):
        generate(model, arguments.pop("prompts"), tokenizer=tokenizer, **arguments)


def test_rows_of_another_backbone_are_refused(model, tenants):
    with pytest.raises(ValueError, match="another backbone"):
        write(backbone("gemma"), tenants[0])
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        write(model, None, [[5], []])
    with pytest.raises(ValueError, match="token ids 0 to 256"):
        write(model, None, [[5, 256]])


def test_a_bank_answers_each_prompt_as_its_tenant_alone_would(model, tokenizer, tenants):
    bank = AdapterBank.holding({"a": tenants[0], "b": tenants[1]}, model.config)
    texts, names = ["w7 w30"] * 4, ["b", None, "a", "b"]
    together = generate(model, texts, tokenizer=tokenizer, adapters=bank, tenants=names, max_new_tokens=8)
    for name, text in zip(names, together, strict=True):
        adapter = {"a": tenants[0], "b": tenants[1], None: None}[name]
        assert generate(model, texts[:1], tokenizer=tokenizer, adapters=adapter, max_new_tokens=8) == [text]
    assert len(set(together)) == 3


@pytest.mark.parametrize(
    "names, message",
    [
        (None, "tenants is None.* 2 prompts"),
        (["a"], r"tenants is \['a'\].* 2 prompts"),
        (["a", "aa"], "no tenant 'aa'; the nearest are a"),
    ],
)
def test_wrong_tenants_of_a_bank_are_refused_before_anything_is_computed(
    model, tokenizer, tenants, monkeypatch, names, message
):
    monkeypatch.setattr("para_jax.model.adapted._prefill", lambda *args: pytest.fail("something was computed"))
    bank = AdapterBank.holding({"a": tenants[0]}, model.config)
    with pytest.raises(ValueError, match=message):
        generate(model, ["w7", "w8"], tokenizer=tokenizer, adapters=bank, tenants=names)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_structured_answers_are_the_engines(model, tenants, temperature):
    tokenizer, named = deepcopy(character_tokenizer()), ["A", None, "B"]
    bank = AdapterBank(model.config, max_r=4)
    bank.add("A", tenants[0])
    bank.add("B", tenants[1])
    prompts = ["give", "an answer", [{"role": "user", "content": "x"}]]
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    engine = Engine(model, bank, tokenizer, slots=2, max_length=96)
    for structure in ({"regex": "[a-f]{2,4}"}, {"choice": ["yes", "no, never"]}, {"regex": "<[xy]{20,}"}):
        given = {"max_new_tokens": 12, "temperature": temperature, "structured_outputs": structure}
        texts = generate(model, prompts, tokenizer=tokenizer, adapters=bank, tenants=named, seed=3, **given)
        for i, (prompt, tenant) in enumerate(zip(prompts, named, strict=True)):
            engine.submit(Request(prompt, tenant, seed=3 + i, id=i, **given))
        assert texts == [answer.text for answer in sorted(engine.run(), key=lambda one: one.id)] and all(texts)
    with pytest.raises(ValueError, match="num_beams"):
        generate(model, prompts[:1], tokenizer=tokenizer, num_beams=2, structured_outputs=structure)
