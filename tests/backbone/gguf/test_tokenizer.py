import numpy as np
import pytest
from tiny_gguf import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, byte_level_gguf, write_vocabulary
from tiny_tokenizers import plain
from transformers import AutoTokenizer

from para_jax.backbone.gguf.convert import convert_gguf
from para_jax.backbone.gguf.file import GgufFile
from para_jax.data.tokenizer import load_tokenizer

TEXTS = [
    "Message: where is my parcel?\nTeam: shipping",
    " two  spaces,   three \n\n\tand 12345 it's 6.70",
    "naïve 日本語 🙂 \u0301",
    "<|im_start|>user\nhello<|im_end|>\n",
    "",
]


# ---------------------------------------------------------------------------------------------------------- byte level


def test_a_gguf_tokenizer_equals_its_original(tmp_path):
    made, original = load_tokenizer(byte_level_gguf(tmp_path / "m.gguf")), plain()
    for text in TEXTS:
        assert made(text).input_ids == original(text).input_ids
        assert made.decode(made(text).input_ids) == text
    assert (made.bos_token, made.eos_token, made.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert len(made) == len(original) and made.model_max_length == 64


def test_a_chat_templates_control_tokens_are_one_id_each(tmp_path):
    made = load_tokenizer(byte_level_gguf(tmp_path / "m.gguf"))
    ids = made("<|im_start|>user\nhello<|im_end|>\n").input_ids
    assert ids.count(0) == ids.count(1) == 1
    assert "im_" not in made.decode(ids, skip_special_tokens=True)


PIECES = {
    "gpt-2": ["in", "Ġ2024", ",", "Ġit", "'s", "ĠĠ", "ĠIT", "'", "S"],
    "smollm": ["in", "Ġ", "2", "0", "2", "4", ",", "Ġit", "'s", "ĠĠ", "ĠIT", "'", "S"],
    "llama-bpe": ["in", "Ġ", "202", "4", ",", "Ġit", "'s", "ĠĠ", "ĠIT", "'S"],
    "qwen2": ["in", "Ġ", "2", "0", "2", "4", ",", "Ġit", "'s", "ĠĠ", "ĠIT", "'S"],
    "tekken": ["in", "Ġ", "2", "0", "2", "4", ",", "Ġit", "'s", "ĠĠ", "ĠIT", "'S"],
}


@pytest.mark.parametrize("pre", PIECES)
def test_text_is_cut_as_the_pre_tokenizer_says(tmp_path, pre):
    made = load_tokenizer(byte_level_gguf(tmp_path / "m.gguf", pre=pre))
    cuts = made.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in 2024, it's   IT'S")
    assert [piece for piece, _ in cuts] == PIECES[pre]


def test_an_unknown_pre_tokenizer_or_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"m\.gguf: .*tokenizer.ggml.pre 'jais-2'.*smollm"):
        load_tokenizer(byte_level_gguf(tmp_path / "m.gguf", pre="jais-2"))
    with pytest.raises(ValueError, match="model 'bert'"):
        load_tokenizer(byte_level_gguf(tmp_path / "m.gguf", model="bert"))


@pytest.mark.parametrize(
    ("metadata", "begins", "ends"),
    [
        ({}, False, False),
        ({"add_bos_token": True, "add_eos_token": True}, True, True),
        ({"pre": "llama-bpe"}, True, False),
        ({"pre": "llama-bpe", "add_bos_token": False}, False, False),
    ],
)
def test_bos_and_eos_are_added_as_the_file_says(tmp_path, metadata, begins, ends):
    made = load_tokenizer(byte_level_gguf(tmp_path / "m.gguf", **metadata))
    ids = made("parcel").input_ids
    assert (ids[0] == 0, ids[-1] == 1) == (begins, ends)
    assert made.decode(ids, skip_special_tokens=True) == "parcel"
    assert made("parcel", add_special_tokens=False).input_ids == ids[begins : len(ids) - ends]


@pytest.mark.parametrize(
    ("metadata", "said"), [({"eos_token_id": 10**6}, "out of range"), ({"merges": ["x qqq"]}, "qqq")]
)
def test_damaged_tokenizer_metadata_names_the_file(tmp_path, metadata, said):
    path = byte_level_gguf(tmp_path / "m.gguf", **metadata)
    with pytest.raises(ValueError, match=f"{path}.*{said}"):
        load_tokenizer(path)


# ------------------------------------------------------------------------------------------------------- sentencepiece

WORDS = ["▁", "a", "b", "c", "d", "ab", "bc", "abc", "▁a", "▁ab", "cd", "▁▁", "da", "dab"]


def sentencepiece_gguf(path, *, control, spaces, **metadata):
    """Special tokens, the 256 bytes, user-defined tokens, then WORDS, the scores falling but for ▁▁'s, the lowest."""
    words = [word for word in WORDS if word not in ("▁▁" if spaces else "",)]
    tokens = [*control, *[f"<0x{i:02X}>" for i in range(256)], "<table>", *spaces, *words]
    types = [CONTROL] * len(control) + [BYTE] * 256 + [USER_DEFINED] * (1 + len(spaces)) + [NORMAL] * len(words)
    types[control.index("<unk>")] = UNKNOWN if "<pad>" not in control else CONTROL
    scores = [0.0] * (len(tokens) - len(words)) + [-1e9 if word == "▁▁" else -float(i) for i, word in enumerate(words)]
    ids = {"unknown_token_id": control.index("<unk>"), "bos_token_id": 1, "eos_token_id": 2}
    settings = {"model": "llama", "pre": "default", "scores": scores} | ids
    return write_vocabulary(path, tokens, types, **(settings | metadata)), dict(zip(tokens, scores, strict=True))


def reference_pieces(text, scores):
    """SentencePiece's BPE: joins the two neighbours with the best joint score, until no joint is a token."""
    pieces = list(text)
    while True:
        joints = [(-scores[a + b], i) for i, (a, b) in enumerate(zip(pieces, pieces[1:])) if a + b in scores]  # noqa: B905
        if not joints:
            return [byte for piece in pieces for byte in ([piece] if piece in scores else as_bytes(piece))]
        at = min(joints)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


def as_bytes(piece):
    return [f"<0x{byte:02X}>" for byte in piece.encode()]


def random_texts():
    rng = np.random.default_rng(0)
    return ["".join(rng.choice(list("abcd  é"), 12)) for _ in range(60)]


def test_a_llama_vocabulary_merges_by_score_with_byte_fallback(tmp_path):
    path, scores = sentencepiece_gguf(tmp_path / "m.gguf", control=["<unk>", "<s>", "</s>"], spaces=[])
    made = load_tokenizer(path)
    assert made("abc").input_ids[0] == 1  # unsaid: <s> comes first
    for text in random_texts():
        ids = made(text, add_special_tokens=False).input_ids
        assert made.convert_ids_to_tokens(ids) == reference_pieces("▁" + text.replace(" ", "▁"), scores)
        assert made.decode(ids) == text
    assert made("dab<table>\n").tokens() == ["<s>", "▁", "dab", "<table>", "▁", "<0x0A>"]


def test_a_llama_vocabulary_without_ids_of_special_tokens_has_those_of_llama_cpp(tmp_path):
    said = {f"{kind}_token_id": None for kind in ("unknown", "bos", "eos")}
    path, _ = sentencepiece_gguf(tmp_path / "m.gguf", control=["<unk>", "<s>", "</s>"], spaces=[], **said)
    made = load_tokenizer(path)
    assert (made.unk_token_id, made.bos_token_id, made.eos_token_id) == (0, 1, 2)
    assert GgufFile(path).config["eos_token_id"] == 2
    assert made("abc").tokens()[0] == "<s>"


def test_a_gemma_vocabulary_has_tokens_for_runs_of_spaces(tmp_path):
    path, scores = sentencepiece_gguf(
        tmp_path / "m.gguf",
        control=["<pad>", "<bos>", "<eos>", "<unk>"],
        spaces=[" " * count for count in range(2, 6)],  # as the files spell ▁▁ to ▁▁▁▁▁
        arch="gemma3",
        add_bos_token=True,
        add_space_prefix=False,
    )
    made = load_tokenizer(path)
    assert made("abc").tokens() == ["<bos>", "abc"]
    scores = {token.replace(" ", "▁"): 1.0 + len(token) if set(token) == {" "} else s for token, s in scores.items()}
    for text in random_texts():
        ids = made(text, add_special_tokens=False).input_ids
        assert made.convert_ids_to_tokens(ids) == reference_pieces(text.replace(" ", "▁"), scores)
        assert made.decode(ids) == text
    # A run that is too long for one token is taken longest first, as Gemma's own tokenizer.json does.
    assert made(f"a{' ' * 8}b", add_special_tokens=False).tokens() == ["a", "▁▁▁▁▁", "▁▁▁", "b"]


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_a_converted_folder_has_the_same_tokenizer(tmp_path, kind):
    if kind == "byte_level":
        path = byte_level_gguf(tmp_path / "m.gguf", pre="smollm")
    else:
        path, _ = sentencepiece_gguf(tmp_path / "m.gguf", control=["<unk>", "<s>", "</s>"], spaces=[])
    made = load_tokenizer(path)
    convert_gguf(path, tmp_path / "hf", made)
    for loaded in (load_tokenizer(tmp_path / "hf"), AutoTokenizer.from_pretrained(tmp_path / "hf")):
        for text in [*TEXTS, *random_texts()]:
            assert loaded(text).input_ids == made(text).input_ids
        assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == (
            made.bos_token,
            made.eos_token,
            made.pad_token,
        )
        assert loaded.chat_template == made.chat_template and loaded.model_max_length == 64


def test_a_very_long_gguf_token_is_refused(tmp_path):
    file, _ = sentencepiece_gguf(tmp_path / "m.gguf", control=["<unk>", "<s>", "</s>"], spaces=[" " * 5000])
    with pytest.raises(ValueError, match="m.gguf: .*more than 1024 characters"):
        load_tokenizer(file)
