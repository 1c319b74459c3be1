"""The bytes of an answer's tokens, joined, are the bytes of its text, whatever characters it has."""

import pytest
import tiny_run
import tiny_tokenizers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from para_jax.server.token_text import BYTES, TokenTexts

TEXT = "where is my parcel? Grüße, 日本語 🙂!\n  two"


@pytest.mark.parametrize("name", ["plain", "with_bos", "own_space"])
def test_the_bytes_of_all_tokens_are_those_of_the_text(name):
    tokenizer = getattr(tiny_tokenizers, name)()
    texts, ids = TokenTexts(tokenizer), tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    joined = b"".join(map(texts.bytes, ids))
    assert joined.decode().removeprefix(" " if name == "own_space" else "") == TEXT
    parts = [id for id in ids if b"\xf0" in texts.bytes(id) and texts.bytes(id).decode(errors="ignore") == ""]
    assert parts  # the face is several tokens
    assert texts.text(parts[0]).startswith("\\xf0") and texts.key(parts[0]).startswith("bytes:\\xf0")
    assert texts.key(ids[0]) == texts.text(ids[0])


def test_special_tokens_have_their_names():
    tokenizer = tiny_tokenizers.plain()
    assert TokenTexts(tokenizer).bytes(tokenizer.eos_token_id) == b"<|im_end|>"


def test_other_tokenizers_decode_their_own_tokens():
    assert TokenTexts(tiny_run.tokenizer()).text(42) == "w42"


def test_a_tokenizer_of_few_words_is_taken():
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"one": 0, "two": 1})))
    assert TokenTexts(made).text(1) == "two"


def test_each_byte_has_a_character_of_its_own():
    assert sorted(BYTES.values()) == list(range(256)) and BYTES["Ġ"] == ord(" ") and BYTES["Ċ"] == ord("\n")
