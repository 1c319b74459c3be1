"""Training data read in parts is what `load_records` and `encode_records` make of it."""

import json

import numpy as np
import pytest
import tiny_tokenizers

from para_jax.config import DataSection
from para_jax.data import training_data
from para_jax.data.examples import encode_example
from para_jax.data.records import Record, load_records
from para_jax.data.training_data import describe_lengths, encode_records, load_training_data

USER, BOT = {"role": "user", "content": "where is my parcel?"}, {"role": "assistant", "content": "shipping"}
KINDS = ("plain", "with_bos", "own_space")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small parts."""
    monkeypatch.setattr(training_data, "ENCODED_AT_ONCE", 7)


def rows(count=40):
    found = [{"prompt": f"Message {i}: " + "the quick brown fox " * (i % 9), "completion": "yes"} for i in range(count)]
    found[3] = {"prompt": [USER], "completion": [BOT]}
    found[11] = {"messages": [USER, BOT, USER, BOT]}
    return found


def written(folder, found=None):
    file = folder / "train.jsonl"
    lines = [json.dumps(row) for row in (rows() if found is None else found)]
    file.write_text("\n\n".join(lines) + "\n")  # every second line is empty
    return file


def section_of(file, **fields):
    return DataSection(train=str(file), **{"max_seq_length": 500, **fields})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "fields", [{}, dict(max_seq_length=40, truncate="skip"), dict(max_seq_length=40, truncate="left")]
)
def test_parts_change_nothing(tmp_path, kind, fields):
    tokenizer, section = getattr(tiny_tokenizers, kind)(), section_of(written(tmp_path), **fields)
    wanted = encode_records(load_records(section, "train"), tokenizer, section)
    made = load_training_data(section, tokenizer)
    assert list(made.examples) == wanted.examples and (made.cut, made.skipped) == (wanted.cut, wanted.skipped)
    assert list(made.places) == [record.place for record in wanted.records]
    if fields:
        assert made.cut + made.skipped > 0


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("at", [0, 7])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "'completion'"),
        ({"prompt": [{"role": "system", "content": "yes"}], "completion": "no"}, "no system role"),
        ({"prompt": "the quick " * 99, "completion": "no"}, r"tokens exceed data.max_seq_length 200 \(1 of 41"),
    ],
)
def test_an_error_names_its_place_in_any_part(tmp_path, at, row, message):
    found = rows()
    found[at] = row
    file = written(tmp_path, found)
    section = section_of(file, max_seq_length=200)
    with pytest.raises(ValueError, match=message) as error:
        load_training_data(section, tiny_tokenizers.with_bos())
    assert str(error.value).startswith(f"{file}:{2 * at + 1}: ")


def test_no_room_for_a_prompt_is_an_error(tmp_path):
    file = written(tmp_path)
    with pytest.raises(ValueError, match=rf"{file}:1: an answer of \d+ tokens leaves no room"):
        load_training_data(section_of(file, max_seq_length=2, truncate="left"), tiny_tokenizers.plain())
    with pytest.raises(ValueError, match=f"{file}:1: every example is longer than data.max_seq_length 2"):
        load_training_data(section_of(file, max_seq_length=2, truncate="skip"), tiny_tokenizers.plain())


# -------------------------------------------------------------------------------------------------------------- lengths


def test_the_length_follows_from_the_longest_example():
    lengths = np.array([10] * 50 + [20] * 45 + [30] * 5)
    assert describe_lengths(lengths) == (
        "lengths: half of the examples have up to 10 tokens, 95 % up to 20, the longest 30; data.max_seq_length=32"
    )


def test_a_packed_row_has_room_for_several_examples_and_for_the_longest():
    short, long = (describe_lengths(np.array([20] * 300 + [most]), packing=True) for most in (30, 700))
    assert short.endswith("the longest 30; data.max_seq_length=512")
    assert long.endswith("the longest 700; data.max_seq_length=704")  # one line: every row has this length


# ------------------------------------------------------------------------------------------------------- long records


def long_and_short():
    texts = [("yes " * 3, "no"), ("the quick brown fox " * 9, "yes"), ("user:", "no"), ("lazy dog " * 20, "yes")]
    return [Record(p, c, (c,), None, f"file:{i}") for i, (p, c) in enumerate(texts, start=1)]


def test_skip_leaves_the_long_ones_out_and_counts_them():
    made = encode_records(long_and_short(), tiny_tokenizers.plain(), DataSection(max_seq_length=20, truncate="skip"))
    assert [r.place for r in made.records] == ["file:1", "file:3"] and len(made.examples) == 2
    assert made.skipped == 2
    with pytest.raises(ValueError, match="^file:1: every example is longer than data.max_seq_length 2"):
        encode_records(long_and_short(), tiny_tokenizers.plain(), DataSection(max_seq_length=2, truncate="skip"))


@pytest.mark.parametrize("kind", ["plain", "with_bos", "own_space"])
def test_left_cuts_the_prompt_s_start_and_nothing_else(kind, length=8):
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


def test_left_never_cuts_a_completion_and_leaves_a_prompt_token():
    tokenizer = tiny_tokenizers.with_bos()
    record = Record("quick brown", "yes", ("yes",), None, "file:9")
    size = len(encode_example(tokenizer, record.prompt, record.completion).completion_ids)
    made = encode_records([record], tokenizer, DataSection(max_seq_length=size + 1, truncate="left"))
    assert made.examples[0].prompt_ids == encode_example(tokenizer, record.prompt, "yes").prompt_ids[-1:]
    with pytest.raises(ValueError, match=f"file:9: .*{size} tokens.* no room"):
        encode_records([record], tokenizer, DataSection(max_seq_length=size, truncate="left"))
