"""A choice's text continues its prompt, in whatever pieces it comes."""

from types import SimpleNamespace

import pytest
import tiny_tokenizers

from para_jax.data.examples import encode_continuation
from para_jax.inference.answer_text import AnswerText, is_byte, text_of, word_tokens
from para_jax.inference.logprobs import TokenLogprob
from para_jax.server.choices import Choice
from para_jax.server.protocol import CompletionBody
from para_jax.server.token_text import TokenTexts
from para_jax.serving.request import Piece

PROMPT = "where is my"


def parts_of(tokenizer, ids, size, prompt=PROMPT, **fields):
    """What a choice gives of an answer that comes `size` tokens at a time."""
    asked = CompletionBody(model="A", prompt=prompt, **fields)
    before = tokenizer(prompt)["input_ids"]
    scores = [None, *(TokenLogprob(id, -1.0, []) for id in before[1:])]
    stream = SimpleNamespace(prompt_ids=before, prompt_logprobs=scores)
    engine = SimpleNamespace(tokenizer=tokenizer, stop_ids=())
    choice = Choice(0, asked, prompt, stream, engine, TokenTexts(tokenizer))
    text = AnswerText(tokenizer, strip=False, after=word_tokens(tokenizer))  # as the engine has it
    for start in range(0, len(ids), size):
        new = ids[start : start + size]
        for id in new:
            text.add(id)
        end = "length" if start + size >= len(ids) else None
        if end:
            text.finish()
        shown = "".join(text.pieces[start:])
        logprobs = [TokenLogprob(id, -1.0, []) for id in new] if "logprobs" in fields else None
        choice.put(Piece(0, shown, new, end, None, logprobs))
        if (part := choice.take()) is not None:
            yield part


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("name", ["plain", "with_bos", "own_space"])
def test_a_prompt_and_its_answer_are_the_text_of_all_tokens(name, size):
    """SentencePiece's decoder drops the space of an answer that it decodes alone."""
    tokenizer = getattr(tiny_tokenizers, name)()
    prompt = tokenizer(PROMPT)["input_ids"]
    for said in (" parcel? Grüße, 日本語 🙂!", "    return", "\n  two", "Ünder", "  "):
        ids = encode_continuation(tokenizer, said)
        said = text_of(tokenizer, prompt + ids).removeprefix(PROMPT)
        for extra in ([], [tokenizer.eos_token_id]):  # a special token, which has no text
            given = extra + ids
            for fields in ({}, {"logprobs": 0}, {"echo": True}, {"echo": True, "logprobs": 0}):
                parts = list(parts_of(tokenizer, given, size, **fields))
                text = "".join(part.text for part in parts)
                assert text == (PROMPT + said if "echo" in fields else said)
                if "logprobs" not in fields:
                    continue
                texts, places = TokenTexts(tokenizer), [place for part in parts for place in part.offsets]
                shown = [id for part in parts for id in part.ids]
                for last, id, place in zip([0, *shown], shown, places, strict=False):
                    known = texts.key(id) == texts.text(id) and id not in tokenizer.all_special_ids
                    if known and place and not is_byte(tokenizer, last):  # the place of a run of bytes is its beginning
                        assert text[place:].startswith(texts.text(id))


@pytest.mark.parametrize("before", ["", "A "])
def test_special_tokens_of_an_echoed_prompt_have_their_places(before):
    tokenizer = tiny_tokenizers.plain()
    start, end = "<|im_start|>", "<|im_end|>"
    prompt = f"{before}{start}user\nwhere{end}\n{start}assistant\n"
    ids = [*encode_continuation(tokenizer, " no"), tokenizer.convert_tokens_to_ids(end)]
    (part,) = parts_of(tokenizer, ids, 100, prompt, echo=True, logprobs=0)
    assert part.text == prompt + " no" and start in tokenizer.convert_ids_to_tokens(part.ids)
    for id, place in zip(part.ids[:-1], part.offsets, strict=False):
        name = tokenizer.convert_ids_to_tokens(id)
        assert part.text[place:].startswith(name if name in (start, end) else tokenizer.decode([id]))
    assert part.offsets[-1] == len(part.text)
