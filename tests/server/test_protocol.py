"""Every field of a request body is computed, or refused by name."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from para_jax.server.errors import ApiError
from para_jax.server.protocol import ChatBody, CompletionBody, Message, read

CHAT = {"model": "A", "messages": [{"role": "user", "content": "Hi"}]}
TEXT = {"model": "A", "prompt": "Hi"}


def read_chat(body):
    return read(ChatBody, json.dumps(body).encode())


def read_completion(body):
    return read(CompletionBody, json.dumps(body).encode())


READERS = [(read_chat, CHAT), (read_completion, TEXT)]
both = pytest.mark.parametrize(("read", "body"), READERS, ids=["chat", "text"])
CHAT_FIELDS, TEXT_FIELDS = (
    [*ChatBody.model_fields, *ChatBody.neutral],
    [*CompletionBody.model_fields, *CompletionBody.neutral],
)


NOT_IN_MESSAGES = ["reasoning", *Message.neutral, "audio"]


def refusal(read, body):
    with pytest.raises(ApiError) as raised:
        read(body)
    assert raised.value.status == 400
    return raised.value


# -------------------------------------------------------------------------------------------------------- what is read


@both
def test_fields_that_are_left_out_or_null_have_openais_defaults(read, body):
    asked = read(body)
    nulls = dict.fromkeys(["temperature", "stop", "n", "seed", "logit_bias", "stream"])
    assert asked.model_dump() == read(body | nulls).model_dump()
    assert asked.model == "A" and asked.n == 1 and asked.seed is None and not asked.stream
    assert asked.temperature == 1 and asked.top_p == 1 and asked.top_k == 0
    assert asked.new_tokens == (None if read is read_chat else 16) and asked.alternatives is None


@both
def test_sampling_stops_and_streams_are_read(read, body):
    given = {"temperature": 0, "top_p": 0.5, "top_k": -1, "stop": "x", "stop_token_ids": [3], "ignore_eos": True}
    asked = read(body | given | {"n": 2, "seed": -1, "max_tokens": 3, "timeout": 2.5})
    assert {name: getattr(asked, name) for name in given} == given | {"stop": ["x"]}
    assert (asked.n, asked.seed, asked.new_tokens, asked.timeout) == (2, -1, 3, 2.5)
    asked = read(body | {"stream": True, "stream_options": {"include_usage": True}})
    assert asked.stream and asked.stream_options.include_usage and not asked.stream_options.continuous_usage_stats
    for wrong in ({"include_usage": 1}, {"include_usag": True}, {"include_obfuscation": True}):
        (name,) = wrong
        assert refusal(read, body | {"stream": True, "stream_options": wrong}).param == f"stream_options.{name}"


def test_variables_of_the_template_are_a_chats():
    given = {"enable_thinking": False, "level": 3}
    assert read_chat(CHAT | {"chat_template_kwargs": given}).variables == given
    assert read_chat(CHAT | {"chat_template_kwargs": None}).variables == read_chat(CHAT).variables == {}
    for wrong in ([], [1], 0, {"messages": []}, {"a": [1]}, {"chat_template": "x"}):
        assert refusal(read_chat, CHAT | {"chat_template_kwargs": wrong}).param == "chat_template_kwargs"
    assert refusal(read_completion, TEXT | {"chat_template_kwargs": given}).param == "chat_template_kwargs"


def test_no_reasoning_effort_turns_thinking_off():
    effort = CHAT | {"reasoning_effort": "none"}
    assert read_chat(effort).variables == {"enable_thinking": False}
    assert read_chat(effort | {"chat_template_kwargs": {"enable_thinking": True}}).variables["enable_thinking"] is True
    assert read_chat(CHAT | {"reasoning_effort": None}).variables == {}
    for wrong in ("low", 0, {}):
        assert refusal(read_chat, CHAT | {"reasoning_effort": wrong}).param == "reasoning_effort"


def test_a_prompt_is_a_text_or_ids_or_a_list_of_either():
    for prompt, prompts in [
        ("a b", ["a b"]),
        (["a", "b"], ["a", "b"]),
        ([3, 4], [(3, 4)]),
        ([[3, 4], [5]], [(3, 4), (5,)]),
    ]:
        assert read_completion({"model": "A", "prompt": prompt}).prompts == prompts


def test_a_chat_has_texts_or_parts_that_are_texts():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "annotations": None}]
    answered = {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None, "annotations": []}
    chat = [{"role": "system", "content": parts}, {"role": "user", "content": "b", "name": "Ann"}, answered]
    assert read_chat({"model": "A", "messages": chat}).prompts == [[
        {"role": "system", "content": "a\nb"},
        {"role": "user", "content": "b", "name": "Ann"},
        {"role": "assistant", "content": "c"},
    ]]  # fmt: skip


# ----------------------------------------------------------------------------------------------------- what is refused


@both
def test_fields_that_are_not_computed_are_refused_unless_they_ask_for_nothing(read, body):
    table = (ChatBody if read is read_chat else CompletionBody).neutral
    assert len(table) > 12
    for name, allowed in table.items():
        if name != "stop":
            found = refusal(read, body | {name: "something"})
            assert found.param == name and name in found.message
        for value in allowed:
            read(body | {name: value})


def test_what_asks_for_nothing_is_taken():
    for reader, body in READERS:
        for inert in ({"user": ""}, {"stop": ""}, {"stop": []}, {"prompt_cache_key": "a"}, {"frequency_penalty": 0}):
            assert reader(body | inert).prompts == reader(body).prompts, inert
    for inert in (
        {"tools": [], "tool_choice": "auto"},
        {"tool_choice": "auto"},
        {"functions": [], "function_call": "auto"},
        {"verbosity": "medium"},
        {"prompt_cache_retention": "24h", "prompt_cache_options": {"mode": "explicit", "ttl": "30m"}},
    ):
        read_chat(CHAT | inert)


@both
def test_an_unknown_field_is_refused_with_the_nearest_name(read, body):
    found = refusal(read, body | {"temprature": 1})
    assert found.param == "temprature" and "temperature" in found.message
    assert refusal(read, body | {"{a}\n": 1}).param == "{a}\\n"


# ------------------------------------------------------------------------------------------------- counts and scores


@both
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", ""),
        ("max_tokens", -1),
        ("temperature", True),
        ("top_p", 0),
        ("top_k", -2),
        ("n", 129),
        ("seed", 2**63),
        ("stop", ["a"] * 17),
        ("stop_token_ids", [1] * 1001),
        ("ignore_eos", "true"),
        ("timeout", 0),
        ("user", "x" * 1001),
    ],
)
def test_wrong_values_are_refused_by_name(read, body, name, value):
    assert refusal(read, body | {name: value}).param == name


@pytest.mark.parametrize("prompt", [None, 3, [], [[3], []], ["a", 3], [True], [-1], ["a"] * 200])
def test_other_prompts_are_refused(prompt):
    assert refusal(read_completion, {"model": "A", "prompt": prompt}).param == "prompt"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        (["Hi"], "messages[0]"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "critic", "content": "a"}], "messages[0].role"),
        ([CHAT["messages"][0], {"role": "user", "content": 3}], "messages[1].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}], "messages[0].content"),
        ([{"role": "user", "content": "a", "mood": "good"}], "messages[0].mood"),
        ([{"role": "assistant", "content": "a", "tool_calls": [{}]}], "messages[0].tool_calls[0].id"),
    ],
)
def test_a_wrong_message_is_refused_by_its_place(messages, param):
    assert refusal(read_chat, CHAT | {"messages": messages}).param == param


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff", b'{"a": NaN}', b'{"a": "\\ud800"}', b"[" * 100_000, b'{"a": 1} {}']
)
def test_anything_but_one_object_of_json_is_refused(body):
    with pytest.raises(ApiError, match="the body"):
        read(ChatBody, body)


# ------------------------------------------------------------------------------------------------- counts and scores


def test_a_chat_has_one_name_for_its_tokens():
    assert read_chat(CHAT | {"max_completion_tokens": 3, "max_tokens": 3}).new_tokens == 3
    assert read_chat(CHAT | {"max_completion_tokens": 3}).new_tokens == 3
    assert refusal(read_chat, CHAT | {"max_tokens": 0}).param == "max_tokens"


def test_log_probabilities_are_asked_for_in_each_endpoints_way():
    assert read_chat(CHAT | {"logprobs": True}).alternatives == 0
    assert read_chat(CHAT | {"logprobs": True, "top_logprobs": 5}).alternatives == 5
    assert read_chat(CHAT | {"top_logprobs": 0}).alternatives is None
    assert refusal(read_chat, CHAT | {"logprobs": 1}).param == "logprobs"
    assert read_completion(TEXT | {"logprobs": 5}).alternatives == 5
    assert refusal(read_completion, TEXT | {"logprobs": True}).param == "logprobs"


def test_fields_that_exclude_each_other_are_refused_by_name():
    alone, scored = {"echo": True, "max_tokens": 0}, {"prompt": [[3, 4], [5, 6]], "echo": True, "logprobs": 1}
    assert read_completion(TEXT | alone).only_echoes
    assert list(read_completion(TEXT | scored | {"context_length": 1}).context_lengths) == [1, 1]
    assert list(read_completion(TEXT | scored | {"context_length": [1, 2]}).context_lengths) == [1, 2]
    for fields, param in [
        ({"max_tokens": 0}, "max_tokens"),
        (scored | {"context_length": [1, 2, 3]}, "context_length"),
        (scored | {"context_length": 0}, "context_length[0]"),
        ({"best_of": 3, "n": 2}, "best_of"),
        ({"prompt": ["a"] * 65, "n": 2}, "prompt"),
    ]:
        assert refusal(read_completion, TEXT | fields).param == param


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@both
@settings(max_examples=50)
@given(data=st.data())
def test_whatever_a_body_holds_is_read_or_refused(read, body, data):
    names = st.sampled_from(CHAT_FIELDS if read is read_chat else TEXT_FIELDS)
    message = st.dictionaries(st.sampled_from(["role", "content", "name", *NOT_IN_MESSAGES]), JSON, max_size=3)
    try:
        read(body | data.draw(st.dictionaries(names, JSON | st.lists(message, max_size=2), max_size=4)))
    except ApiError as error:
        assert error.status == 400 and error.param and error.body
