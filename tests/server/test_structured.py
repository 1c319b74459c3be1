"""response_format and structured_outputs over HTTP, whole, streamed, and in a batch."""

import json

import httpx
import jsonschema
import openai
import pytest
from characters import character_tokenizer
from running_server import model_and_tenants, running
from tiny_engine import bank_of

from para_jax import Engine

SCHEMA = {
    "type": "object",
    "properties": {"team": {"enum": ["billing", "returns"]}, "urgent": {"type": "boolean"}},
    "required": ["team", "urgent"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "ticket", "strict": True, "schema": SCHEMA}}
GIVEN = {"model": "A", "prompt": "hello", "max_tokens": 60, "temperature": 1.0, "seed": 5}


@pytest.fixture(scope="module")
def server():
    model, tenants = model_and_tenants()
    engine = Engine(model, bank_of(model, tenants), character_tokenizer(), slots=3, max_length=128)
    with running(engine) as made:
        yield made


@pytest.fixture
def http(server):
    with httpx.Client(base_url=server.url, timeout=60) as made:
        yield made


def test_a_schema_is_kept_whole_and_streamed_by_openais_client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        for model in ("A", "base"):
            given = GIVEN | {"model": model, "extra_body": {"response_format": FORMAT}}
            (whole,) = client.completions.create(**given).choices
            jsonschema.validate(json.loads(whole.text), SCHEMA)
            pieces = [chunk.choices[0] for chunk in client.completions.create(**given, stream=True)]
            assert "".join(piece.text for piece in pieces) == whole.text and whole.finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "texts"),
    [
        ({"structured_outputs": {"choice": ["x", "yy"]}}, {"x", "yy"}),
        ({"structured_outputs": {"regex": "[7]{3}"}}, {"777"}),
        ({"response_format": {"type": "text"}, "structured_outputs": {"choice": ["x"]}}, {"x"}),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"const": 4}}}}, {"4"}),
    ],
)
def test_each_field_says_what_an_answer_must_be(http, fields, texts):
    answer = http.post("/v1/completions", json=GIVEN | {"n": 3} | fields)
    assert answer.status_code == 200, answer.text
    assert {choice["text"] for choice in answer.json()["choices"]} <= texts


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "xml"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "json_object", "json_schema": {}}}, "response_format", "json_schema"),
        ({"response_format": FORMAT | {"json_schema": {"schema": {"type": "no"}}}}, "response_format", "no"),
        ({"response_format": FORMAT | {"json_schema": {"shema": {}}}}, "response_format.json_schema.shema", "schema"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "regex"),
        ({"structured_outputs": {"guided": 1}}, "structured_outputs", "guided"),
        ({"structured_outputs": {"regex": "a"}, "response_format": FORMAT}, "structured_outputs", "response_format"),
        ({"structured_outputs": {"regex": "("}, "response_format": {"type": "text"}}, "structured_outputs", "regex"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "structured_outputs", "ignore_eos"),
    ],
)
def test_what_cant_be_kept_is_refused_by_name(http, fields, param, said):
    answer = http.post("/v1/completions", json=GIVEN | fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param) and said in error["message"]
