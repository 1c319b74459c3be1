"""Records as token ids: long ones are refused, skipped or cut."""

import pytest
import tiny_tokenizers

from para_jax.config import DataSection
from para_jax.data.examples import encode_example
from para_jax.data.records import Record
from para_jax.data.training_data import encode_records, report


def long_and_short():
    texts = [("yes " * 3, "no"), ("the quick brown fox " * 9, "yes"), ("user:", "no"), ("lazy dog " * 20, "yes")]
    return [Record(p, c, (c,), None, f"file:{i}") for i, (p, c) in enumerate(texts, start=1)]


def test_examples_that_fit_are_encoded_as_everywhere():
    tokenizer, records = tiny_tokenizers.plain(), long_and_short()
    made = encode_records(records, tokenizer, DataSection(max_seq_length=500))
    assert made.examples == [encode_example(tokenizer, r.prompt, r.completion) for r in records]
    assert made.records == records and (made.cut, made.skipped) == (0, 0)


def test_a_long_example_is_an_error_that_says_what_to_do():
    with pytest.raises(ValueError) as error:
        encode_records(long_and_short(), tiny_tokenizers.plain(), DataSection(max_seq_length=20))
    tokens = sum(map(len, encode_example(tiny_tokenizers.plain(), *long_and_short()[1][:2])))
    message = str(error.value)
    assert message.startswith(f"file:2: {tokens} tokens exceed data.max_seq_length 20 (2 of 4 examples")
    assert "data.truncate to skip" in message and "left" in message


def test_skip_leaves_the_long_ones_out_and_counts_them():
    made = encode_records(long_and_short(), tiny_tokenizers.plain(), DataSection(max_seq_length=20, truncate="skip"))
    assert [r.place for r in made.records] == ["file:1", "file:3"] and len(made.examples) == 2
    assert made.skipped == 2
    with pytest.raises(ValueError, match="^file:1: every example is longer than data.max_seq_length 2"):
        encode_records(long_and_short(), tiny_tokenizers.plain(), DataSection(max_seq_length=2, truncate="skip"))


@pytest.mark.parametrize("kind", ["plain", "with_bos", "own_space"])
@pytest.mark.parametrize("length", [8, 20])
def test_left_cuts_the_prompt_s_start_and_nothing_else(kind, length):
    tokenizer, records = getattr(tiny_tokenizers, kind)(), long_and_short()
    made = encode_records(records, tokenizer, DataSection(max_seq_length=length, truncate="left"))
    bos = 0 if kind == "plain" else 1
    cut = 0
    for record, (prompt, completion) in zip(records, made.examples, strict=True):
        whole = encode_example(tokenizer, record.prompt, record.completion)
        assert completion == whole.completion_ids
        assert len(prompt) == min(len(whole.prompt_ids), length - len(completion))
        assert prompt[:bos] == whole.prompt_ids[:bos]
        assert prompt[bos:] == whole.prompt_ids[len(whole.prompt_ids) - len(prompt) + bos :]
        cut += len(prompt) < len(whole.prompt_ids)
    assert made.cut == cut >= 2


def test_a_report_says_how_many_were_cut_or_skipped():
    assert report(4, 0, 0) == "4 examples" and report(2, 0, 2) == "2 examples, 2 too long and skipped"
    assert report(9, 3, 0) == "9 examples, 3 of them too long and cut from the left"


def test_left_never_cuts_a_completion_and_leaves_a_prompt_token():
    tokenizer = tiny_tokenizers.with_bos()
    record = Record("quick brown", "yes", ("yes",), None, "file:9")
    size = len(encode_example(tokenizer, record.prompt, record.completion).completion_ids)
    made = encode_records([record], tokenizer, DataSection(max_seq_length=size + 1, truncate="left"))
    assert made.examples[0].prompt_ids == encode_example(tokenizer, record.prompt, "yes").prompt_ids[-1:]
    with pytest.raises(ValueError, match=f"file:9: .*{size} tokens.* no room"):
        encode_records([record], tokenizer, DataSection(max_seq_length=size, truncate="left"))


def test_an_example_that_cannot_be_encoded_names_its_place():
    record = Record([{"role": "system", "content": "yes"}], "no", ("no",), None, "file:4")
    with pytest.raises(ValueError, match="file:4: .*no system role"):
        encode_records([record], tiny_tokenizers.with_bos(), DataSection())
