"""No text becomes fewer tokens than its characters say, whatever the tokenizer; and the bound is of use."""

import pytest
import tiny_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from para_jax.data.examples import encode, encode_prompt
from para_jax.data.fewest_tokens import fewest_tokens

KINDS = ("plain", "with_bos", "own_space")


def with_strange_tokens():
    """A byte-level BPE with a long token of few characters, and one with a space and a letter beyond ASCII."""
    return tiny_tokenizers.byte_level(["<|" + "ab" * 40 + "|>", "ähnlich ", "</s>"], eos_token="</s>")


def without_fallback(fuse):
    """A BPE that knows few characters. Others become an unknown token each, or one together."""
    vocab = {"<unk>": 0, "a": 1, "b": 2, "ab": 3, "▁": 4}
    made = Tokenizer(models.BPE(vocab, [("a", "b")], unk_token="<unk>", fuse_unk=fuse))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


TOKENIZERS = [*(getattr(tiny_tokenizers, kind)() for kind in KINDS), with_strange_tokens(), without_fallback(True)]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@settings(max_examples=60)
@given(data=st.data())
def test_no_text_has_fewer_tokens(tokenizer, data):
    """Of any characters, and of the tokenizer's own longest tokens, which leave the least room for a mistake."""
    pieces = sorted(tokenizer.get_vocab(), key=len)[-60:]
    shown = [tokenizer.decode([tokenizer.get_vocab()[piece]]) for piece in pieces] + pieces
    parts = st.sampled_from(shown) | st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.just(" " * 9)
    text = "".join(data.draw(st.lists(parts, max_size=12)))
    assert fewest_tokens(tokenizer, text) <= len(encode(tokenizer, text))


@pytest.mark.parametrize("kind", KINDS)
def test_characters_of_short_tokens_count_more_than_those_of_the_longest(kind):
    tokenizer = getattr(tiny_tokenizers, kind)()
    longest = max(map(len, tokenizer.get_vocab()))
    for text in ("漢字" * 50, "^" * 100):
        assert fewest_tokens(tokenizer, text) > 2 * len(text) / longest


def test_tokens_that_are_added_later_count():
    tokenizer = tiny_tokenizers.byte_level(["</s>"], eos_token="</s>")
    before = fewest_tokens(tokenizer, "^" * 90)
    tokenizer.add_tokens(["^" * 30])
    assert len(encode(tokenizer, "^" * 90)) == 3 == fewest_tokens(tokenizer, "^" * 90) < before


def changed(**parts):
    """A byte-level tokenizer with another normalizer or pre-tokenizer, or a further token."""
    tokenizer = tiny_tokenizers.byte_level(["</s>"], eos_token="</s>")
    for name, part in parts.items():
        if name == "token":
            tokenizer.add_tokens([part])
        else:
            setattr(tokenizer.backend_tokenizer, name, part)
    return tokenizer


def word_level():
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="b")))


@pytest.mark.parametrize(
    "tokenizer",
    [
        word_level(),
        changed(normalizer=normalizers.NFC()),
        changed(normalizer=normalizers.Replace("a", "")),
        changed(normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(Regex(" +"), "▁")])),
        changed(normalizer=normalizers.Replace(" ", "▁")),  # of a tokenizer over bytes
        changed(pre_tokenizer=pre_tokenizers.WhitespaceSplit()),
        changed(pre_tokenizer=pre_tokenizers.Split(" ", "removed")),
        changed(token=AddedToken("<tool>", rstrip=True)),
        object(),
    ],
)
def test_of_tokenizers_that_lose_characters_nothing_is_known(tokenizer):
    assert fewest_tokens(tokenizer, "a  b") == 0


def test_characters_that_join_to_one_unknown_token_count_nothing():
    assert len(encode(without_fallback(True), "xyzxyz")) == 1
    assert fewest_tokens(without_fallback(True), "xyzxyz") == fewest_tokens(without_fallback(True), "    ") == 0
    assert fewest_tokens(without_fallback(True), "abxab") == 2


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_tokenised(monkeypatch):
    tokenizer = tiny_tokenizers.plain()
    prompts = ["^" * 40, [{"role": "user", "content": "^" * 40}]]
    for prompt in prompts:
        count = len(encode_prompt(tokenizer, prompt))
        assert encode_prompt(tokenizer, prompt, tokens=count)
    monkeypatch.setattr(type(tokenizer), "__call__", None)
    for prompt in prompts:
        with pytest.raises(ValueError, match="prompt has at least .*maximum number of tokens, 9"):
            encode_prompt(tokenizer, prompt, tokens=9)
