"""Every field of a request body is computed, or refused by name."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from para_jax.server.chat_messages import Message
from para_jax.server.errors import ApiError
from para_jax.server.fields import refuse_others
from para_jax.server.protocol import ChatBody, CompletionBody, read_chat, read_completion

CHAT = {"model": "A", "messages": [{"role": "user", "content": "Hi"}]}
TEXT = {"model": "A", "prompt": "Hi"}
READERS = [(read_chat, CHAT), (read_completion, TEXT)]
both = pytest.mark.parametrize(("read", "body"), READERS, ids=["chat", "text"])
CHAT_FIELDS, TEXT_FIELDS = list(ChatBody.model_fields), list(CompletionBody.model_fields)
LABELS = ("user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")


def inert(model):
    """The fields that are not computed, with the values that ask for nothing."""
    checks = {name: getattr((*field.metadata, None)[0], "func", None) for name, field in model.model_fields.items()}
    return {name: check.args[0] for name, check in checks.items() if getattr(check, "func", None) is refuse_others}


NOT_IN_MESSAGES = [name for name in Message.model_fields if name not in ("role", "content", "name")]


def refusal(read, body):
    with pytest.raises(ApiError) as raised:
        read(body)
    assert raised.value.status == 400
    return raised.value


# -------------------------------------------------------------------------------------------------------- what is read


@both
def test_fields_that_are_left_out_or_null_have_openais_defaults(read, body):
    asked = read(body)
    assert asked == read(body | dict.fromkeys(["temperature", "stop", "n", "seed", "tools", "stream"]) | body)
    assert asked.model == "A" and asked.n == 1 and asked.seed is None and not asked.stream
    assert asked.sampling["temperature"] == 1 and asked.sampling["top_p"] == 1 and asked.sampling["top_k"] == 0
    assert asked.max_tokens == (None if read is read_chat else 16) and asked.logprobs is None


@both
def test_sampling_stops_and_streams_are_read(read, body):
    given = {"temperature": 0, "top_p": 0.5, "top_k": -1, "stop": "x", "stop_token_ids": [3], "ignore_eos": True}
    asked = read(body | given | {"n": 2, "seed": -1, "max_tokens": 3, "timeout": 2.5})
    assert asked.sampling == given | {"top_k": 0, "stop": ("x",), "stop_token_ids": (3,)}
    assert (asked.n, asked.seed, asked.max_tokens, asked.timeout) == (2, -1, 3, 2.5)
    asked = read(body | {"stream": True, "stream_options": {"include_usage": True}})
    assert asked.stream and asked.include_usage


def test_variables_of_the_template_are_a_chats():
    given = {"enable_thinking": False, "level": 3}
    assert read_chat(CHAT | {"chat_template_kwargs": given}).variables == given
    assert read_chat(CHAT | {"chat_template_kwargs": None}).variables == read_chat(CHAT).variables == {}
    for wrong in ([1], 3, {"messages": []}, {"a": [1]}, {"chat_template": "x"}):
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


@pytest.mark.parametrize(
    "prompt",
    [None, "missing", 3, [], [[]], [[3], []], ["a", 3], [["a"]], [True], [-1], [2**40], [1.5], {}, ["a"] * 200],
)
def test_other_prompts_are_refused(prompt):
    body = {"model": "A"} if prompt == "missing" else {"model": "A", "prompt": prompt}
    assert refusal(read_completion, body).param == "prompt"


def test_a_wrong_value_is_shown_also_where_it_is_false_and_a_missing_one_is_called_so():
    for value, shown in [(False, "False"), (0, "0"), ({}, "{}"), (None, "missing"), ([], "missing")]:
        assert f"prompt is {shown}" in str(refusal(read_completion, {"model": "A", "prompt": value}))
        assert f"messages is {shown}" in str(refusal(read_chat, {"model": "A", "messages": value}))
    parts = [{"role": "user", "content": ["Hi"]}]
    assert "content[0] is 'Hi'" in str(refusal(read_chat, CHAT | {"messages": parts}))
    parts = [{"role": "user", "content": [{"type": "text", "text": 5}]}]
    assert "content[0] is {'type': 'text', 'text': 5}" in str(refusal(read_chat, CHAT | {"messages": parts}))


def test_a_chat_has_texts_or_parts_that_are_texts():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "annotations": None}]
    answered = {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None, "annotations": []}
    chat = [{"role": "system", "content": parts}, {"role": "user", "content": "b", "name": "Ann"}, answered]
    assert read_chat({"model": "A", "messages": chat}).prompts == [[
        {"role": "system", "content": "a\nb"},
        {"role": "user", "content": "b", "name": "Ann"},
        {"role": "assistant", "content": "c"},
    ]]  # fmt: skip


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ("Hi", "messages"),
        (["Hi"], "messages[0]"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "tool", "content": "a"}], "messages[0].role"),
        ([{"role": ["user"], "content": "a"}], "messages[0].role"),
        ([{"content": "a"}], "messages[0].role"),
        ([CHAT["messages"][0], {"role": "user", "content": 3}], "messages[1].content"),
        ([{"role": "user", "content": []}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": "a", "mood": "good"}], "messages[0].mood"),
        ([{"role": "assistant", "content": "a", "tool_calls": [{}]}], "messages[0].tool_calls"),
    ],
)
def test_a_wrong_message_is_refused_by_its_place(messages, param):
    assert refusal(read_chat, CHAT | {"messages": messages}).param == param


def test_a_field_of_a_part_is_refused_by_name():
    part = {"type": "text", "text": "a", "annotations": [3]}
    assert "annotations" in refusal(read_chat, CHAT | {"messages": [{"role": "user", "content": [part]}]}).message


def test_what_models_do_not_read_of_a_history_is_left_out():
    part = {"type": "text", "text": "a"}
    hints = {"cache_control": {"type": "ephemeral"}, "prompt_cache_breakpoint": {"mode": "explicit"}}
    answer = {"role": "assistant", "content": "b"}
    thoughts = {"reasoning_content": "so it is b", "reasoning": "hm"}

    def chat(part, answer):
        return read_chat({"model": "A", "messages": [{"role": "user", "content": [part]}, answer]})

    assert chat(part | hints, answer | thoughts) == chat(part, answer)
    for name in thoughts:
        found = refusal(read_chat, CHAT | {"messages": [CHAT["messages"][0] | {name: "hm"}]})
        assert found.param == f"messages[0].{name}"


def test_what_messages_may_not_say_is_refused_by_name():
    for name in NOT_IN_MESSAGES:
        found = refusal(read_chat, CHAT | {"messages": [CHAT["messages"][0] | {name: "something"}]})
        assert found.param == f"messages[0].{name}" and name in found.message


# ----------------------------------------------------------------------------------------------------- what is refused


@both
def test_fields_that_are_not_computed_are_refused_unless_they_ask_for_nothing(read, body):
    table = inert(ChatBody if read is read_chat else CompletionBody)
    assert len(table) > 12
    for name, allowed in table.items():
        found = refusal(read, body | {name: "something"})
        assert found.param == name and name in found.message
        for value in allowed:
            read(body | {name: value})
            if type(value) is int:
                assert refusal(read, body | {name: bool(value)}).param == name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("verbosity", "high"),
        ("functions", [{"name": "f"}]),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("logit_bias", {"50256": -100}),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -1),
        ("store", True),
        ("modalities", ["text", "audio"]),
        ("service_tier", "flex"),
        ("repetition_penalty", 1.2),
    ],
)
def test_what_changes_an_answer_and_is_not_computed_is_refused(name, value):
    assert refusal(read_chat, CHAT | {name: value}).param == name


def test_what_asks_for_nothing_is_taken():
    for read, body in READERS:
        for inert in ({"user": ""}, {"stop": ""}, {"stop": []}, {"prompt_cache_key": "a"}, {"frequency_penalty": 0}):
            assert read(body | inert) == read(body), inert
    for inert in (
        {"tools": [], "tool_choice": "auto"},
        {"tool_choice": "auto"},
        {"functions": [], "function_call": "auto"},
        {"verbosity": "medium"},
        {"prompt_cache_retention": "24h", "prompt_cache_options": {"mode": "explicit", "ttl": "30m"}},
    ):
        assert read_chat(CHAT | inert) == read_chat(CHAT), inert
    assert refusal(read_chat, CHAT | {"prompt_cache_options": "30m"}).param == "prompt_cache_options"
    assert read_chat(CHAT | {"top_logprobs": 0}) == read_chat(CHAT | {"logprobs": False, "top_logprobs": 0})
    assert read_chat(CHAT | {"top_logprobs": 0}).logprobs is None
    assert refusal(read_chat, CHAT | {"top_logprobs": 1}).param == "top_logprobs"


def test_best_of_and_a_suffix_are_refused():
    assert read_completion(TEXT | {"best_of": 2, "n": 2}).n == 2
    assert refusal(read_completion, TEXT | {"best_of": 3, "n": 2}).param == "best_of"
    assert refusal(read_completion, TEXT | {"suffix": "x"}).param == "suffix"


@both
def test_an_unknown_field_is_refused_with_the_nearest_name(read, body):
    found = refusal(read, body | {"temprature": 1})
    assert found.param == "temprature" and "temperature" in found.message
    assert refusal(read, body | {"\ud800\n": 1}).param == "\\ud800\\n"


@both
def test_every_known_field_is_taken(read, body):
    """A field that the tables name but no one reads would be refused as unknown."""
    for name in CHAT_FIELDS if read is read_chat else TEXT_FIELDS:
        try:
            read({name: "something"} | body)
        except ApiError as error:
            assert "no field" not in error.message, name


@both
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("model", [None, "", 3, ["A"], "x" * 2000, "\ud800"]),
        ("max_tokens", [-1, 1.5, "3", True, 2**31]),
        ("temperature", [-0.1, "hot", True, float("inf"), float("nan"), 10**400, []]),
        ("top_p", [0, 1.1, "1"]),
        ("top_k", [-2, 1.5]),
        ("n", [0, 129, "1", 1.0]),
        ("seed", [1.5, "1", 2**63]),
        ("stop", [3, [""], ["a", 3], ["x"] * 17, "x" * 1025, {}]),
        ("stop_token_ids", [3, ["a"], [1.5], [-1], [1] * 1001]),
        ("ignore_eos", [1, "true"]),
        ("stream", [1, "yes"]),
        ("stream_options", [{"include_usage": True}, []]),
        ("timeout", [0, -1, "1"]),
        *((label, [3, [], "x" * 1001]) for label in LABELS),
    ],
)
def test_wrong_values_are_refused_by_name(read, body, name, values):
    for value in values:
        assert refusal(read, body | {name: value}).param == name


def test_stream_options_need_a_stream_and_have_two_fields():
    given = {"include_usage": True, "continuous_usage_stats": True}
    assert read_chat(CHAT | {"stream": True, "stream_options": given}).continuous_usage
    alone = read_chat(CHAT | {"stream": True, "stream_options": given | {"include_usage": False}})
    assert not alone.include_usage and not alone.continuous_usage
    for options, param in [
        ({"include_usage": 1}, "stream_options.include_usage"),
        ({"include_usag": True}, "stream_options.include_usag"),
        ({"include_obfuscation": True}, "stream_options.include_obfuscation"),
    ]:
        assert refusal(read_chat, CHAT | {"stream": True, "stream_options": options}).param == param


# ------------------------------------------------------------------------------------------------- counts and scores


def test_a_chat_has_one_name_for_its_tokens():
    assert read_chat(CHAT | {"max_completion_tokens": 3}).max_tokens_field == "max_completion_tokens"
    assert refusal(read_chat, CHAT | {"max_completion_tokens": 3, "max_tokens": 4}).param == "max_tokens"
    assert read_chat(CHAT | {"max_completion_tokens": 3, "max_tokens": 3}).max_tokens == 3
    assert refusal(read_chat, CHAT | {"max_tokens": 0}).param == "max_tokens"


def test_log_probabilities_are_asked_for_in_each_endpoints_way():
    assert read_chat(CHAT | {"logprobs": True}).logprobs == 0
    assert read_chat(CHAT | {"logprobs": True, "top_logprobs": 5}).logprobs == 5
    assert read_chat(CHAT | {"logprobs": False}).logprobs is None
    assert refusal(read_chat, CHAT | {"top_logprobs": 5}).param == "top_logprobs"
    assert refusal(read_chat, CHAT | {"logprobs": 1}).param == "logprobs"
    assert read_completion(TEXT | {"logprobs": 5}).logprobs == 5
    assert refusal(read_completion, TEXT | {"logprobs": True}).param == "logprobs"


def test_no_new_tokens_go_with_echo_only():
    assert read_completion(TEXT | {"max_tokens": 0, "echo": True}).max_tokens == 0
    assert refusal(read_completion, TEXT | {"max_tokens": 0}).param == "max_tokens"


def test_an_answer_that_is_the_prompt_alone_comes_once():
    alone = TEXT | {"echo": True, "max_tokens": 0}
    assert read_completion(alone).only_echoes
    error = refusal(read_completion, alone | {"n": 2})
    assert (error.param, error.message) == ("n", "n is 2, but with max_tokens 0 each answer is the prompt; ask for one")
    assert read_completion(TEXT | {"echo": True, "n": 2}).n == 2


def test_a_context_length_is_one_number_or_one_for_each_prompt():
    scored = {"model": "A", "prompt": [[3, 4], [5, 6]], "echo": True, "logprobs": 1}
    assert read_completion(scored | {"context_length": 1}).context_lengths == [1, 1]
    assert read_completion(scored | {"context_length": [1, 2]}).context_lengths == [1, 2]
    for wrong in ({"context_length": [1]}, {"context_length": 0}, {"context_length": [1, "2"]}):
        assert refusal(read_completion, scored | wrong).param == "context_length"
    assert refusal(read_completion, scored | {"context_length": 1, "echo": False}).param == "context_length"


def test_answers_are_bounded_over_all_prompts():
    assert read_completion({"model": "A", "prompt": ["a"] * 64, "n": 2}).n == 2
    assert refusal(read_completion, {"model": "A", "prompt": ["a"] * 65, "n": 2}).param == "prompt"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@both
@settings(max_examples=150)
@given(data=st.data())
def test_whatever_a_body_holds_is_read_or_refused(read, body, data):
    names = st.sampled_from(CHAT_FIELDS if read is read_chat else TEXT_FIELDS)
    message = st.dictionaries(st.sampled_from(["role", "content", "name", *NOT_IN_MESSAGES]), JSON, max_size=3)
    fields = st.dictionaries(names, JSON | st.lists(message, max_size=2), max_size=4)
    found = body | data.draw(fields)
    try:
        read(found)
    except ApiError as error:
        assert error.status == 400 and error.param and error.body
