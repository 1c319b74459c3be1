"""Loads tokenizers: from a Hugging Face folder or hub id by transformers, from a GGUF file's metadata by `tokenizers`.

Either way a transformers tokenizer comes out, with its chat template and special tokens; torch is not needed.
"""

from __future__ import annotations

import math
from operator import itemgetter
from pathlib import Path
from typing import Any

from ..config import require, shorten
from ..gguf.file import GgufFile
from ..hub import CONFIG_FILES, MAX_TEXT_BYTES, TOKENIZER_FILES, resolve_tokenizer
from .examples import failures

#: Characters of a token in a GGUF file.
MAX_TOKEN = 1024

# A GGUF file's token types (llama.cpp's enum llama_token_type).
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: How tokenizer.ggml.pre says that text is cut before byte-level BPE (llama.cpp, src/llama-vocab.cpp): a pattern, or
#: "digits" or "" for GPT-2's own with and without each digit cut off first.
SPLITS = {
    "default": "",
    "gpt2": "",
    "gpt-2": "",
    "smollm": "digits",
    "llama-bpe": LLAMA3_SPLIT,
    "llama3": LLAMA3_SPLIT,
    "llama-v3": LLAMA3_SPLIT,
    "tekken": TEKKEN_SPLIT,
    "qwen2": LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}"),
}
# In these a whole word that is in the vocabulary is taken as it is, whatever the merges would make of it.
IGNORES_MERGES = ("llama-bpe", "llama3", "llama-v3", "tekken")


def load_tokenizer(source: str | Path):
    """The tokenizer of a backbone's source: a folder, a hub id, a .gguf file or a built-in name.

    Raises ValueError that names the source for files that are missing, too large, or describe no tokenizer.
    """
    path = resolve_tokenizer(source)
    if path.is_file():
        return gguf_tokenizer(GgufFile(path))
    require_moderate(path)
    from transformers import AutoTokenizer

    with failures(f"{source}: no tokenizer can be loaded from there"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    require_working(str(source), tokenizer)
    return tokenizer


def require_moderate(folder: Path) -> None:
    """Raises ValueError for a file that transformers would read whole and that is too large for a tokenizer's."""
    for file in (file for pattern in CONFIG_FILES + TOKENIZER_FILES for file in folder.glob(pattern)):
        if file.stat().st_size > MAX_TEXT_BYTES:
            raise ValueError(f"{file}: larger than {MAX_TEXT_BYTES} bytes, which no tokenizer needs")


def require_working(source: str, tokenizer) -> None:
    """Raises ValueError for settings that transformers takes as they are, and that fail only when they are used."""
    longest = tokenizer.model_max_length
    number = isinstance(longest, int | float) and not isinstance(longest, bool) and longest > 0
    require(number, f"{source}: model_max_length", longest, "a number of tokens above 0; see tokenizer_config.json")
    with failures(f"{source}: its tokenizer fails on an empty text"):
        tokenizer.decode(tokenizer("", verbose=False)["input_ids"], skip_special_tokens=True)


def gguf_tokenizer(file: GgufFile):
    """The tokenizer that a GGUF file's metadata describes, as a transformers.PreTrainedTokenizerFast."""
    from transformers import PreTrainedTokenizerFast

    with failures(f"{file.path}: the tokenizer can't be built"):  # metadata may have any type
        found = file.tokenizer
        found["tokens"], found["token_type"] = found.get("tokens") or [], found.get("token_type") or []
        if len(found["tokens"]) != len(set(found["tokens"])) or len(found["token_type"]) != len(found["tokens"]):
            raise ValueError("tokens that are missing, doubled, or without a type")
        longest = max(map(len, found["tokens"]), default=0)
        if longest > MAX_TOKEN:  # each place where it could be cut is looked at
            raise ValueError(f"a token of {longest} characters")
        special = {kind: special_token(found, kind) for kind in ("bos", "eos", "unknown", "padding")}
        backend = build(file.architecture, found)
        add_tokens(backend, found)
        add_post_processor(backend, found, special)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token=special["bos"],
            eos_token=special["eos"],
            unk_token=special["unknown"],
            pad_token=special["padding"],
            chat_template=found.get("chat_template"),
            model_max_length=file.config["max_position_embeddings"],
            clean_up_tokenization_spaces=False,
        )
    require_working(str(file.path), tokenizer)
    return tokenizer


def special_token(found: dict[str, Any], kind: str) -> str | None:
    index = found.get(f"{kind}_token_id")
    if index is None:
        return None
    if not isinstance(index, int) or not 0 <= index < len(found["tokens"]):
        raise ValueError(f"{kind}_token_id {shorten(index)} is not among the {len(found['tokens'])} tokens")
    return found["tokens"][index]


def build(architecture: str, found: dict[str, Any]):
    model = found.get("model")
    if model == "gpt2":
        return byte_level(found)
    if model == "llama":
        return sentencepiece(found, gemma=architecture == "gemma3")
    raise ValueError(f"the tokenizer model {shorten(model)} is not supported (gpt2 and llama are)")


def byte_level(found: dict[str, Any]):
    """Byte-level BPE, as GPT-2 has it, with the cuts that the file names."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers

    pre = str(found.get("pre", "default"))
    if pre not in SPLITS:
        raise ValueError(f"the pre-tokenizer {shorten(pre)} is not known (known: {', '.join(SPLITS)})")
    merges = [tuple(merge.split(" ")) for merge in found.get("merges", [])]
    tokenizer = Tokenizer(bpe(found["tokens"], merges, ignore_merges=pre in IGNORES_MERGES))
    if SPLITS[pre] in ("", "digits"):
        cuts: list = [pre_tokenizers.Digits(individual_digits=True)] if SPLITS[pre] else []
        cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False))
    else:
        cuts = [pre_tokenizers.Split(Regex(SPLITS[pre]), "isolated")]
        cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def sentencepiece(found: dict[str, Any], gemma: bool):
    """SentencePiece's BPE with byte fallback, the merges recovered from the tokens' scores."""
    from tokenizers import Tokenizer, decoders, normalizers

    # The file spells Gemma's tokens of spaces with real spaces, but text comes to the model with ▁ in their place.
    found["tokens"] = [token if token.strip(" ") else "▁" * len(token) for token in found["tokens"]]
    options = {"byte_fallback": True, "fuse_unk": True, "unk_token": special_token(found, "unknown")}
    tokenizer = Tokenizer(bpe(found["tokens"], score_merges(found), **options))
    prefix = found.get("add_space_prefix", not gemma)
    space = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if prefix else space
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def score_merges(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, in the order of transformers: best score, then longest left part.

    User-defined tokens go before all others: SentencePiece takes them whole.
    """
    scores, kinds = found.get("scores") or [], found["token_type"]
    if len(scores) != len(found["tokens"]):
        raise ValueError("a score for each token is expected")
    usable = [i for i, kind in enumerate(kinds) if kind in (NORMAL, USER_DEFINED)]
    parts = {found["tokens"][i] for i in usable}
    merges = []
    for i in usable:
        token, cost = found["tokens"][i], -math.inf if kinds[i] == USER_DEFINED else -scores[i]
        cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
        merges += [
            (cost, -len(left), -len(right), left, right) for left, right in cuts if left in parts and right in parts
        ]
    return [merge[3:] for merge in sorted(merges, key=itemgetter(0, 1, 2))]


def bpe(tokens: list[str], merges: list[tuple[str, str]], **options):
    from tokenizers.models import BPE

    return BPE({token: index for index, token in enumerate(tokens)}, merges, **options)


def add_tokens(tokenizer, found: dict[str, Any]) -> None:
    """Makes control and user-defined tokens whole where they stand in a text, such as a chat template's turns."""
    from tokenizers import AddedToken

    added = [
        AddedToken(token, normalized=False, special=kind == CONTROL)
        for token, kind in zip(found["tokens"], found["token_type"], strict=True)
        if kind in (CONTROL, USER_DEFINED)
    ]
    tokenizer.add_tokens(added)


def add_post_processor(tokenizer, found: dict[str, Any], special: dict[str, str | None]) -> None:
    """Begins and ends each text with bos and eos where the file says so (unsaid: bos in SentencePiece and Llama 3)."""
    from tokenizers.processors import TemplateProcessing

    begins = found["model"] == "llama" or SPLITS.get(found.get("pre", "")) == LLAMA3_SPLIT
    bos = special["bos"] if found.get("add_bos_token", begins) else None
    eos = special["eos"] if found.get("add_eos_token", False) else None
    used = {token: found["tokens"].index(token) for token in (bos, eos) if token}
    if used:
        single = [token for token in (bos, "$A", eos) if token]
        pair = single + [f"{token}:1" for token in (bos, "$B", eos) if token]
        tokenizer.post_processor = TemplateProcessing(single=single, pair=pair, special_tokens=list(used.items()))
