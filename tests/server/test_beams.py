"""vLLM's use_beam_search over HTTP: the engine's answers, whole, streamed, and in a job."""

import json

import httpx
import openai
import pytest
from characters import character_tokenizer
from running_server import model_and_tenants, running
from tiny_engine import answers, bank_of

from para_jax import Engine, Request
from para_jax.server.batch import run_batch

GIVEN = {"model": "A", "prompt": "hello", "max_tokens": 9, "n": 3, "use_beam_search": True, "length_penalty": 0.5}


def engine():
    model, tenants = model_and_tenants()
    bank = bank_of(model, tenants)
    return Engine(model, bank, character_tokenizer(), slots=4, max_length=64, max_logprobs=20)


@pytest.fixture(scope="module")
def server():
    with running(engine()) as made:
        yield made


@pytest.fixture(scope="module")
def expected():
    made = engine()
    made.submit(Request("hello", "A", 9, n=3, num_beams=3, length_penalty=0.5, strip=False))
    return [completion.text for completion in answers(made).values()]


def test_the_best_answers_come_whole_and_streamed(server, expected):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        named = {"use_beam_search": True, "length_penalty": 0.5}
        given = {name: value for name, value in GIVEN.items() if name not in named} | {"extra_body": named}
        whole = client.completions.create(**given, seed=4)
        assert [choice.text for choice in whole.choices] == expected and len(set(expected)) > 1
        assert whole.usage.completion_tokens <= 27
        texts = [""] * 3
        for chunk in client.completions.create(**given, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        assert texts == expected


def test_a_job_takes_both_forms_of_a_line(expected, tmp_path):
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": GIVEN}
    short = {"prompt": "hello", "tenant": "A", "max_new_tokens": 9, "n": 3, "num_beams": 3, "length_penalty": 0.5}
    (tmp_path / "in.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(short) + "\n")
    assert run_batch(engine(), tmp_path / "in.jsonl", tmp_path / "out.jsonl") == 0
    for row in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines()):
        texts = [choice["text"] for choice in row["response"]["body"]["choices"]]
        assert [text.strip() for text in texts] == [text.strip() for text in expected]


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"n": 5}, "n", "n is 5"),
        ({"stop": "x"}, "n", "stop"),
        ({"logprobs": 1}, "logprobs", "use_beam_search"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs", "use_beam_search"),
        ({"length_penalty": 11}, "length_penalty", "10"),
        ({"use_beam_search": "maybe"}, "use_beam_search", "maybe"),
    ],
)
def test_what_beams_do_not_take_is_refused_by_name(server, fields, param, said):
    answer = httpx.post(f"{server.url}/v1/completions", json=GIVEN | fields, timeout=60)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param) and said in error["message"]
