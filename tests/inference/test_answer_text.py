"""An answer's text, token by token, is the text of all its tokens, and what was shown is never taken back."""

import json
from functools import partial

import pytest
import tiny_run
import tiny_tokenizers
from golden_models import backbone, strong
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_scores import samples, score
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from para_jax import AdapterBank, Engine, ParaConfig, Request, generate, init_adapter
from para_jax.data.examples import encode_continuation
from para_jax.data.records import Record
from para_jax.evaluation.answers import Answerer
from para_jax.evaluation.questions import Generation
from para_jax.evaluation.tasks import EvalTask
from para_jax.inference.answer_text import INVALID, LONGEST_TAIL, AnswerText, text_of, word_tokens
from para_jax.server.batch import batch_request
from para_jax.serving import jobs

run_job = partial(jobs.run_job, read_body=batch_request)

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


def written(tokenizer, tokens, stop=(), strip=True, after=()):
    """The answer's text, and how many tokens it took, with all laws about its pieces checked."""
    text, taken, ended = AnswerText(tokenizer, stop, strip=strip, after=after), 0, False
    for token in tokens:
        ended = text.add(token)
        taken += 1
        if ended:
            break
    ended = ended or text.finish()
    assert len(text.pieces) in (taken, taken + 1)
    return str(text), taken, ended, text.pieces


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150)
@given(data=st.data())
def test_the_pieces_joined_are_the_text_of_all_tokens(kind, data):
    tokenizer = KINDS[kind]()
    ids = st.integers(0, len(tokenizer) - 1)
    texts = st.sampled_from(TEXTS).map(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
    tokens = sum(data.draw(st.lists(st.one_of(texts, ids.map(lambda one: [one])), max_size=12)), [])
    assert written(tokenizer, tokens, strip=False)[0] == text_of(tokenizer, tokens)
    word = word_tokens(tokenizer)
    assert written(tokenizer, tokens, strip=False, after=word)[0] == text_of(tokenizer, tokens, word)
    assert written(tokenizer, tokens)[0] == text_of(tokenizer, tokens).strip()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150)
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("said", [" parcel? 日本", "    return", "  ", "it", "\n  two"])
def test_a_text_after_a_word_is_what_follows_a_prompt(kind, said):
    """SentencePiece's decoder drops the first space of an answer that it decodes alone."""
    tokenizer, prompt = KINDS[kind](), "where is my"
    ids, before = encode_continuation(tokenizer, said), tokenizer(prompt)["input_ids"]
    followed = text_of(tokenizer, before + ids)[len(text_of(tokenizer, before)) :]
    word = word_tokens(tokenizer)
    assert text_of(tokenizer, ids, word) == written(tokenizer, ids, strip=False, after=word)[0] == followed
    assert written(tokenizer, ids, after=word)[0] == text_of(tokenizer, ids).strip()
    found, taken, ended, _ = written(tokenizer, ids, (followed[:2] or "x",), strip=False, after=word)
    assert found == "" and ended == bool(followed) and taken <= len(ids)


def test_a_tokenizer_may_lack_the_word():
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"one": 0, "two": 1})))
    assert word_tokens(made) == () and text_of(made, [1], word_tokens(made)) == "two"


def test_half_a_character_is_never_shown():
    tokenizer = tiny_tokenizers.plain()
    tokens = tokenizer("日本👩語", add_special_tokens=False)["input_ids"]
    assert len(tokens) > 8, "the characters are split over several tokens"
    pieces = written(tokenizer, tokens)[3]
    assert "".join(pieces) == "日本👩語" and not any(INVALID in piece for piece in pieces)
    assert sum(bool(piece) for piece in pieces) == 4


@pytest.mark.parametrize("said", ["ខ", "ខខខé🙂ខ", "ខ" * 85 + "é", "ខ" * 86, "ខ" * 85 + "🙂", "ខ" * 257])
@pytest.mark.parametrize("begin", ["", "<0x80>", "<0x80><0xE1>"])
def test_each_character_of_a_run_of_bytes_is_shown_at_once(said, begin):
    """Khmer in a vocabulary without it, as in Llama 2's: three tokens per character. Also after invalid bytes."""
    tokenizer = tiny_tokenizers.own_space()
    whole = tokenizer(said + " ok", add_special_tokens=False)["input_ids"]
    assert written(tokenizer, whole, strip=False)[0] == text_of(tokenizer, whole) == said + " ok"
    before = [tokenizer.convert_tokens_to_ids(piece + ">") for piece in begin.split(">")[:-1]]
    tokens = before + whole
    pieces = written(tokenizer, tokens, strip=False)[3]
    assert (
        max(map(len, pieces)) <= 2
        and "".join(pieces)
        == text_of(tokenizer, tokens)
        == INVALID * len(before) + (" " if before else "") + said + " ok"
    )


def test_an_answer_that_is_cut_inside_a_character_keeps_those_before_it():
    tokenizer = tiny_tokenizers.own_space()
    for word in ((), word_tokens(tokenizer)):
        tokens = tokenizer("the " + "ខ" * 18 + "é🙂", add_special_tokens=False)["input_ids"]
        whole = text_of(tokenizer, tokens, word)
        for cut in range(1, len(tokens)):
            found = text_of(tokenizer, tokens[:cut], word)
            assert whole.startswith(found.removesuffix(INVALID)) and len(found) >= len(whole) - (len(tokens) - cut)
            assert found == written(tokenizer, tokens[:cut], strip=False, after=word)[0]


@pytest.mark.parametrize("kind", ["byte level", "SentencePiece"])
def test_a_character_after_many_invalid_bytes_is_shown(kind):
    tokenizer = KINDS[kind]()
    piece = "Ģ" if kind == "byte level" else "<0x80>"
    for count in range(30):
        tokens = [tokenizer.convert_tokens_to_ids(piece)] * count
        tokens += tokenizer("ខ", add_special_tokens=False)["input_ids"][-3:]
        assert written(tokenizer, tokens)[0] == text_of(tokenizer, tokens) == INVALID * count + "ខ"


def test_a_run_of_bytes_goes_on_after_a_special_token():
    tokenizer = tiny_tokenizers.own_space()
    first, *rest = tokenizer("ខ", add_special_tokens=False)["input_ids"][1:]
    tokens = [first, tokenizer.eos_token_id, *rest]
    assert written(tokenizer, tokens)[0] == text_of(tokenizer, tokens) == "ខ"


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


def test_nothing_follows_a_stop_text_not_even_half_a_character_of_its_token():
    vocabulary = {"a": 0, "Ġâ": 1, "b": 2}  # the second is a space and the first byte of three
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.decoder = decoders.ByteLevel()
    text = AnswerText(PreTrainedTokenizerFast(tokenizer_object=made), (" ",), strip=False)
    assert [text.add(0), text.add(1), text.finish()] == [False, True, True] and str(text) == "a"


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


# -------------------------------------------------------------------------------------------------- one text everywhere


def spaced():
    """A tokenizer of words that, as most, puts a space before each word, also before the first."""
    made = Tokenizer(
        models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2} | {f"▁w{i}": i for i in range(3, 256)}, "<pad>")
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.mark.long
def test_an_answer_has_one_text_however_it_is_asked_for(tmp_path):
    """lm-eval alone gets the white space, because its own filters decide about it."""
    model, tokenizer, new = backbone("llama"), spaced(), 5
    adapter = strong(init_adapter(ParaConfig(r=4), model.config), scale=0.3)
    prompts = ["w20 w30 w40", "w50 w21"]
    answers = generate(model, prompts, tokenizer=tokenizer, adapters=adapter, max_new_tokens=new)
    assert all(len(text.split(" ")) == new for text in answers)  # no space at the ends
    assert generate(model, prompts, tokenizer=tokenizer, adapters=adapter, max_new_tokens=new, stop=["x"]) == answers
    assert generate(model, prompts, tokenizer=tokenizer, max_new_tokens=new) != answers

    bank = AdapterBank.holding({"a": adapter}, model.config)
    engine = Engine(model, bank, tokenizer, slots=2, max_length=32)
    for prompt, text in zip(prompts, answers, strict=True):
        asked = Request(prompt, "a", max_new_tokens=new)
        assert "".join(piece.text for piece in engine.stream(asked)) == text
        engine.submit(asked)
        assert [one.text for one in engine.run()] == [text]

    lines = [{"prompt": prompt, "tenant": "a"} for prompt in prompts]
    tiny_run.write_rows(tmp_path / "in.jsonl", lines)
    run_job(engine, tmp_path / "in.jsonl", tmp_path / "out.jsonl", Request("", max_new_tokens=new))
    written = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert [one["response"]["body"]["choices"][0]["text"] for one in written] == answers

    records = [Record(prompt, text, (text,), None, "") for prompt, text in zip(prompts, answers, strict=True)]
    task = EvalTask("t", records, "exact_match", max_new_tokens=new)
    assert score(model, adapter, task, tokenizer, rows=2).score == 1
    assert [one["given"] for one in samples(model, adapter, task, tokenizer, rows=2)] == answers

    questions = [("a", Generation(tuple(tokenizer(prompt)["input_ids"]), new)) for prompt in prompts]
    raw = Answerer(model, bank, tokenizer, rows=2).answer(questions)
    assert [answer.text for answer in raw] == [" " + text for text in answers]
