import hashlib
import random
from copy import deepcopy

import pytest
import tiny_tokenizers

from para_jax.data.examples import (
    answer_opening,
    encode_completion,
    encode_example,
    encode_examples,
    encode_prompt,
    most_characters,
    stop_token_ids,
    turn_stop_ids,
)

KINDS = ("plain", "with_bos", "own_space")
USER = {"role": "user", "content": "where is my parcel?"}
SAMPLES = [
    ("Message: where is my parcel?\nTeam:", "shipping"),
    ("Answer with yes or no.\n", "yes"),
    ("Answer: ", "the lazy dog"),
    ("Answer:", "\nyes"),
    ("Answer:", " yes"),
    ("Wo ist mein Paket? 日本", "größer ☃"),
    ([USER], "shipping"),
    ([USER, {"role": "assistant", "content": "the movie"}, {"role": "user", "content": "yes?"}], "no way"),
    ([USER, {"role": "assistant", "content": ""}, USER], "shipping"),  # the model had ended its answer at once
]


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return getattr(tiny_tokenizers, request.param)()


@pytest.mark.parametrize(("prompt", "completion"), SAMPLES)
def test_training_and_serving_see_the_same_prompt_ids(tokenizer, prompt, completion):
    example = encode_example(tokenizer, prompt, completion)
    assert example.prompt_ids == encode_prompt(tokenizer, prompt)
    assert example.completion_ids == encode_completion(tokenizer, prompt, completion)


@pytest.mark.parametrize(("prompt", "completion"), [s for s in SAMPLES if isinstance(s[0], str)])
@pytest.mark.parametrize("kind", ["plain", "with_bos"])
def test_prompt_and_completion_decode_to_the_joined_text(kind, prompt, completion):
    tokenizer = getattr(tiny_tokenizers, kind)()
    prompt_ids, completion_ids = encode_example(tokenizer, prompt, completion)
    space = "" if prompt[-1].isspace() or completion[0].isspace() else " "
    assert tokenizer.decode(prompt_ids + completion_ids, skip_special_tokens=True) == prompt + space + completion


@pytest.mark.parametrize("completion", ["shipping", " shipping"])
def test_a_tokenizer_that_adds_its_own_space_gets_no_second_one(completion):
    tokenizer = tiny_tokenizers.own_space()
    prompt_ids, completion_ids = encode_example(tokenizer, "Team:", completion)
    assert tokenizer.decode(prompt_ids + completion_ids, skip_special_tokens=True) == "Team: shipping"


@pytest.mark.parametrize("kind", ["own_space_zephyr", "own_space_chatml"])
def test_an_answer_after_a_newline_has_the_ids_that_it_has_in_the_next_prompt(kind):
    tokenizer = getattr(tiny_tokenizers, kind)()
    prompt, completion = encode_example(tokenizer, [USER], "shipping")
    chat = [USER, {"role": "assistant", "content": "shipping"}, USER]
    assert encode_prompt(tokenizer, chat)[: len(prompt + completion)] == prompt + completion
    assert not tokenizer.convert_ids_to_tokens(completion)[0].startswith("▁")


@pytest.mark.parametrize(("prompt", "completion"), [("Answer:\n", "yes"), ("Answer:\n", "  yes"), ("Answer:", "\nyes")])
def test_a_tokenizers_own_space_is_not_put_after_a_newline(prompt, completion):
    tokenizer = tiny_tokenizers.own_space()
    prompt_ids, completion_ids = encode_example(tokenizer, prompt, completion)
    assert prompt_ids + completion_ids == tokenizer(prompt + completion + "</s>")["input_ids"]


def test_a_completion_that_would_change_the_ids_of_its_prompt_is_encoded_alone():
    tokenizer = tiny_tokenizers.own_space()
    prompt_ids, completion_ids = encode_example(tokenizer, "Team:", "shipping")
    assert tokenizer("Team: shipping")["input_ids"][: len(prompt_ids)] != prompt_ids
    assert completion_ids == tokenizer("shipping</s>", add_special_tokens=False)["input_ids"]


def test_a_text_completion_ends_in_one_eos(tokenizer):
    ids = encode_completion(tokenizer, "Answer:", "yes")
    assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
    for written in (f"yes{tokenizer.eos_token}", f"yes{tokenizer.eos_token}\n"):  # as in data for other libraries
        assert encode_completion(tokenizer, "Answer:", written) == ids
        assert encode_examples(tokenizer, [("Answer:", written), ([USER], "yes")])[0].completion_ids == ids


def test_a_prompt_has_the_tokenizers_bos_once():
    for kind, count in (("plain", 0), ("with_bos", 1), ("own_space", 1)):
        tokenizer = getattr(tiny_tokenizers, kind)()
        for prompt in ("Answer:", [USER]):
            assert encode_prompt(tokenizer, prompt).count(tokenizer.bos_token_id) == count, (kind, prompt)
        assert tokenizer.bos_token_id not in encode_completion(tokenizer, [USER], "yes")


@pytest.mark.parametrize("kind", ["with_bos", "own_space", "moved_system"])
def test_a_text_that_begins_with_bos_gets_no_second_one(kind):
    tokenizer = getattr(tiny_tokenizers, kind)()  # the last adds no BOS itself
    bos = tokenizer.bos_token_id
    for written in (1, 2):
        ids = encode_prompt(tokenizer, tokenizer.bos_token * written + "Answer:" + tokenizer.eos_token)
        assert ids[:written] == [bos] * written and ids.count(bos) == written
        assert ids.count(tokenizer.eos_token_id) == 1
    rendered = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    assert encode_prompt(tokenizer, rendered) == encode_prompt(tokenizer, [USER])


def test_an_answers_opening_is_what_the_template_begins_every_answer_with():
    openings = [answer_opening(getattr(tiny_tokenizers, kind)(), [USER]) for kind in (*KINDS, "thinking", "reasoning")]
    assert openings == ["", "", "", "<think>\n\n</think>", "</think>"]
    assert answer_opening(tiny_tokenizers.thinking(), "Answer:") == ""
    refusing = tiny_tokenizers.byte_level(["</s>"], eos_token="</s>", chat_template="{{ 1 / 0 }}")
    assert answer_opening(refusing, [USER]) == ""


@pytest.mark.parametrize(
    ("completion", "learnt"),
    [
        ("shipping", "\n</think>\n\nshipping<|im_end|>"),
        ("<think>\nA parcel.\n</think>\n\nshipping", "A parcel.\n</think>\n\nshipping<|im_end|>"),
        ("A parcel.</think>shipping", "A parcel.\n</think>\n\nshipping<|im_end|>"),
    ],
)
def test_the_thought_that_a_generation_prompt_begins_is_the_completions_own_or_empty(completion, learnt):
    tokenizer, chat = tiny_tokenizers.reasoning(), [USER, {"role": "assistant", "content": "no"}, USER]
    for prompt in ([USER], chat):
        example = encode_example(tokenizer, prompt, completion)
        asked = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        assert asked.endswith("<think>\n") and tokenizer.decode(example.prompt_ids) == asked
        assert tokenizer.decode(example.completion_ids) == learnt


def test_a_chat_example_is_the_rendered_text_up_to_the_end_token(tokenizer):
    turn = {"role": "assistant", "content": "shipping"}
    rendered = tokenizer.apply_chat_template([USER, turn], tokenize=False)
    example = encode_example(tokenizer, [USER], "shipping")
    if tokenizer is tiny_tokenizers.own_space():
        assert tokenizer.decode(example.completion_ids) == "shipping </s>"
    else:
        assert tokenizer.decode(example.prompt_ids + example.completion_ids) == rendered.rstrip("\n")


@pytest.mark.parametrize(
    ("kind", "end"), [("plain", "<|im_end|>"), ("with_bos", "<end_of_turn>"), ("own_space", "</s>")]
)
def test_the_end_token_of_a_turn_is_in_the_loss_and_ends_generation(kind, end):
    tokenizer = getattr(tiny_tokenizers, kind)()
    end_id = tokenizer.convert_tokens_to_ids(end)
    assert encode_completion(tokenizer, [USER], "yes")[-1] == end_id
    assert set(stop_token_ids(tokenizer, (3,))) == {3, tokenizer.eos_token_id}
    assert turn_stop_ids(tokenizer, [USER]) == (end_id,)


def test_an_end_token_in_the_text_of_an_answer_is_the_templates_own(tokenizer):
    (end,) = tokenizer.convert_ids_to_tokens(turn_stop_ids(tokenizer, [USER]))
    bot = {"role": "assistant", "content": "shipping"}
    example = encode_example(tokenizer, [USER, bot, USER], "yes")
    for sign in (end, f"{end}\n", tokenizer.eos_token):
        written = [USER, bot | {"content": f"shipping{sign}"}, USER], f"yes{sign}"
        assert encode_example(tokenizer, *written) == example
        assert encode_examples(tokenizer, [written]) == [example]
    twice = f"yes{end}\n{tokenizer.eos_token}"
    assert encode_example(tokenizer, [USER], twice) == encode_example(tokenizer, [USER], "yes")
    for encoded in (encode_example, lambda tokenizer, *pair: encode_examples(tokenizer, [pair])):
        with pytest.raises(ValueError, match="is only an end token"):
            encoded(tokenizer, [USER], f" {end}")
    inside = f"{end} shipping"
    assert encode_example(tokenizer, [USER], inside).completion_ids.count(tokenizer.convert_tokens_to_ids(end)) == 2


def test_other_tokens_stay_and_so_do_ends_that_the_template_does_not_write():
    tokenizer = deepcopy(tiny_tokenizers.plain())
    written = [USER, {"role": "assistant", "content": "yes<|im_start|>"}, USER]
    assert "yes<|im_start|>" in tokenizer.decode(encode_prompt(tokenizer, written))
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    written[1]["content"] = f"yes{tokenizer.eos_token}"
    assert tokenizer.decode(encode_prompt(tokenizer, written)).count(tokenizer.eos_token) == 1


def test_a_template_may_move_the_system_message_to_the_last_question():
    tokenizer, system = tiny_tokenizers.moved_system(), {"role": "system", "content": "Be brief."}
    chat, short = [system, USER, {"role": "assistant", "content": "no"}], USER | {"content": "INST"}
    for prompt in ([system, USER], [*chat, short], [USER]):
        example = encode_example(tokenizer, prompt, "shipping")
        assert tokenizer.decode(example.prompt_ids) == tokenizer.apply_chat_template(prompt, tokenize=False)
        assert tokenizer.decode(example.completion_ids) == "shipping</s>"


@pytest.mark.parametrize("kind", ["plain", "moved_system", "own_space"])
def test_a_developer_message_is_a_system_message_to_a_template_that_knows_only_that(kind):
    tokenizer = deepcopy(getattr(tiny_tokenizers, kind)())
    if kind == "plain":  # as Qwen2.5's, which leaves out what has another role
        known = "{% for message in messages if message.role in ('system', 'user', 'assistant') %}"
        tokenizer.chat_template = tokenizer.chat_template.replace("{% for message in messages %}", known)
    user = {"role": "user", "content": "where is my parcel?"}
    system, developer = ([{"role": role, "content": "in French"}, user] for role in ("system", "developer"))
    found = encode_example(tokenizer, developer, "no")
    assert found == encode_example(tokenizer, system, "no") == encode_examples(tokenizer, [(developer, "no")])[0]
    assert "in French" in tokenizer.decode(encode_prompt(tokenizer, developer))
    assert developer[0]["role"] == "developer"
    tokenizer.chat_template += "{# developer #}"
    if kind == "plain":
        assert "in French" not in tokenizer.decode(encode_prompt(tokenizer, developer))


def test_a_turn_that_does_not_follow_its_prompt_is_an_error_also_with_a_system_message():
    tokenizer, system = tiny_tokenizers.byte_level(["</s>"], eos_token="</s>"), {"role": "system", "content": "Be."}
    texts = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    mode = "{% set mode = '<plan>' if messages[0]['role'] == 'system' else '' %}"
    asks = "{% if add_generation_prompt %}{{ 'assistant:' + mode }}{% endif %}"
    refuses = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}{% endif %}"
    for template in (mode + texts + asks, mode + refuses + texts + asks, texts + "{{ messages | length }}"):
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match="does not start with its generation prompt"):
            encode_example(tokenizer, [system, USER], "yes")


def test_a_template_without_an_end_token_gets_eos():
    tokenizer = tiny_tokenizers.byte_level(["</s>"], eos_token="</s>")
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    assert tokenizer.decode(encode_completion(tokenizer, [USER], "yes")) == " yes\n</s>"


@pytest.mark.parametrize("prompt", ["", " \n", [], None])
def test_an_empty_prompt_is_an_error(prompt):
    with pytest.raises(ValueError, match="prompt is missing or empty"):
        encode_prompt(tiny_tokenizers.plain(), prompt)


@pytest.mark.parametrize("kind", KINDS)
def test_the_prompt_of_a_request_may_be_white_space(kind):
    tokenizer = getattr(tiny_tokenizers, kind)()
    for prompt in (" ", "\n", " \n"):
        assert encode_prompt(tokenizer, prompt, may_be_blank=True) == tokenizer(prompt)["input_ids"]
    if kind != "plain":  # these put BOS before each text
        assert encode_prompt(tokenizer, "", may_be_blank=True) == [tokenizer.bos_token_id]
    for prompt, said in (("", "becomes no tokens"), ([], "prompt is empty"), (None, "text or a list")):
        with pytest.raises(ValueError, match=said):
            encode_prompt(tiny_tokenizers.plain(), prompt, may_be_blank=True)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([{"role": "user", "text": "a"}], "not a message"),
        ([[USER]], "not a message"),
        (5, "text or a list of messages.*int"),
        ("a \ud83d", "half a surrogate pair"),
        ([{"role": "user", "content": "\ud83d"}], "half a surrogate pair"),
    ],
)
def test_a_wrong_prompt_is_an_error(prompt, said):
    with pytest.raises(ValueError, match=said):
        encode_prompt(tiny_tokenizers.plain(), prompt)


def test_a_tokenizer_that_cannot_encode_is_an_error():
    no_template = tiny_tokenizers.byte_level(["</s>"], eos_token="</s>")
    with pytest.raises(ValueError, match="chat_template is not set"):
        encode_prompt(no_template, [USER])
    with pytest.raises(ValueError, match="no EOS token"):
        encode_completion(tiny_tokenizers.byte_level(["</s>"]), "Answer:", "yes")
    with pytest.raises(ValueError, match="no system role"):
        encode_prompt(tiny_tokenizers.with_bos(), [{"role": "system", "content": "yes"}, USER])
    other = tiny_tokenizers.byte_level(["</s>"], eos_token="</s>")
    other.chat_template = "{{ messages | length }}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    with pytest.raises(ValueError, match="does not start with its generation prompt"):
        encode_completion(other, [USER], "yes")


@pytest.mark.parametrize("prompt", ["a" * 5, [{"role": "user", "content": "a"}]])
def test_a_long_prompt_is_refused_before_tokenising(prompt):
    class Untouched:
        chat_template = "{{ messages }}"

    with pytest.raises(ValueError, match="prompt .*5 characters.* 4 "):
        encode_prompt(Untouched(), prompt, most=4)


def test_a_long_rendered_chat_is_refused_before_tokenising():
    rendered = tiny_tokenizers.plain().apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    with pytest.raises(ValueError, match=f"prompt .*{len(rendered)} characters"):
        encode_prompt(tiny_tokenizers.plain(), [USER], most=len(rendered) - 1)
    assert encode_prompt(tiny_tokenizers.plain(), [USER], most=len(rendered))


def test_the_character_limit_admits_every_prompt_that_fits(tokenizer):
    longest = max(tokenizer.get_vocab(), key=len)
    assert most_characters(tokenizer, 7) >= 7 * len(longest)
    long = tiny_tokenizers.byte_level(["<|" + "x" * 200 + "|>", "</s>"], eos_token="</s>")
    assert most_characters(long, 7) == 7 * 204


def test_a_prompt_never_ends_in_an_eos_that_the_tokenizer_adds():
    from tokenizers import processors

    tokenizer = tiny_tokenizers.byte_level(["<s>", "</s>"], eos_token="</s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    assert tokenizer("Answer:")["input_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(encode_prompt(tokenizer, "Answer:")) == "Answer:"
    assert tokenizer.decode(encode_prompt(tokenizer, "Answer:</s>")) == "Answer:</s>"


def test_a_text_of_end_tokens_is_read_in_one_pass():
    tokenizer = tiny_tokenizers.plain()
    answer = {"role": "assistant", "content": "yes" + tokenizer.eos_token * 2 * 10**5}
    assert encode_prompt(tokenizer, [USER, answer, USER]) == encode_prompt(
        tokenizer, [USER, answer | {"content": "yes"}, USER]
    )


# ------------------------------------------------------------------------------------------------------ many at once


OWN_SPACE = ("own_space", "own_space_zephyr", "own_space_chatml")
ALL_KINDS = ("plain", "with_bos", *OWN_SPACE, "moved_system", "adds_eos", "adds_both")
BOT = {"role": "assistant", "content": "the movie"}
DIGESTS = {
    "plain": "b26319b3a3b2df94",
    "with_bos": "2d56bdb73f8a232d",
    "own_space": "d62e0080a37b48b9",
    "own_space_zephyr": "d62e0080a37b48b9",
    "own_space_chatml": "2c9b31ba1e7d90a9",
    "moved_system": "b446b8c24db7c459",
    "adds_eos": "aeb15cb4cef312de",
    "adds_both": "acaa4f44a85e9404",
}


def tokenizer_of(kind):
    if not kind.startswith("adds"):
        return getattr(tiny_tokenizers, kind)()
    from tokenizers import processors

    special = ["<s>", "</s>"]
    made = tiny_tokenizers.byte_level(special, bos_token="<s>", eos_token="</s>", chat_template=tiny_tokenizers.CHATML)
    ids = [(token, made.convert_tokens_to_ids(token)) for token in special]
    single = "$A </s>" if kind == "adds_eos" else "<s> $A </s>"
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return made


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("pairs", [SAMPLES, []], ids=["both", "none"])
def test_batch_encoding_equals_encoding_one_by_one(kind, pairs):
    tokenizer = tokenizer_of(kind)
    assert encode_examples(tokenizer, pairs) == [encode_example(tokenizer, *pair) for pair in pairs]


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_the_ids_of_random_texts_never_change_and_are_those_of_each_alone(kind):
    draw, tokenizer = random.Random(0), tokenizer_of(kind)
    alphabet = "ab yes?  \n\t</s><eos>▁日é\u0301☃0\u00a0"
    text = lambda: "".join(draw.choices(alphabet, k=draw.randint(1, 30))) + draw.choice(["a", "a ", "a\n"])  # noqa: E731
    pairs = [(text(), text()) for _ in range(200)]
    found = encode_examples(tokenizer, pairs)
    assert found == [encode_example(tokenizer, *pair) for pair in pairs]
    assert hashlib.sha256(repr([tuple(example) for example in found]).encode()).hexdigest()[:16] == DIGESTS[kind]
