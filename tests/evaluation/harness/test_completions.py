"""lm-eval's requests to our server say where each context ends."""

from types import SimpleNamespace

import pytest
from lm_eval.models.openai_completions import LocalCompletionsAPI

from para_jax.evaluation.harness.completions import ParaCompletions


@pytest.fixture
def lm():
    made = object.__new__(ParaCompletions)  # its __init__ asks the server and loads a tokenizer
    made.model, made.max_length = "acme", 5
    return made


def payloads(lm, *requests):
    """What is sent for (context, continuation)."""
    inputs, _, _ = lm.batch_loglikelihood_requests([[(None, *request) for request in requests]])
    return lm._create_payload(inputs)


def test_a_score_comes_with_the_length_of_its_context(lm):
    sent = payloads(lm, ([1, 2], [3]), ([1, 2, 3], [4, 5]))
    assert sent["prompt"] == [[1, 2, 3], [1, 2, 3, 4, 5]] and sent["context_length"] == [2, 3]
    rest = {name: value for name, value in sent.items() if name != "context_length"}
    assert rest == LocalCompletionsAPI._create_payload(SimpleNamespace(model="acme"), sent["prompt"])


def test_a_context_that_loses_its_start_is_shorter(lm):
    assert payloads(lm, ([1, 2, 3, 4], [5, 6, 7]))["context_length"] == [2]


def test_prompts_as_texts_are_refused_because_they_have_no_length(lm):
    with pytest.raises(ValueError, match="tokenized_requests"):
        lm._create_payload(["a text"])
