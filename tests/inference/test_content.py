"""A hash of how tokens become text changes with everything that a written answer depends on, and with nothing else."""

from copy import deepcopy

from tiny_run import tokenizer

from para_jax.inference.content import writing_content


def test_what_is_written_depends_on_the_tokenizer_and_the_stop_tokens():
    one, other = deepcopy(tokenizer()), deepcopy(tokenizer())
    other.add_tokens(["another"])
    made = {writing_content(one, (2,)), writing_content(one, (2, 3)), writing_content(other, (2,))}
    one(["w5", "w5 w6"], padding=True, truncation=True, max_length=2)
    assert len(made) == 3 and writing_content(one, (2,)) in made


def test_what_is_written_depends_on_which_tokens_are_special():
    one, other = deepcopy(tokenizer()), deepcopy(tokenizer())
    other.pad_token = "w5"
    assert writing_content(one, (2,)) != writing_content(other, (2,))
