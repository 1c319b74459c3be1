"""The longest rows of a run, from its config alone."""

import pytest
from golden_models import backbone

from para_jax.config import load_config
from para_jax.estimate.longest_row import RowPart, examples_in_row, kernel_of_run, longest_split, parts_of_row

BOOLQ = "configs/llama2-7b-boolq.yaml"
RESPONSE = ["adapter.scope=response", "eval.max_new_tokens=16"]


def config_of(*given):
    return load_config(BOOLQ, ["data.max_seq_length=256", *given])


def test_a_completion_is_as_long_as_an_answer_may_be_where_that_is_given():
    assert longest_split(config_of(*RESPONSE)) == (256, 16)
    assert longest_split(config_of(*RESPONSE, "data.packing=true")) == (256, 4 * 16)  # four examples in a row
    assert longest_split(config_of(*RESPONSE, "eval.max_new_tokens=1000")) == (256, 256)
    assert longest_split(config_of(*RESPONSE, "eval.max_new_tokens=null")) == (256, 256)
    assert longest_split(config_of()) == (256, 256)  # of scope all: it takes the same memory for any


def test_with_scope_response_the_tails_alone_have_a_backward_pass():
    model = backbone("llama").config
    assert parts_of_row(config_of(), model) == (None, RowPart(256, 256, "splash"))
    prompts, tails = parts_of_row(config_of(*RESPONSE), model)
    assert prompts == RowPart(256, 256, "splash") and prompts.scores == 0
    assert tails == RowPart(16, 256 + 16, "plain") and tails.scores == 16 * 272  # too short for the kernel
    _, tails = parts_of_row(config_of(*RESPONSE, "eval.max_new_tokens=200"), model)
    assert tails == RowPart(200, 256 + 200, "splash")
    _, tails = parts_of_row(config_of(*RESPONSE, "eval.max_new_tokens=200"), backbone("gemma3_text").config)
    assert tails.kernel == "plain"  # some of its layers have a window
    _, tails = parts_of_row(config_of(*RESPONSE, "data.packing=true"), model)
    assert tails.tokens == 4 * 16 and examples_in_row(config_of("data.packing=true")) == 4


def test_a_named_kernel_is_that_of_the_machine_that_has_it():
    model, cudnn = backbone("llama").config, config_of(*RESPONSE, "backbone.attention=cudnn")
    assert parts_of_row(config_of("backbone.attention=cudnn"), model) == (None, RowPart(256, 256, "cudnn"))
    assert [part.kernel for part in parts_of_row(cudnn, model)] == ["cudnn", "plain"]  # as tail.py has it
    with pytest.raises(ValueError, match="this is a TPU"):
        kernel_of_run(cudnn, model)
