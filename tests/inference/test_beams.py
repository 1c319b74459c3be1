"""Beam search finds the answers and the scores of transformers, for each prompt of a batch by itself."""

import json

import jax
import numpy as np
import pytest
from golden_models import FIXTURES, backbone, prompts, strong

from para_jax import Ia3Config, ParaConfig, forward, init_adapter, load_backbone, make_mesh, pick, stack_adapters
from para_jax.inference.beams import BeamSearch
from para_jax.inference.generate import beam_searches
from para_jax.inference.sampling import Sampling

CASES = json.loads((FIXTURES / "beams.json").read_text())["cases"]
ENDS = set(range(60, 110))


def name_of(case: dict) -> str:
    return f"{case['family']}-{case['num_beams']}-{case['length_penalty']}-{len(case['ends'])}"


def sampling_of(case: dict) -> Sampling:
    return Sampling(case["max_new_tokens"], num_beams=case["num_beams"], length_penalty=case["length_penalty"])


@pytest.mark.parametrize("layout", ["layers", "stacked"])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_the_answers_are_those_of_transformers(case, layout):
    model = backbone(case["family"], layout)
    (search,) = beam_searches(model, None, [case["prompt"]], sampling_of(case), [case["ends"]])
    assert [beam.tokens for beam in search.answers] == case["tokens"]
    np.testing.assert_allclose([beam.score for beam in search.answers], case["scores"], atol=1e-3)


@pytest.fixture(scope="module")
def model():
    return backbone("llama")


@pytest.fixture(scope="module")
def adapters(model):
    return [strong(init_adapter(ParaConfig(r=4), model.config), seed) for seed in (1, 2)]


def searched(model, adapters, rows, **settings):
    searches = beam_searches(model, adapters, rows, Sampling(8, num_beams=3, **settings), [ENDS] * len(rows))
    return [search.answers for search in searches]


def test_a_mixed_batch_equals_each_prompt_alone(model, adapters):
    rows = [row[:length].tolist() for row, length in zip(prompts(model, 3, 20), (20, 7, 12), strict=True)]
    mixed = searched(model, pick(stack_adapters(adapters), [1, -1, 0]), rows)
    for row, adapter, together in zip(rows, (adapters[1], None, adapters[0]), mixed, strict=True):
        (alone,) = searched(model, adapter, [row])
        assert [beam.tokens for beam in together] == [beam.tokens for beam in alone]
        assert np.allclose([beam.score for beam in together], [beam.score for beam in alone], atol=1e-4)


@pytest.mark.parametrize("config", [ParaConfig(r=4), Ia3Config()], ids=["para", "ia3"])
def test_a_score_is_that_of_the_teacher_forced_pass(model, config):
    adapter, (row,) = strong(init_adapter(config, model.config)), prompts(model, 1, 9).tolist()
    (answers,) = searched(model, adapter, [row], length_penalty=0.7)
    assert len({tuple(beam.tokens) for beam in answers}) == 3
    for beam in answers:
        ids = np.array([row + beam.tokens])
        logprobs = jax.nn.log_softmax(forward(model, adapter, ids, len(row))[0, len(row) - 1 : -1])
        own = logprobs[np.arange(len(beam.tokens)), np.array(beam.tokens)]
        assert beam.score == pytest.approx(float(own.sum()) / len(beam.tokens) ** 0.7, abs=1e-4)


def test_one_beam_is_the_greedy_answer(model, adapters):
    """BeamSearch with one beam takes the likeliest token, as greedy decoding does."""
    (row,) = prompts(model, 1, 9).tolist()
    (search,) = beam_searches(model, adapters[0], [row], Sampling(8), [()])
    logits = forward(model, adapters[0], np.array([row + search.answers[0].tokens]), len(row))
    assert search.answers[0].tokens == logits[0, len(row) - 1 : -1].argmax(-1).tolist()


def test_eight_devices_equal_one(model, adapters):
    over = load_backbone(FIXTURES / "llama", dtype="float32", mesh=make_mesh(fsdp=4, tensor=2))
    rows = prompts(model, 2, 9).tolist()
    adapters = pick(stack_adapters(adapters), [0, 1])
    one, eight = searched(model, adapters, rows), searched(over, adapters, rows)
    assert [[beam.tokens for beam in answers] for answers in one] == [[b.tokens for b in answers] for answers in eight]


def test_logits_that_are_not_finite_are_an_error():
    search = BeamSearch(Sampling(num_beams=2), [3])
    with pytest.raises(ValueError, match="not finite"):
        search.advance(np.arange(3)[None], np.array([[0.0, np.nan, 0.0]], np.float32))


@pytest.mark.parametrize(
    "wrong, name",
    [
        ({"num_beams": 0}, "num_beams is 0"),
        ({"num_beams": 129}, "num_beams is 129"),
        ({"length_penalty": float("nan")}, "length_penalty is nan"),
        ({"num_beams": 2, "temperature": 0.5}, "temperature"),
        ({"num_beams": 2, "stop": "x"}, "stop"),
    ],
)
def test_a_wrong_setting_is_named(wrong, name):
    with pytest.raises(ValueError, match=name):
        Sampling(8, **wrong)
