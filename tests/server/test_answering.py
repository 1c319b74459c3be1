"""What clients get over HTTP is what the engine gives alone, whole or in pieces, and every client's end frees its
slots."""

import gc
import json
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import httpx
import jax
import numpy as np
import openai
import pytest
from golden_models import backbone
from lm_eval.models.openai_completions import LocalCompletionsAPI
from logprob_engine import expected
from long_cases import long
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from running_server import (
    LENGTH,
    QUEUE,
    QUEUE_PER_TENANT,
    chat_tokenizer,
    eventually,
    model_and_tenants,
    new_engine,
    running,
)
from tiny_engine import CONFIGS, answers, prompt

from para_jax import Engine, Request
from para_jax.server import answering, engine_requests, gate, responses
from para_jax.server.models import Models
from para_jax.server.traffic import Outcome

MODELS, JSON = [*CONFIGS, "base"], {"content-type": "application/json"}
#: An answer that lasts for several rounds.
LONG = {"prompt": prompt(1), "max_tokens": 30, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def server():
    with running(new_engine()) as made:
        yield made


@pytest.fixture(scope="module")
def alone():
    return new_engine()


@pytest.fixture
def client(server):
    server.idle()
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def http(server):
    server.idle()
    with httpx.Client(base_url=server.url, timeout=60) as made:
        yield made


def of_engine(engine, text, model, **options):
    """The engine's own samples: (text, finish_reason) of each."""
    engine.submit(Request(text, None if model == "base" else model, strip=False, **options))
    return [(found.text, found.finish_reason) for _, found in sorted(answers(engine).items())]


def chat_of(text):
    return [{"role": "user", "content": text}]


# -------------------------------------------------------------------------------------------------------- equal answers


@pytest.mark.parametrize("length", [{}, long({"max_tokens": 9})], ids=["whatever fits", "nine tokens"])
def test_a_chats_template_variables_are_in_its_prompt(client, alone, length):
    found, new = {}, length.get("max_tokens", LENGTH - 6)
    given = {"messages": chat_of(prompt(1, 5)), "temperature": 0, **length}
    for mood in (None, "w7", "w9"):
        for model in MODELS[:2]:
            variables = {"chat_template_kwargs": {"mood": mood, "unread": 3}} if mood else {}
            answer = client.chat.completions.create(model=model, **given, extra_body=variables).choices[0]
            found[model, mood] = [(answer.message.content, answer.finish_reason)]
            assert found[model, mood] == of_engine(alone, f"{prompt(1, 5)} {mood or 'w7'}", model, max_new_tokens=new)
    assert found[MODELS[0], "w9"] != found[MODELS[0], "w7"]


def test_completions_equal_the_engine_alone_whole_and_streamed(client, alone):
    texts = set()
    for i, model in enumerate(MODELS):
        given = {"model": model, "prompt": prompt(i, 5), "max_tokens": 9, "temperature": 0}
        expected = of_engine(alone, prompt(i, 5), model, max_new_tokens=9)
        found = client.completions.create(**given)
        assert [(one.text, one.finish_reason) for one in found.choices] == expected
        pieces = [chunk.choices[0] for chunk in client.completions.create(**given, stream=True)]
        assert ("".join(piece.text for piece in pieces), pieces[-1].finish_reason) == expected[0]
        assert all(piece.finish_reason is None for piece in pieces[:-1])
        texts.add(expected[0][0])
    assert len(texts) == len(MODELS)


def test_chats_equal_the_engine_alone_whole_and_streamed(client, alone):
    for i, model in enumerate(MODELS):
        messages = chat_of(prompt(i, 5))
        expected = of_engine(alone, messages, model, max_new_tokens=LENGTH - 6)
        found = client.chat.completions.create(model=model, messages=messages, temperature=0)
        assert [(one.message.content, one.finish_reason) for one in found.choices] == expected
        chunks = list(client.chat.completions.create(model=model, messages=messages, temperature=0, stream=True))
        deltas = [chunk.choices[0] for chunk in chunks]
        assert deltas[0].delta.role == "assistant" and deltas[0].delta.content == ""
        assert all(piece.delta.role is None for piece in deltas[1:])
        assert ("".join(piece.delta.content or "" for piece in deltas), deltas[-1].finish_reason) == expected[0]
        assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1


def test_fields_that_ask_for_nothing_change_no_answer(client):
    """As agents without a tool send them, and chat front ends with histories of other servers."""
    turns, answer = chat_of(prompt(1, 4)), {"role": "assistant", "content": prompt(2, 3)}
    plain = {"model": "A", "messages": [*turns, answer, *chat_of(prompt(3, 2))], "max_tokens": 5, "temperature": 0}
    part = {"type": "text", "text": prompt(1, 4), "cache_control": {"type": "ephemeral"}}
    history = [{"role": "user", "content": [part]}, answer | {"reasoning_content": "w9"}, *chat_of(prompt(3, 2))]
    inert = {"tools": [], "tool_choice": "auto", "stop": "", "verbosity": "medium", "messages": history}
    inert |= {"prompt_cache_key": "a", "prompt_cache_retention": "24h", "prompt_cache_options": {"ttl": "30m"}}
    given, more = (client.chat.completions.create(**one) for one in (plain, plain | inert))
    assert more.choices == given.choices and more.usage.prompt_tokens == given.usage.prompt_tokens


def test_samples_and_prompts_have_the_seeds_of_their_numbers(client, alone):
    given = {"model": "A", "n": 2, "seed": 5, "temperature": 1.0, "top_p": 0.9, "max_tokens": 6}
    given["extra_body"] = {"top_k": 50}
    prompts = [prompt(1), prompt(2)]
    options = {"n": 2, "temperature": 1.0, "top_p": 0.9, "top_k": 50, "max_new_tokens": 6}
    expected = of_engine(alone, prompts[0], "A", seed=5, **options) + of_engine(
        alone, prompts[1], "A", seed=7, **options
    )
    found = client.completions.create(prompt=prompts, **given)
    assert [one.index for one in found.choices] == [0, 1, 2, 3]
    assert [(one.text, one.finish_reason) for one in found.choices] == expected
    texts = ["", "", "", ""]
    for chunk in client.completions.create(prompt=prompts, stream=True, **given):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [text for text, _ in expected]
    assert len(set(texts)) == 4


def test_a_prompt_may_be_token_ids(client, server):
    ids = server.engine.tokenizer(prompt(3))["input_ids"]
    given = {"model": "R", "max_tokens": 5, "temperature": 0}
    texts = [
        [one.text for one in client.completions.create(prompt=p, **given).choices]
        for p in (prompt(3), ids, [ids, ids], [prompt(3), prompt(3)])
    ]
    assert texts[0] == texts[1] and texts[2] == texts[3] == texts[0] * 2


def test_stop_texts_and_stop_ids_end_an_answer(client):
    given = {"model": "A", "prompt": prompt(1), "temperature": 0}
    whole = client.completions.create(max_tokens=8, **given).choices[0].text
    words = [f"w{number}" for number in whole.split("w")[1:]]
    third = next(i for i, word in enumerate(words) if i >= 2 and word not in words[:i])
    ids = {"stop_token_ids": [int(words[third][1:])]}
    for options in ({"stop": words[third]}, {"extra_body": ids}, {"extra_body": ids | {"ignore_eos": True}}):
        found = client.completions.create(max_tokens=8, **given, **options).choices[0]
        assert (found.text, found.finish_reason) == ("".join(words[:third]), "stop")


def test_echo_puts_the_prompt_first(client, server):
    given = {"model": "A", "max_tokens": 4, "temperature": 0}
    client.completions.create(prompt=prompt(1), **given)  # from now on the prompt is cached, which `usage` says
    plain = client.completions.create(prompt=prompt(1), **given)
    found = client.completions.create(prompt=prompt(1), echo=True, **given)
    assert found.choices[0].text == prompt(1) + plain.choices[0].text and found.usage == plain.usage
    streamed = client.completions.create(prompt=prompt(1), echo=True, stream=True, **given)
    assert "".join(chunk.choices[0].text for chunk in streamed) == found.choices[0].text
    ids = server.engine.tokenizer(prompt(1))["input_ids"]
    text = prompt(1).replace(" ", "")  # as this tokenizer decodes it
    assert client.completions.create(prompt=ids, echo=True, **given).choices[0].text == text + plain.choices[0].text


# --------------------------------------------------------------------------------------------------- log-probabilities


def reference(server, model, ids, context):
    """log_softmax of the teacher-forced pass, [tokens, vocabulary]; row t is of token t + 1."""
    return expected(server.engine.bank, None if model == "base" else model, ids, context)


@pytest.mark.parametrize("model", MODELS)
def test_log_probabilities_of_new_tokens_are_those_of_the_teacher_forced_pass(http, server, model):
    ids = server.engine.tokenizer(prompt(2))["input_ids"]
    options = {"model": model, "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    chat = options | {"messages": chat_of(prompt(2)), "logprobs": True, "top_logprobs": 2}
    text = options | {"prompt": prompt(2) + " w7", "logprobs": 2}  # the chat's tokens
    choice = http.post("/v1/completions", json=text).json()["choices"][0]
    content = http.post("/v1/chat/completions", json=chat).json()["choices"][0]["logprobs"]["content"]
    found, words = choice["logprobs"], choice["text"].split("w")[1:]
    new = [int(word) for word in words]
    assert found["tokens"] == [f"w{id}" for id in new] == [one["token"] for one in content]
    rows = reference(server, model, [*ids, 7, *new], len(ids) + 1)[len(ids) :]
    for i, (id, row) in enumerate(zip(new, rows, strict=False)):
        np.testing.assert_allclose(found["token_logprobs"][i], row[id], atol=1e-4)
        top = {f"w{one}": row[one] for one in np.argsort(row)[-2:]}
        assert set(found["top_logprobs"][i]) == set(top)
        assert found["token_logprobs"][i] == max(found["top_logprobs"][i].values())
        assert content[i]["logprob"] == found["token_logprobs"][i]
        assert {one["token"]: one["logprob"] for one in content[i]["top_logprobs"]} == found["top_logprobs"][i]
        assert bytes(content[i]["bytes"]).decode() == f"w{id}"
        assert choice["text"][found["text_offset"][i] :].startswith(f"w{id}")


@pytest.mark.parametrize("echo", [True, False])
def test_streamed_log_probabilities_are_those_of_the_whole_answer(http, echo):
    body = {"model": "C", "prompt": prompt(2), "max_tokens": 9, "logprobs": 1, "temperature": 1, "seed": 3}
    body |= {"echo": echo} | ({"context_length": 6, "max_tokens": 1} if echo else {"n": 2})
    whole = http.post("/v1/completions", json=body).json()["choices"]
    joined = [{name: [] for name in whole[0]["logprobs"]} for _ in whole]
    for event in events(http, "/v1/completions", body):
        (choice,) = event["choices"]
        for name, values in choice["logprobs"].items():
            joined[choice["index"]][name] += values
    assert joined == [choice["logprobs"] for choice in whole]
    chat = {"model": "A", "messages": chat_of(prompt(2)), "max_tokens": 9, "logprobs": True, "top_logprobs": 1}
    content = http.post("/v1/chat/completions", json=chat | {"seed": 4}).json()["choices"][0]["logprobs"]["content"]
    pieces = [event["choices"][0]["logprobs"] for event in events(http, "/v1/chat/completions", chat | {"seed": 4})]
    assert [token for piece in pieces if piece for token in piece["content"]] == content
    (empty,) = http.post("/v1/chat/completions", json=chat | {"stop_token_ids": [*range(1000)]}).json()["choices"]
    assert (empty["message"]["content"], empty["logprobs"]) == ("", {"content": []})


@pytest.mark.parametrize("model", MODELS)
def test_echo_scores_a_prompt_as_lm_eval_reads_it(http, server, model):
    """lm-eval's local-completions asks for one new token and leaves the last one out."""
    ids = [list(range(30 + 10 * i, 38 + 12 * i)) for i in range(2)]
    body = {"model": model, "prompt": ids, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1, "echo": True}
    context = [3, 5]
    if model != "base":
        body |= {"context_length": context}
    outputs = http.post("/v1/completions", json=body).json()
    for (score, greedy), of_one, length in zip(
        LocalCompletionsAPI.parse_logprobs(outputs, ctxlens=context), ids, context, strict=True
    ):
        rows = reference(server, model, of_one, length)[length - 1 : -1]
        np.testing.assert_allclose(
            score, sum(row[id] for row, id in zip(rows, of_one[length:], strict=True)), atol=1e-3
        )
        assert greedy == all(row.argmax() == id for row, id in zip(rows, of_one[length:], strict=True))
    for choice, of_one in zip(outputs["choices"], ids, strict=True):
        assert len(choice["logprobs"]["tokens"]) == len(of_one) + 1
        assert choice["logprobs"]["token_logprobs"][0] is choice["logprobs"]["top_logprobs"][0] is None
    alone = http.post("/v1/completions", json=body | {"max_tokens": 0}).json()
    for choice, scored in zip(alone["choices"], outputs["choices"], strict=True):
        assert choice["logprobs"]["token_logprobs"] == scored["logprobs"]["token_logprobs"][:-1]
    assert alone["usage"]["completion_tokens"] == 0


def test_a_tenant_whose_score_depends_on_the_prompts_end_needs_the_context_length(http):
    body = {"model": "A", "prompt": [30, 31, 32], "max_tokens": 0, "logprobs": 1, "echo": True}
    assert error(http.post("/v1/completions", json=body), 400)["param"] == "context_length"
    too_many = {"model": "A", "prompt": "w30", "logprobs": 4}
    assert error(http.post("/v1/completions", json=too_many), 400)["param"] == "logprobs"
    two = body | {"model": "base", "n": 2}
    assert error(http.post("/v1/completions", json=two), 400)["param"] == "logprobs"


def test_other_clients_are_served_while_scores_are_written(server, http, monkeypatch):
    written, real = threading.Event(), responses.text_logprobs

    def slow(choice, part):
        assert written.wait(30)
        return real(choice, part)

    monkeypatch.setattr(responses, "text_logprobs", slow)
    for stream in (False, True):
        written.clear()
        (future,) = post_all(server, [LONG | {"model": "base", "echo": True, "logprobs": 1, "stream": stream}])
        server.idle()
        assert http.get("/health", timeout=5).status_code == 200
        written.set()
        assert future.result().status_code == 200


@pytest.mark.long
@pytest.mark.parametrize("echo", [True, False])
def test_log_probabilities_that_are_no_numbers_are_an_error(echo):
    model = jax.tree.map(lambda leaf: leaf * np.nan, backbone("llama"))
    with running(Engine(model, None, chat_tokenizer(), slots=1, max_length=16, max_logprobs=1)) as server:
        with httpx.Client(base_url=server.url, timeout=60) as http:
            body = {"model": "base", "prompt": "w5 w6", "max_tokens": 1, "logprobs": 1, "echo": echo}
            assert error(http.post("/v1/completions", json=body), 500)["code"] == "engine_error"
            assert events(http, "/v1/completions", body)[-1]["error"]["code"] == "engine_error"


@pytest.mark.parametrize("model", MODELS)
def test_the_prompt_alone_is_echoed_without_scores_too(http, server, model):
    """Whatever the adapter, and with a prompt that leaves no room for another token."""
    text = prompt(1, LENGTH)
    ids = server.engine.tokenizer(text)["input_ids"]
    for given in (text, ids):
        body = {"model": model, "prompt": given, "max_tokens": 0, "echo": True}
        found = http.post("/v1/completions", json=body).json()
        (choice,) = found["choices"]
        assert choice["text"].replace(" ", "") == text.replace(" ", "") and choice["logprobs"] is None
        assert (found["usage"]["prompt_tokens"], found["usage"]["completion_tokens"]) == (LENGTH, 0)
        streamed = events(http, "/v1/completions", body)
        assert "".join(event["choices"][0]["text"] for event in streamed) == choice["text"]


def test_an_end_token_is_the_one_new_token_of_a_scored_prompt():
    """Or lm-eval would leave out the last token of the prompt."""
    with running(new_engine(stop_ids=range(256))) as server:
        body = {"model": "base", "prompt": [30, 31, 32], "max_tokens": 1, "logprobs": 1, "echo": True}
        (choice,) = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["choices"]
        assert len(choice["logprobs"]["token_logprobs"]) == 4 and choice["finish_reason"] == "stop"
        body |= {"echo": False, "max_tokens": 5}
        (choice,) = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["choices"]
        assert choice["logprobs"]["token_logprobs"] == [] and choice["text"] == ""


# --------------------------------------------------------------------------------------------------------------- shapes


def events(http, path, body):
    """The data of each event of a stream."""
    response = http.post(path, json=body | {"stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def test_every_answer_has_openais_types(http):
    """The client builds its records without checks. Here they are checked, and no field is unknown but our own."""
    text = {"model": "A", "prompt": prompt(1), "max_tokens": 5}
    chat = {"model": "A", "messages": chat_of(prompt(1)), "max_completion_tokens": 5, "n": 2}
    usage = {"stream_options": {"include_usage": True}}
    found = [
        Completion.model_validate(http.post("/v1/completions", json=text).json(), strict=True),
        ChatCompletion.model_validate(http.post("/v1/chat/completions", json=chat).json(), strict=True),
        *(
            ChatCompletionChunk.model_validate(one, strict=True)
            for one in events(http, "/v1/chat/completions", chat | usage)
        ),
    ]
    assert not any(one.model_extra for one in found)
    assert found[0].id.startswith("cmpl-") and found[1].id.startswith("chatcmpl-")


def test_usage_counts_tokens_and_those_from_the_prefix_cache(http):
    body = {"model": "R", "prompt": prompt(77, 14), "max_tokens": 5, "ignore_eos": True, "n": 2}
    first = http.post("/v1/completions", json=body).json()["usage"]
    assert first == {
        "prompt_tokens": 14, "completion_tokens": 10, "total_tokens": 24, "prompt_tokens_details": {"cached_tokens": 0}
    }  # fmt: skip
    *chunks, last = events(http, "/v1/completions", body | {"stream_options": {"include_usage": True}})
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in chunks)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 10
    assert last["usage"]["prompt_tokens_details"]["cached_tokens"] >= 8
    assert all("usage" not in chunk for chunk in events(http, "/v1/completions", body))
    given = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    counts = [chunk["usage"]["completion_tokens"] for chunk in events(http, "/v1/completions", body | given)]
    assert counts == sorted(counts) and 0 < counts[0] < counts[-1] == 10


def test_usage_of_an_event_is_of_what_the_client_has_even_if_the_engine_is_ahead(http, monkeypatch):
    def late(*given, start=answering.start):
        time.sleep(0.5)  # in asyncio's thread, while the engine writes all tokens
        return start(*given)

    monkeypatch.setattr(answering, "start", late)
    given = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}, "n": 2}
    body = {"model": "A", "prompt": prompt(1), "max_tokens": 5, "ignore_eos": True} | given
    assert [chunk["usage"]["completion_tokens"] for chunk in events(http, "/v1/completions", body)] == [5, 10, 10]


def test_a_prompt_shares_its_beginning_only_with_prompts_of_the_same_salt(http):
    def cached(salt):
        body = {"model": "base", "prompt": prompt(9), "max_tokens": 1, "cache_salt": salt}
        return http.post("/v1/completions", json=body).json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached("one") == 0 and cached("one") > 0 and cached("two") == 0


def test_a_request_has_an_id(http):
    body = {"model": "A", "prompt": prompt(1), "max_tokens": 1}
    response = http.post("/v1/completions", json=body, headers={"x-request-id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1" and response.json()["id"] == "cmpl-mine-1"
    made = http.post("/v1/completions", json=body, headers={"x-request-id": "a b"}).headers["x-request-id"]
    assert len(made) == 32 and made != http.get("/health").headers["x-request-id"]


# --------------------------------------------------------------------------------------------------------------- errors


def error(response, status):
    assert response.status_code == status and response.headers["content-type"] == "application/json"
    found = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found


def test_wrong_requests_are_refused_by_field(server, http, monkeypatch):
    text = {"model": "A", "prompt": prompt(1)}
    for body, param, code in [
        (text | {"model": "Z"}, "model", "model_not_found"),
        (text | {"prompt": prompt(1, LENGTH)}, "prompt", "context_length_exceeded"),
        (text | {"max_tokens": LENGTH}, "prompt", "context_length_exceeded"),
        (text | {"prompt": [10**6]}, "prompt", None),
        (text | {"prompt": ""}, "prompt", None),
        (text | {"prompt": "\ud800"}, None, "invalid_json"),
        (text | {"n": QUEUE_PER_TENANT + 1}, "n", None),
        (text | {"prompt": [prompt(1)] * (QUEUE + 1)}, "n", None),
        (text | {"temperatur": 1}, "temperatur", None),
    ]:
        response = http.post("/v1/completions", content=json.dumps(body), headers=JSON)
        found = error(response, 404 if param == "model" else 400)
        assert (found["param"], found["code"]) == (param, code), found
        assert "max_new_tokens" not in found["message"]
    for options in ({}, {"max_tokens": 2}):
        with monkeypatch.context() as patch:
            patch.setattr(server.engine.tokenizer, "chat_template", "{{ raise_exception('no') }}")
            chat = {"model": "A", "messages": chat_of(prompt(1))} | options
            assert error(http.post("/v1/chat/completions", json=chat), 400)["param"] == "messages"
            chat |= {"chat_template_kwargs": {"mood": 5}}
            assert (
                "chat_template_kwargs is {'mood': 5}"
                in error(http.post("/v1/chat/completions", json=chat), 400)["message"]
            )
    long = {"model": "A", "messages": chat_of(prompt(1, LENGTH)), "max_completion_tokens": 3}
    found = error(http.post("/v1/chat/completions", json=long), 400)
    assert found["param"] == "messages" and "max_completion_tokens" in found["message"]
    found = error(http.post("/v1/chat/completions", json=long | {"chat_template_kwargs": {"mood": "w9"}}), 400)
    assert "chat_template_kwargs" not in found["message"]  # the template is content with it
    many = {"model": "A", "messages": chat_of(prompt(1)), "logprobs": True, "top_logprobs": 9}
    found = error(http.post("/v1/chat/completions", json=many), 400)
    assert found["param"] == "top_logprobs" and found["message"].startswith(
        "top_logprobs is 9; give at most the engine's"
    )


def test_wrong_bodies_methods_and_paths_are_errors_of_one_shape(http):
    assert error(http.post("/v1/completions", content=b"{", headers=JSON), 400)["code"] == "invalid_json"
    error(http.post("/v1/completions", content=b"{}"), 415)
    error(http.post("/v1/completions", content=b" " * (8 * 2**20 + 1), headers=JSON), 413)
    assert "GET /v1/completions" in error(http.get("/v1/completions"), 405)["message"]
    assert "/v1/nothing" in error(http.get("/v1/nothing"), 404)["message"]
    for path, wrong in (("completions", "messages"), ("chat/completions", "prompt")):
        assert error(http.post(f"/v1/{path}", json={"model": "A", wrong: "a"}), 400)["param"] == wrong
    assert http.get("/health/").status_code == 404  # not a redirect


def test_nothing_of_the_tenants_is_told_to_a_client_without_a_key(http):
    found = error(http.post("/v1/completions", json={"model": "AA", "prompt": "w3"}), 404)
    assert found["message"] == error(http.get("/v1/models/AA"), 404)["message"]
    assert "nearest" not in found["message"]


def test_the_openai_client_raises_its_own_errors(client):
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="Z", prompt="w3")
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model="A", messages=chat_of("w3"), presence_penalty=1)
    assert raised.value.param == "presence_penalty"


def test_a_body_of_many_values_is_refused_before_it_is_parsed(http, monkeypatch):
    monkeypatch.setattr(answering, "read", None)
    body = f'{{"model": "A", "prompt": [{"[]," * 20_000}]}}'
    found = error(http.post("/v1/completions", content=body, headers=JSON), 400)
    assert found["code"] == "context_length_exceeded" and str(LENGTH) in found["message"]


def test_an_event_is_one_line_to_every_client():
    text = "".join(map(chr, range(1, 0x3000)))
    line, *empty = responses.event(responses.encoded({"text": text})).decode().splitlines()
    assert json.loads(line.removeprefix("data: ")) == {"text": text} and empty == [""]


# ------------------------------------------------------------------------------------------------- the ends of requests


def post_all(server, bodies, path="/v1/completions"):
    """Sends requests at once. Returns their futures."""
    pool = ThreadPoolExecutor(len(bodies))
    return [pool.submit(httpx.post, server.url + path, json=body, timeout=60) for body in bodies]


def waiting(engine):
    return sum(engine.waiting.values())


def test_a_full_queue_refuses_a_tenant_and_then_everyone(server, http):
    with server.held():
        futures = post_all(server, [LONG | {"model": "A"}])  # the thread waits at the next round
        eventually(lambda: waiting(server.engine) == 1)
        futures += post_all(server, [LONG | {"model": "A", "n": QUEUE_PER_TENANT - 1}])
        eventually(lambda: waiting(server.engine) == QUEUE_PER_TENANT)
        refused = http.post("/v1/completions", json=LONG | {"model": "A"})
        assert "model" in error(refused, 429)["message"] and int(refused.headers["retry-after"]) > 0
        futures += post_all(server, [LONG | {"model": "B", "n": QUEUE - QUEUE_PER_TENANT}])
        eventually(lambda: waiting(server.engine) == QUEUE)
        refused = http.post("/v1/completions", json=LONG | {"model": "base", "prompt": [prompt(1), prompt(2)]})
        assert "server" in error(refused, 429)["message"] and int(refused.headers["retry-after"]) > 0
        assert waiting(server.engine) == QUEUE  # none of the two prompts stays
    assert [future.result().status_code for future in futures] == [200, 200, 200]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_cancelled_before_the_next_round(server, http, stream):
    with server.held(), httpx.Client(base_url=server.url) as own:
        body = LONG | {"model": "A", "stream": stream}
        with pytest.raises(httpx.ReadTimeout):
            own.post("/v1/completions", json=body, timeout=0.3)
        own.close()
        eventually(lambda: server.engine.open == 0)


def test_a_client_that_leaves_while_its_request_is_opened_is_cancelled_too(server, http, monkeypatch):
    resolve, left = Models.resolve, threading.Event()

    def slow(models, name, access):
        assert left.wait(60)
        return resolve(models, name, access)

    with monkeypatch.context() as patch, server.held():
        patch.setattr(Models, "resolve", slow)
        with httpx.Client(base_url=server.url) as own, pytest.raises(httpx.ReadTimeout):
            own.post("/v1/completions", json=LONG | {"model": "A"}, timeout=0.2)
        left.set()
        server.idle()
    assert http.post("/v1/completions", json=LONG | {"model": "A"}).status_code == 200


def test_a_client_that_leaves_halfway_frees_its_slot(server, http):
    with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG | {"model": "A", "stream": True}) as response:
        next(response.iter_lines())
    server.idle()
    eventually(lambda: not server.engine.running)
    assert http.post("/v1/completions", json=LONG | {"model": "A"}).status_code == 200


def test_a_request_that_passes_its_deadline_is_cancelled(server, http):
    with server.held():
        late = LONG | {"model": "A", "timeout": 1}
        assert error(http.post("/v1/completions", json=late), 504)["code"] == "timeout"
        server.idle()
        (only,) = events(http, "/v1/completions", late)
        assert only["error"]["code"] == "timeout"
        server.idle()


@pytest.mark.parametrize("end", ["late", "left", "left a stream", "refused"])
def test_a_request_that_fails_keeps_no_adapter(server, http, end):
    """Also without the garbage collector, as in the engine: a LoadingBank counts the adapters that stay."""
    bank, (_, tenants), body = server.engine.bank, model_and_tenants(), LONG | {"model": "A"}
    weights = weakref.ref(next(iter(bank.entry("A").weights.values())))
    gc.collect()
    gc.disable()
    try:
        with server.held():
            if end == "late":
                assert http.post("/v1/completions", json=body | {"timeout": 0.3}).status_code == 504
            elif end == "refused":
                assert http.post("/v1/completions", json=body | {"max_tokens": LENGTH}).status_code == 400
            else:
                with httpx.Client(base_url=server.url) as own, pytest.raises(httpx.ReadTimeout):
                    own.post("/v1/completions", json=body | {"stream": end != "left"}, timeout=0.3)
        server.idle()
        bank.replace("A", tenants["A"])
        for name in ("B", "B"):  # the threads of the server forget what they gave last
            http.post("/v1/completions", json=LONG | {"model": name})
        eventually(lambda: weights() is None)
    finally:
        gc.enable()


def test_pieces_come_while_the_answer_is_decoded(server, http):
    body = LONG | {"model": "A", "stream": True}
    with server.held(), httpx.stream("POST", f"{server.url}/v1/completions", json=body) as response:
        lines, text = response.iter_lines(), ""
        while text.count("w") < 30:
            assert server.engine.open == 1
            server.rounds = 1
            text += json.loads(next(line for line in lines if line).removeprefix("data: "))["choices"][0]["text"]


def test_a_client_that_reads_late_gets_everything(server, http):
    body = LONG | {"model": "A", "stream": True, "n": 3}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as response:
        time.sleep(0.2)
        server.idle()
        texts = ["", "", ""]
        for line in response.iter_lines():
            if line.startswith("data: {"):
                (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                texts[choice["index"]] += choice["text"]
    whole = http.post("/v1/completions", json=LONG | {"model": "A", "n": 3}).json()["choices"]
    assert texts == [choice["text"] for choice in whole]


def test_every_open_request_hears_that_the_engine_failed(server, http, monkeypatch):
    def fail():
        raise RuntimeError("out of memory")

    body = LONG | {"model": "A"}
    with ThreadPoolExecutor(4) as pool, monkeypatch.context() as patch:
        with server.held():
            whole = [pool.submit(http.post, "/v1/completions", json=body) for _ in range(3)]
            streamed = pool.submit(http.post, "/v1/completions", json=body | {"stream": True})
            eventually(lambda: server.engine.open == 4)
            patch.setattr(server, "_step", fail)
        assert [error(one.result(), 500)["code"] for one in whole] == ["engine_failed"] * 3
        assert '"engine_failed"' in streamed.result().text
    eventually(lambda: http.get("/ready").status_code == 200)


def test_a_round_that_fails_twice_changes_no_answer(server, http, monkeypatch):
    expected = http.post("/v1/completions", json=LONG | {"model": "A"}).json()["choices"]
    step, calls = server._step, []

    def fail_twice():
        calls.append(1)
        if len(calls) in (2, 3):
            raise RuntimeError("out of memory")
        return step()

    monkeypatch.setattr(server, "_step", fail_twice)
    assert http.post("/v1/completions", json=LONG | {"model": "A"}).json()["choices"] == expected
    calls.clear()
    texts = [one["choices"][0]["text"] for one in events(http, "/v1/completions", LONG | {"model": "A"})]
    assert "".join(texts) == expected[0]["text"]


# ------------------------------------------------------------------------------------------------------------------ log


@pytest.fixture
def log(monkeypatch):
    """The lines of the log as they come. capfd would lose what the server writes while a test reads."""
    lines = []
    monkeypatch.setattr(gate, "say", lines.append)
    return lines


def test_the_log_has_one_line_for_each_request_and_no_text(http, log):
    http.post("/v1/completions", json=LONG | {"model": "A"}, headers={"x-request-id": "one"})
    http.get("/health", headers={"x-request-id": "two"})
    http.get("/v1/models/secret%0Aline", headers={"x-request-id": "three"})

    def lines():
        ours = ("id=one", "id=two", "id=three")  # a line of the test before may come late
        return sorted(line for line in log if any(id in line for id in ours))

    eventually(lambda: len(lines()) == 2)
    get, post = lines()
    assert post.startswith("POST /v1/completions 200 model=A prompt=6 cached=") and "id=one" in post
    assert "new=30" in post and "ttft=" in post and "total=" in post
    assert "GET /v1/models/secret%0Aline 404" in get
    assert not any(word in line for line in log for word in prompt(1).split())


def fields_of(line):
    """A log line as programs read it: its first three words, and a dict of the words NAME=VALUE after them."""
    words = line.split(" ")
    return words[:3], dict(word.split("=", 1) for word in words[3:])


def test_neither_a_path_nor_a_name_writes_fields_of_the_log(http, log):
    forged = "/v1/completions%20200%20model=acme%20new=24%20id=forged"
    http.get(forged, headers={"x-request-id": "four"})

    def lines():
        return [line for line in log if line.endswith("id=four")]

    eventually(lines)
    first, named = fields_of(*lines())
    assert first == ["GET", forged, "404"] and named.keys() == {"total", "id"}
    outcome = Outcome("POST", "/v1/completions", "five", status=200, served=True, tenant="acme new=9 id=forged")
    _, named = fields_of(outcome.line())
    assert (named["model"], named["new"], named["id"]) == (r"acme\x20new=9\x20id=forged", "0", "five")


def test_log_probabilities_of_a_request_are_bounded_before_anything_is_computed(http, monkeypatch):
    """By the tokens of all answers and echoed prompts, and the alternatives of each."""
    monkeypatch.setattr(engine_requests, "MAX_LOGPROBS", 150)
    ids = [3, 4, 5, 6]
    body = {"model": "base", "temperature": 0, "prompt": [ids] * 5, "max_tokens": 6, "logprobs": 2, "echo": True}
    assert http.post("/v1/completions", json=body).status_code == 200  # 5 x (4 + 6) tokens x (2 + 1)
    assert error(http.post("/v1/completions", json=body | {"max_tokens": 7}), 400)["param"] == "logprobs"


def test_log_probabilities_of_open_requests_are_bounded_together(server, http, monkeypatch):
    monkeypatch.setattr(answering, "OPEN_LOGPROBS", 50)
    body = LONG | {"model": "base", "max_tokens": 10, "logprobs": 2}
    with server.held():
        (first,) = post_all(server, [body])
        eventually(lambda: server.engine.open == 1)
        refused = http.post("/v1/completions", json=body)
        assert error(refused, 503)["code"] == "overloaded" and int(refused.headers["retry-after"]) > 0
        rest = post_all(server, [body | {"logprobs": 1}, LONG | {"model": "base"}])  # 30 and 20 have room
        eventually(lambda: server.engine.open == 3)
    assert [future.result().status_code for future in (first, *rest)] == [200, 200, 200]
    assert http.post("/v1/completions", json=body | {"logprobs": 3, "max_tokens": 30}).status_code == 200  # alone
