"""An answer with structured outputs that ends by itself is of that form; a cut one begins one. Free rows beside it, and
a restart, change nothing."""

import json
import random
import re
import time

import jax
import jax.numpy as jnp
import jsonschema
import pytest
from characters import character_tokenizer
from golden_models import backbone
from pydantic_core import from_json
from tiny_engine import answers, bank_of, engine_of, tenants_of

from para_jax import Engine, Request
from para_jax.inference.grammar import Grammars
from para_jax.serving.ticket import Ticket

LENGTH = 96


@pytest.fixture(scope="module")
def engine():
    model = backbone("llama")
    sizes = {"slots": 8, "max_length": LENGTH, "speculative_tokens": 3}
    made = Engine(model, bank_of(model, tenants_of(model)), character_tokenizer(), **sizes)
    made.warm_up()
    made._decoder.verify_cost = {False: 0.0, True: 0.0}  # rounds of free rows alone always speculate
    return made


def answered(engine, *requests):
    """The answers by request, in the order of the requests."""
    ids = [engine.submit(request) for request in requests]
    found = answers(engine)
    return [found[id, 0] for id in ids]


def random_schema(draw: random.Random, depth: int = 0) -> dict:
    kinds = ["string", "integer", "boolean", "null", "enum", "number"] + ["object", "array", "anyOf"] * (depth < 2)
    kind = draw.choice(kinds)
    if kind == "string":
        return draw.choice([{"type": "string", "maxLength": 5}, {"type": "string", "pattern": "^[a-c]{1,3}-[0-9]$"}])
    if kind == "integer":
        return {"type": "integer", "minimum": draw.randint(-50, 0), "maximum": draw.randint(1, 999)}
    if kind == "enum":
        return {"enum": draw.sample(["a", 'b "c"', "é\n", 7, None, True], 3)}
    if kind == "object":
        names = draw.sample(["id", "näme", "a b", "x"], draw.randint(1, 3))
        needed = [name for name in names if draw.random() < 0.6]
        properties = {name: random_schema(draw, depth + 1) for name in names}
        return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False}
    if kind == "array":
        return {"type": "array", "items": random_schema(draw, depth + 1), "maxItems": draw.randint(0, 3)}
    if kind == "anyOf":
        return {"anyOf": [random_schema(draw, depth + 1), random_schema(draw, depth + 1)]}
    return {"type": kind}


@pytest.mark.parametrize("count", [500])
def test_an_answer_to_a_random_schema_has_its_form(engine, count):
    draw = random.Random(count)
    schemas = [random_schema(draw) for _ in range(count)]
    requests = [
        Request(f"p{i}", draw.choice(["A", "B", None]), max_new_tokens=80, temperature=1.0, seed=i,
                structured_outputs={"json": schema})
        for i, schema in enumerate(schemas)
    ]  # fmt: skip
    ended = 0
    for schema, answer in zip(schemas, answered(engine, *requests), strict=True):
        assert answer.error is None
        if answer.finish_reason == "stop":
            jsonschema.validate(json.loads(answer.text), schema)
            ended += 1
        else:
            from_json(answer.text.encode("utf-8", "ignore"), allow_partial="trailing-strings")
    assert ended > count / 2


def test_each_kind_of_structure_is_kept_and_streamed(engine):
    kinds = {
        r"[a-f]{2,4}": {"regex": "[a-f]{2,4}"},
        r'(yes|no, never|per"haps)': {"choice": ["yes", "no, never", 'per"haps']},
        r"<[xy]+>": {"grammar": 'start: "<" /[xy]{1,9}/ ">"'},
        r"\{.*\}|\{.*": {"json_object": True},
    }
    for pattern, structure in kinds.items():
        request = Request("give", "A", max_new_tokens=40, temperature=1.0, seed=1, structured_outputs=structure, n=2)
        pieces = list(engine.stream(request))
        for index in (0, 1):
            text = "".join(piece.text for piece in pieces if piece.index == index)
            assert re.fullmatch(pattern, text, re.DOTALL), text


def test_free_rows_are_as_alone_and_nothing_is_compiled(engine, compiled):
    free = [Request(f"free {i}", "A", max_new_tokens=20, temperature=1.0, seed=i, logprobs=None) for i in range(4)]
    bound = [
        Request(f"bound {i}", "B", max_new_tokens=20, temperature=1.0, seed=i, structured_outputs={"regex": "[ab]{9,}"})
        for i in range(6)
    ]
    alone = [answer for request in free for answer in answered(engine, request)]
    mixed = answered(engine, *free, *bound)
    assert [answer.tokens for answer in mixed[:4]] == [answer.tokens for answer in alone]
    assert [answer.text for answer in mixed[4:]] == [answered(engine, request)[0].text for request in bound]
    assert all(re.fullmatch("[ab]+", answer.text) for answer in mixed[4:])
    assert compiled == []


def test_a_round_that_fails_changes_no_answer(engine, monkeypatch):
    requests = [
        Request(
            "a", max_new_tokens=12, temperature=1.0, seed=i, structured_outputs={"regex": "[a-z]{2}[0-9]{3}[A-Z]{9}"}
        )
        for i in range(3)
    ]
    wanted = [answer.tokens for answer in answered(engine, *requests)]
    ids = [engine.submit(request) for request in requests]
    for _ in range(4):
        engine.step()
    real, left = engine._decoder.decode, [1]

    def failing(*args, **options):
        if left.pop():
            raise RuntimeError("lost")
        return real(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="lost"):
        patch.setattr(engine._decoder, "decode", failing)
        engine.step()
    found = answers(engine)
    assert [found[id, 0].tokens for id in ids] == wanted


@pytest.mark.parametrize(
    ("structure", "said"),
    [
        ({"json": {"type": "objekt"}}, "objekt"),
        ({"json": "text"}, "json is 'text'"),
        ({"json": {"$ref": "#/nowhere"}}, "nowhere"),
        ({"regex": "("}, "regex"),
        ({"choice": []}, "choice"),
        ({"choice": ["a", 1]}, "choice"),
        ({"json_object": False}, "json_object"),
        ({"jsn": {}}, "jsn"),
        ({"regex": "a", "choice": ["b"]}, "regex"),
        ({"regex": "a" * 2001}, "2001"),
        ({"grammar": "start: A & B\nA: /a/\nB: /b/"}, "&"),
        ({"json": {"allOf": [{"pattern": "a" * n} for n in range(1, 12)]}}, "11 patterns"),
        ({"json": {"properties": {"a": {"patternProperties": {"a" * 2001: {}}}}}}, "patterns"),
        ({"choice": ["\ud800"]}, "surrogates"),
        ({"choice": ["a"], "json": {}}, "choice"),
    ],
)
def test_a_wrong_structure_is_refused_by_name(engine, structure, said):
    (answer,) = answered(engine, Request("a", structured_outputs=structure))
    assert answer.finish_reason == "error" and "structured_outputs" in answer.error and said in answer.error
    assert "\n" not in answer.error


def test_an_adapter_whose_logits_are_not_finite_ends_its_own_answer_alone(engine):
    adapter = tenants_of(engine.model)["A"]
    engine.bank.add("broken", jax.tree.map(lambda a: jnp.full_like(a, 1e30), adapter))
    structure = {"regex": "[ab]{3,}"}
    requests = [Request("a", tenant, max_new_tokens=8, structured_outputs=structure) for tenant in ("A", "broken")]
    good, bad = answered(engine, *requests)
    assert good.error is None and re.fullmatch("[ab]+", good.text) and "not finite" in bad.error


def test_a_turns_end_ends_a_text_too(engine):
    """After the form is complete the grammar allows each end token, also that of a chat."""
    ends = engine._admission.grammars.ends
    (answer,) = answered(engine, Request("a", structured_outputs={"choice": ["ab"]}, keep_end=True))
    assert answer.text == "ab" and answer.tokens[-1] in ends
    (sample,) = engine._admission.samples(Ticket(Request("a", structured_outputs={"choice": ["ab"]}), False), None)
    assert sample.stops >= set(ends)
    (empty,) = answered(engine, Request("a", structured_outputs={"regex": ""}))
    assert (empty.text, empty.finish_reason) == ("", "stop")


def test_a_tokenizer_that_cant_be_read_serves_what_is_free():
    made = engine_of(backbone("llama"), None)
    made.warm_up()
    bound, free = answered(
        made, Request("w9", max_new_tokens=2, structured_outputs={"regex": "a"}), Request("w9", max_new_tokens=2)
    )
    assert "structured_outputs" in bound.error and len(free.tokens) == 2


def test_a_tokenizer_may_have_more_tokens_than_the_model():
    guide = Grammars(character_tokenizer(), 250, [2]).guide({"regex": "a+"})
    assert guide.first.shape == (8,) and guide.first.any()


def test_what_does_not_go_together_is_refused(engine):
    structure = {"regex": "a"}
    for options in ({"ignore_eos": True}, {"prompt_logprobs": 0}):
        (answer,) = answered(engine, Request("a", structured_outputs=structure, **options))
        assert answer.error and next(iter(options)) in answer.error


HOSTILE = {
    "nested repeats": {"regex": "((((a{1,99}){1,99}){1,99}b?){1,99}c?){1,99}"},
    "alternatives": {"regex": "|".join(f"(a|b|c){{{n}}}d" for n in range(1, 150))},
    "unicode": {"regex": "\\p{L}{0,99}" * 150},
    "intersections": {"json": {"allOf": [{"type": "string", "pattern": f"a.{{{n}}}b.{{{n}}}"} for n in range(10)]}},
    "choices": {"choice": [str(n) for n in range(5000)]},
    "ambiguous": {"grammar": 'start: x\nx: "a" | x x | x x x'},
    "deep": {"json": json.loads('{"items":' * 400 + "{}" + "}" * 400)},
    "patterns": {"json": {"anyOf": [{"type": "string", "pattern": f".*a.{{{n}}}$"} for n in range(1, 200)]}},
    "recursive": {"json": {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}}, "$ref": "#/$defs/a"}},
    "many fields": {"json": {"properties": {f"k{i}": {"type": "string"} for i in range(1500)}}},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_costs_little(engine, name):
    """It is refused, or each of its tokens takes milliseconds."""
    grammars, tokenizer = Grammars(character_tokenizer(), 256, [2]), character_tokenizer()
    grammars.guide({"regex": "a"})
    began = time.process_time()
    try:
        guide = grammars.guide(HOSTILE[name])
        tokens, mask = [], guide.first.copy()
        for _ in range(40):
            allowed = [i for i in range(3, 256) if mask[i // 32] >> (i % 32) & 1]
            if not allowed:
                break
            tokens.append(tokenizer("a")["input_ids"][0] if tokenizer("a")["input_ids"][0] in allowed else allowed[0])
            guide.allow(tokens, mask)
    except ValueError as error:
        assert "structured_outputs" in str(error)
    assert time.process_time() - began < 2
