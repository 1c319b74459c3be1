"""An answer's text, token by token, is the text of all its tokens, and what was shown is never taken back."""

import pytest
import tiny_run
import tiny_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from para_jax.inference.answer_text import INVALID, LONGEST_TAIL, AnswerText, stripped_text, text_of

KINDS = {
    "byte level": tiny_tokenizers.plain,
    "byte level with BOS": tiny_tokenizers.with_bos,
    "SentencePiece": tiny_tokenizers.own_space,
    "words": tiny_run.tokenizer,
}
TEXTS = [
    "naïve café",
    "日本語のテキスト",
    "👩‍👩‍👧 family",
    "  two  spaces ",
    "a\n\nb\n",
    "\N{REPLACEMENT CHARACTER} itself",
    "plain",
]


def written(tokenizer, tokens, stop=(), strip=True):
    """The answer's text, and how many tokens it took, with all laws about its pieces checked."""
    text, taken, ended = AnswerText(tokenizer, stop, strip=strip), 0, False
    for token in tokens:
        ended = text.add(token)
        taken += 1
        if ended:
            break
    ended = ended or text.finish()
    assert len(text.pieces) in (taken, taken + 1)
    return str(text), taken, ended, text.pieces


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_the_pieces_joined_are_the_text_of_all_tokens(kind, data):
    tokenizer = KINDS[kind]()
    ids = st.integers(0, len(tokenizer) - 1)
    texts = st.sampled_from(TEXTS).map(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
    tokens = sum(data.draw(st.lists(st.one_of(texts, ids.map(lambda one: [one])), max_size=12)), [])
    assert written(tokenizer, tokens, strip=False)[0] == text_of(tokenizer, tokens)
    assert written(tokenizer, tokens)[0] == stripped_text(tokenizer, tokens) == text_of(tokenizer, tokens).strip()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_an_answer_ends_before_the_stop_text_that_is_complete_first(kind, data):
    tokenizer = KINDS[kind]()
    texts = data.draw(st.lists(st.sampled_from([*TEXTS, "aab", "w20 w21", "ab"]), min_size=1, max_size=6))
    tokens = sum((tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts), [])
    whole = text_of(tokenizer, tokens)
    begin = data.draw(st.integers(0, max(0, len(whole) - 1)))
    stop = (whole[begin : begin + data.draw(st.integers(1, 5))] or "x", data.draw(st.sampled_from(["b", "aab", "zz"])))
    found, taken, ended, _ = written(tokenizer, tokens, stop, strip=False)
    ends = [whole.index(text) for text in stop if text in whole]
    assert ended == bool(ends)
    seen = text_of(tokenizer, tokens[:taken])
    at = min((seen.index(text) for text in stop if text in seen), default=len(seen))
    assert found == seen[:at] and (not ended or INVALID in found or not any(text in found for text in stop))
    assert written(tokenizer, tokens, stop)[:3] == (found.strip(), taken, ended)


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        (" yes", (), "yes"),
        (" a b ", (), "a b"),
        ("\n\n x\ny\n", (), "x\ny"),
        ("  \t\n", (), ""),
        (" a\nb", ("\n",), "a"),
        ("\nab", ("\n",), ""),  # a stop text ends the answer where the model wrote it
        (" one two", (" two",), "one"),
        ("  a", (" a",), ""),
        ("ab  ba", ("  b",), "ab"),
    ],
)
def test_an_answer_has_no_white_space_at_its_ends(text, stop, shown):
    tokenizer = tiny_tokenizers.plain()
    found, _, ended, given = written(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"], stop)
    assert found == shown and ended == bool(stop)
    assert "".join(given) == shown


def test_half_a_character_is_never_shown():
    tokenizer = tiny_tokenizers.plain()
    tokens = tokenizer("日本👩語", add_special_tokens=False)["input_ids"]
    assert len(tokens) > 8, "the characters are split over several tokens"
    pieces = written(tokenizer, tokens)[3]
    assert "".join(pieces) == "日本👩語" and not any(INVALID in piece for piece in pieces)
    assert sum(bool(piece) for piece in pieces) == 4


def test_the_beginning_of_a_stop_text_is_held_back_until_it_is_none():
    tokenizer = tiny_run.tokenizer()
    text = AnswerText(tokenizer, ("w21w22w23",))
    shown = []
    for token in (20, 21, 22, 24, 21, 22, 23):
        ended = text.add(token)
        shown.append(text.pieces[-1])
    assert ended and shown == ["w20", "", "", "w21w22w24", "", "", ""]
    unended = AnswerText(tokenizer, ("w21w22w23",))
    assert [unended.add(token) for token in (20, 21)] == [False, False] and not unended.finish()
    assert unended.pieces == ["w20", "", "w21"]


def test_the_work_of_a_token_does_not_grow_with_the_answer():
    class Counting:
        def __init__(self, inner):
            self.inner, self.decoded = inner, 0

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __len__(self):
            return len(self.inner)

        def decode(self, tokens, **options):
            self.decoded += len(tokens)
            return self.inner.decode(tokens, **options)

    for kind, token in (("words", 30), ("byte level", 70), ("byte level", 0), ("SentencePiece", 10)):
        tokenizer = Counting(KINDS[kind]())
        text = AnswerText(tokenizer, ("zz",) * 16)
        spent = []
        for _ in range(3):
            tokenizer.decoded = 0
            for _ in range(2 * LONGEST_TAIL):
                text.add(token)
            spent.append(tokenizer.decoded)
        assert spent[2] <= spent[1] + 1, kind
