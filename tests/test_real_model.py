"""The built-in SmolLM2-135M against what transformers computes for it; it is downloaded once, into the user's cache."""

import json

import numpy as np
import pytest
from golden_models import FIXTURES

from para_jax import forward, generate, load_backbone, load_tokenizer
from para_jax.data.examples import encode_prompt, stop_token_ids
from para_jax.inference.generate import generate_tokens
from para_jax.inference.sampling import Sampling

pytestmark = pytest.mark.slow
REAL = json.loads((FIXTURES / "smollm2_135m_real.json").read_text())
QUESTION = [{"role": "user", "content": "What is the capital of Italy? Answer in one sentence."}]


@pytest.fixture(scope="module")
def model():
    return load_backbone("smollm2-135m", dtype="float32")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("smollm2-135m")


def test_greedy_tokens_are_those_of_transformers(model, tokenizer):
    prompt = encode_prompt(tokenizer, REAL["prompt"])
    assert prompt == REAL["prompt_ids"]
    stop = stop_token_ids(tokenizer, model.config.eos_token_ids)
    (written,) = generate_tokens(model, None, [prompt], Sampling(REAL["completion"]["new_tokens"]), stop_ids=stop)
    assert prompt + written + [tokenizer.eos_token_id] == REAL["completion"]["ids"]
    assert tokenizer.decode(written) + tokenizer.eos_token == REAL["completion"]["text"]


def test_a_chat_answer_is_that_of_transformers(model, tokenizer):
    ids, new = REAL["chat"]["ids"], REAL["chat"]["new_tokens"]
    assert encode_prompt(tokenizer, QUESTION) == ids[:-new]
    assert tokenizer.decode(ids[:-new]) == REAL["chat_prompt"]
    (answer,) = generate(model, [QUESTION], tokenizer=tokenizer, max_new_tokens=new)
    assert answer + tokenizer.eos_token == REAL["chat"]["text"]


def test_the_likeliest_next_tokens_have_the_logits_of_transformers(model):
    last = np.asarray(forward(model, None, np.array([REAL["prompt_ids"]], np.int32), 1)[0, -1])
    likeliest = np.argsort(-last)[:5]
    assert likeliest.tolist() == [token for token, _, _ in REAL["top5_last_logits"]]
    np.testing.assert_allclose(last[likeliest], [logit for _, _, logit in REAL["top5_last_logits"]], atol=2e-3)


def test_the_perplexity_of_a_text_is_that_of_transformers(model, tokenizer):
    ids = np.array(tokenizer(REAL["perplexity_text"])["input_ids"], np.int32)
    assert len(ids) == REAL["n_tokens"]
    logits = np.asarray(forward(model, None, ids[None], 1)[0, :-1], np.float64)
    nll = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(ids) - 1), ids[1:]]
    assert np.exp(nll.mean()) == pytest.approx(REAL["ppl"], abs=0.01)
