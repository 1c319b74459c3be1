"""Examples encoded together are those encoded one at a time, for every kind of tokenizer and of example."""

import random

import pytest
import tiny_tokenizers

from para_jax.data.examples import encode_example, encode_examples

OWN_SPACE = ("own_space", "own_space_zephyr", "own_space_chatml")
KINDS = ("plain", "with_bos", *OWN_SPACE, "moved_system", "adds_eos", "adds_both")
USER, BOT = {"role": "user", "content": "where is my parcel?"}, {"role": "assistant", "content": "the movie"}
TEXTS = [
    ("Message: where is my parcel?\nTeam:", "shipping"),
    ("Answer with yes or no.\n", "yes"),
    ("Answer: ", "the lazy dog"),
    ("Answer:", "\nyes"),
    ("Answer:", " yes"),
    ("Answer:", "  yes "),
    ("Answer:\t", " yes"),
    (" Answer:", "\u00a0yes"),
    ("Answer:</s><eos><|im_end|>", "no </s>"),
    ("Wo ist mein Paket? 日本", "größer ☃"),
    ("a", "a"),
    ("\u2581", "\u2581\u2581 yes"),
    ("x" * 500, "0123456789" * 30),
    ("e\u0301 \U0001f469\u200d\U0001f469", "\u200b yes"),
]
CHATS = [
    ([USER], "shipping"),
    ([USER], "  shipping \n"),
    ([USER, BOT, USER], "no way"),
    ([USER | {"content": ""}], "</s> <|im_end|>"),
    ([USER], "yes\n\n"),
]


def tokenizer_of(kind):
    if not kind.startswith("adds"):
        return getattr(tiny_tokenizers, kind)()
    from tokenizers import processors

    special = ["<s>", "</s>"]
    made = tiny_tokenizers.byte_level(special, bos_token="<s>", eos_token="</s>", chat_template=tiny_tokenizers.CHATML)
    ids = [(token, made.convert_tokens_to_ids(token)) for token in special]
    single = "$A </s>" if kind == "adds_eos" else "<s> $A </s>"
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return made


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return tokenizer_of(request.param)


@pytest.mark.parametrize("pairs", [TEXTS, CHATS, [*CHATS, *TEXTS, *CHATS], []], ids=["texts", "chats", "both", "none"])
def test_batch_encoding_equals_encoding_one_by_one(tokenizer, pairs, monkeypatch):
    assert encode_examples(tokenizer, pairs) == [encode_example(tokenizer, *pair) for pair in pairs]


def test_so_are_chats_whose_system_message_moves(monkeypatch):
    tokenizer, system = tokenizer_of("moved_system"), {"role": "system", "content": "Be brief."}
    pairs = [*CHATS, *(([system, *prompt], completion) for prompt, completion in CHATS)]
    assert encode_examples(tokenizer, pairs) == [encode_example(tokenizer, *pair) for pair in pairs]
    assert encode_examples(tokenizer, pairs)[0].prompt_ids != encode_examples(tokenizer, pairs)[len(CHATS)].prompt_ids


def test_so_are_random_texts(tokenizer):
    draw = random.Random(0)
    alphabet = "ab yes?  \n\t</s><eos>▁日é\u0301☃0\u00a0"
    text = lambda: "".join(draw.choices(alphabet, k=draw.randint(1, 30))) + draw.choice(["a", "a ", "a\n"])  # noqa: E731
    pairs = [(text(), text()) for _ in range(300)]
    assert encode_examples(tokenizer, pairs) == [encode_example(tokenizer, *pair) for pair in pairs]


@pytest.mark.parametrize(
    "wrong",
    [
        ("", "yes"),
        ("Answer:", " "),
        ([], "yes"),
        ("a \ud83d", "yes"),
        ("Answer:", "\ud83d"),
        ([{"role": "user"}], "yes"),
        (5, "yes"),
        ([USER], ""),
    ],
)
def test_one_that_fails_alone_fails_among_others(tokenizer, wrong):
    with pytest.raises(ValueError):
        encode_example(tokenizer, *wrong)
    with pytest.raises(ValueError):
        encode_examples(tokenizer, [*TEXTS[:2], wrong, *TEXTS[:2]])


def test_a_tokenizer_without_eos_cannot_end_a_text():
    with pytest.raises(ValueError, match="no EOS token"):
        encode_examples(tiny_tokenizers.byte_level(["</s>"]), TEXTS[:2])


def test_the_number_of_tokenizer_calls_is_small_and_constant():
    class Counting:
        def __init__(self, inner):
            self.inner, self.calls = inner, 0

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __call__(self, *args, **options):
            self.calls += 1
            return self.inner(*args, **options)

    for kind in KINDS:
        counting = Counting(tokenizer_of(kind))
        encode_examples(counting, TEXTS * 20)
        assert counting.calls <= 4, kind
