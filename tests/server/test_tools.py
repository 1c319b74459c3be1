"""Functions in a chat: forced calls keep to their schema, and calls in a free answer are found, whole and streamed."""

import json
from copy import deepcopy

import httpx
import jsonschema
import openai
import pytest
from characters import character_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from running_server import model_and_tenants, running
from tiny_engine import bank_of

from para_jax import Engine
from para_jax.server.protocol import ChatBody, validated
from para_jax.server.tools import calls_of, certain

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }}: {{ tool.function.parameters | tojson }}\n{% endfor %}"
    "{% for message in messages %}{{ message.role[0] }}{{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments.city }}{% endfor %}"
    "{{ '</s>' if message.role == 'assistant' else '\n' }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "the weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "additionalProperties": False}}},
]
NAMED = {"type": "function", "function": {"name": "weather"}}
CHAT = {"model": "A", "messages": [{"role": "user", "content": "hi"}], "temperature": 1.0, "seed": 3}
GIVEN = CHAT | {"tools": TOOLS, "max_tokens": 90}


@pytest.fixture(scope="module")
def server():
    model, tenants = model_and_tenants()
    tokenizer = deepcopy(character_tokenizer())
    tokenizer.chat_template = TEMPLATE
    engine = Engine(model, bank_of(model, tenants), tokenizer, slots=3, max_length=400, max_logprobs=2)
    with running(engine) as made:
        yield made


@pytest.fixture
def http(server):
    with httpx.Client(base_url=server.url, timeout=60) as made:
        yield made


def joined(chunks) -> tuple[str, list[tuple[str, str]], str]:
    """What a stream said: the content, the calls and the finish reason."""
    content, calls, finish = "", [], None
    for chunk in chunks:
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        calls += [(one.function.name, one.function.arguments) for one in choice.delta.tool_calls or []]
        finish = choice.finish_reason or finish
    return content, calls, finish


@pytest.mark.parametrize("choice", [NAMED, "required"], ids=["named", "required"])
@pytest.mark.parametrize("parallel", [True, False])
def test_a_forced_call_keeps_to_its_schema(server, choice, parallel):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        given = GIVEN | {"tool_choice": choice, "parallel_tool_calls": parallel, "n": 1}
        found = client.chat.completions.create(**given)
        (whole,) = ChatCompletion.model_validate(found.model_dump()).choices
        said = joined(client.chat.completions.create(**given, stream=True))
    if whole.finish_reason == "length":  # a list that did not end
        assert choice == "required" and parallel and whole.message.content.startswith("[{")
        return
    calls = [(one.function.name, one.function.arguments) for one in whole.message.tool_calls]
    assert (whole.message.content, whole.finish_reason) == (None, "tool_calls") and said == ("", calls, "tool_calls")
    assert len(calls) == 1 or parallel
    for name, arguments in calls:
        assert name in ("weather", "now") if choice == "required" else name == "weather"
        jsonschema.validate(json.loads(arguments), CITY if name == "weather" else {"type": "object"})


def test_a_required_call_keeps_the_references_of_its_schema(http):
    day = {"$defs": {"Day": {"enum": ["mon", "tue"]}}, "properties": {"day": {"$ref": "#/$defs/Day"}},
           "required": ["day"], "additionalProperties": False}  # fmt: skip
    tools = [{"type": "function", "function": {"name": name, "parameters": day}} for name in ("none", "open")]
    for choice in ("required", {"type": "function", "function": {"name": "none"}}):
        asked = GIVEN | {"tools": tools, "tool_choice": choice, "parallel_tool_calls": False}
        (answer,) = http.post("/v1/chat/completions", json=asked).json()["choices"]
        (made,) = answer["message"]["tool_calls"]
        assert json.loads(made["function"]["arguments"])["day"] in ("mon", "tue")


CALL = '{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}'
ANSWERS = {
    "plain": ("no call < here", "no call < here", []),
    "hermes": (f"well\n<tool_call>\n{CALL}\n</tool_call>", "well\n", ["weather"]),
    "two": (f"<tool_call>{CALL}</tool_call>\n<tool_call>{{\"name\": \"now\"}}</tool_call>", "", ["weather", "now"]),
    "llama": (CALL.replace("arguments", "parameters"), "", ["weather"]),
    "mistral": (f"[{CALL}, {CALL}]", "", ["weather", "weather"]),
    "unknown": ('<tool_call>{"name": "rm"}</tool_call>', '<tool_call>{"name": "rm"}</tool_call>', []),
    "json": ('{"team": "returns"}', '{"team": "returns"}', []),
    "cut": (f"<tool_call>{CALL[:20]}", f"<tool_call>{CALL[:20]}", []),
    "a field name": ('{"name": {"first": "Al"}}', '{"name": {"first": "Al"}}', []),
    "no object": ('{"name": "now", "arguments": 5}', '{"name": "now", "arguments": 5}', []),
    "no JSON": ('{"name": "now", "arguments": {"a": NaN}}', '{"name": "now", "arguments": {"a": NaN}}', []),
    "empty list": ("[]", "[]", []),
    "later JSON": ("Sure: " + CALL, "Sure: " + CALL, []),
    "text after": (f"x <tool_call>{CALL}</tool_call> tail\n", "x tail", ["weather"]),
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
@given(cuts=st.lists(st.integers(0, 150)))
def test_calls_of_a_free_answer_are_the_same_whole_and_in_pieces(name, cuts):
    text, content, names = ANSWERS[name]
    body = validated(ChatBody, GIVEN)
    rest, calls = calls_of(text, body)
    assert (rest, [one["function"]["name"] for one in calls]) == (content, names)
    assert all(json.loads(one["function"]["arguments"]) in ({"city": "Oslo", "days": 2}, {}) for one in calls)
    given, held, last = "", "", 0
    assert calls or rest == text
    for cut in sorted(cuts):
        held, last = held + text[last:cut], max(last, cut)
        at = certain(held, body, bool(given))
        given, held = given + held[:at], held[at:]
    rest, found = calls_of(held + text[last:], body, bool(given))
    assert given + rest == content and [one["function"] for one in found] == [one["function"] for one in calls]


def test_a_free_answer_with_a_call_streams_what_is_certain(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        form = {"extra_body": {"structured_outputs": {"choice": [ANSWERS["hermes"][0]]}}}
        given = GIVEN | form | {"max_tokens": 120}
        whole = client.chat.completions.create(**given).choices[0]
        chunks = list(client.chat.completions.create(**given, stream=True))
        none = client.chat.completions.create(**given, tool_choice="none").choices[0]
    assert whole.message.content == "well\n" and whole.finish_reason == "tool_calls"
    content, calls, finish = joined(chunks)
    assert (content, finish, len(chunks) > 4) == ("well\n", "tool_calls", True)
    assert calls == [(one.function.name, one.function.arguments) for one in whole.message.tool_calls]
    assert none.message.content == ANSWERS["hermes"][0] and none.message.tool_calls is None
    assert all(ChatCompletionChunk.model_validate(chunk.model_dump()) for chunk in chunks)


def test_the_prompt_has_tools_calls_and_their_results(http):
    history = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]},
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]  # fmt: skip
    said = GIVEN | {"messages": history, "max_tokens": 1, "tools": TOOLS[1:]}
    found = http.post("/v1/chat/completions", json=said)
    assert found.status_code == 200, found.text
    rendered = 'now: {"type": "object", "additionalProperties": false}\nuhi\naweatherOslo</s>train\na'
    assert found.json()["usage"]["prompt_tokens"] == len(rendered) - 3  # </s> is one token


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"tool_choice": "must"}, "tool_choice", "must"),
        ({"tool_choice": {"type": "function", "function": {"name": "rm"}}}, "tool_choice", "rm"),
        ({"tool_choice": {"type": "function", "function": {"name": "auto"}}}, "tool_choice", "auto"),
        ({"tool_choice": "required", "tools": []}, "tool_choice", "required"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice", "required"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "web_search"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "a b"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "no"}}}],
          "tool_choice": "required"}, "tools", "no"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "content"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls[0].function", ""),
    ],
)  # fmt: skip
def test_wrong_tools_are_refused_by_name(http, fields, param, said):
    answer = http.post("/v1/chat/completions", json=GIVEN | fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param) and said in error["message"]


def test_a_chat_template_without_tools_takes_none(server, http, monkeypatch):
    monkeypatch.setattr(server.engine.tokenizer, "chat_template", TEMPLATE.replace("tools", "t"))
    answer = http.post("/v1/chat/completions", json=GIVEN)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "tools"
