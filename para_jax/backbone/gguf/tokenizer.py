"""Builds the tokenizer that a GGUF file's metadata describe: byte-level BPE, or SentencePiece's BPE with byte fallback.

It comes out as a transformers tokenizer, with its chat template and special tokens. Torch is not needed.
"""

from __future__ import annotations

import math
from operator import itemgetter
from typing import Any

from ...io.checks import shorten
from .file import GgufFile

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
#: How text is split before byte-level BPE, by tokenizer.ggml.pre (llama.cpp, src/llama-vocab.cpp): a pattern, "" for
#: GPT-2's, or "digits" for GPT-2's after each digit was split off.
SPLITS = {
    "gpt2": "",
    "gpt-2": "",
    "smollm": "digits",
    "llama-bpe": LLAMA3_SPLIT,
    "llama3": LLAMA3_SPLIT,
    "llama-v3": LLAMA3_SPLIT,
    "tekken": TEKKEN_SPLIT,
    "qwen2": LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}"),
}
#: With these, a word that is in the vocabulary becomes that token, even if the merges would split it. They also begin
#: each text with BOS, where the file does not say.
IGNORES_MERGES = ("llama-bpe", "llama3", "llama-v3", "tekken")


def gguf_tokenizer(file: GgufFile):
    """The tokenizer of a GGUF file, as a transformers.PreTrainedTokenizerFast.

    Metadata may have any type and content, so damaged metadata raises errors of many kinds; the caller catches all.
    """
    from transformers import PreTrainedTokenizerFast

    metadata = file.tokenizer
    if not metadata.get("tokens"):
        raise ValueError("it has no tokenizer.ggml.tokens")
    metadata["token_type"] = metadata.get("token_type") or []
    special = {kind: special_token(metadata, kind) for kind in ("bos", "eos", "unknown", "padding")}
    backend = build(file.architecture, metadata)
    add_tokens(backend, metadata)
    add_post_processor(backend, metadata, special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=special["bos"],
        eos_token=special["eos"],
        unk_token=special["unknown"],
        pad_token=special["padding"],
        chat_template=metadata.get("chat_template"),
        model_max_length=file.config["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )


def special_token(metadata: dict[str, Any], kind: str) -> str | None:
    index = metadata.get(f"{kind}_token_id")
    return None if index is None else metadata["tokens"][index]


def build(architecture: str, metadata: dict[str, Any]):
    model = metadata.get("model")
    if model == "gpt2":
        return byte_level(metadata)
    if model == "llama":
        return sentencepiece(metadata, gemma=architecture == "gemma3")
    raise ValueError(f"tokenizer model {shorten(model)} is not supported; only gpt2 and llama are")


def byte_level(metadata: dict[str, Any]):
    """Byte-level BPE as in GPT-2, with the pre-tokenizer that the file names."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers

    pre = str(metadata.get("pre"))  # files from old converters have none, and llama.cpp guesses
    if pre not in SPLITS:
        raise ValueError(f"tokenizer.ggml.pre {shorten(pre)} is not supported; only {', '.join(SPLITS)} are")
    merges = [tuple(merge.split(" ")) for merge in metadata.get("merges", [])]
    tokenizer = Tokenizer(bpe(metadata["tokens"], merges, ignore_merges=pre in IGNORES_MERGES))
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


def sentencepiece(metadata: dict[str, Any], gemma: bool):
    """SentencePiece's BPE with byte fallback. The merges are recovered from the tokens' scores."""
    from tokenizers import Tokenizer, decoders, normalizers

    # The file writes Gemma's tokens of spaces with real spaces, but the normalizer below turns those into ▁.
    metadata["tokens"] = [token if token.strip(" ") else "▁" * len(token) for token in metadata["tokens"]]
    options = {"byte_fallback": True, "fuse_unk": True, "unk_token": special_token(metadata, "unknown")}
    tokenizer = Tokenizer(bpe(metadata["tokens"], score_merges(metadata), **options))
    prefix = metadata.get("add_space_prefix", not gemma)
    space = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if prefix else space
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


#: The longest token, in characters: every place where a token could be cut is tried.
MAX_TOKEN = 1024


def score_merges(metadata: dict[str, Any]) -> list[tuple[str, str]]:
    """Every pair of tokens that joins to a token, in transformers' order: best score first, then longest left part.

    User-defined tokens come before all others, because SentencePiece never splits them.
    """
    if max(map(len, metadata["tokens"])) > MAX_TOKEN:
        raise ValueError(f"a token has more than {MAX_TOKEN} characters")
    scores, kinds = metadata.get("scores") or [], metadata["token_type"]
    usable = [i for i, kind in enumerate(kinds) if kind in (NORMAL, USER_DEFINED)]
    parts = {metadata["tokens"][i] for i in usable}
    merges = []
    for i in usable:
        token, cost = metadata["tokens"][i], -math.inf if kinds[i] == USER_DEFINED else -scores[i]
        cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
        merges += [
            (cost, -len(left), -len(right), left, right) for left, right in cuts if left in parts and right in parts
        ]
    return [merge[3:] for merge in sorted(merges, key=itemgetter(0, 1, 2))]


def bpe(tokens: list[str], merges: list[tuple[str, str]], **options):
    from tokenizers.models import BPE

    return BPE({token: index for index, token in enumerate(tokens)}, merges, **options)


def add_tokens(tokenizer, metadata: dict[str, Any]) -> None:
    """Keeps control and user-defined tokens whole in a text, such as the turn markers of a chat template."""
    from tokenizers import AddedToken

    added = [
        AddedToken(token, normalized=False, special=kind == CONTROL)
        for token, kind in zip(metadata["tokens"], metadata["token_type"], strict=True)
        if kind in (CONTROL, USER_DEFINED)
    ]
    tokenizer.add_tokens(added)


def add_post_processor(tokenizer, metadata: dict[str, Any], special: dict[str, str | None]) -> None:
    """Adds bos and eos to each text as the file says. By default, SentencePiece and IGNORES_MERGES add bos."""
    from tokenizers.processors import TemplateProcessing

    begins = metadata["model"] == "llama" or metadata.get("pre") in IGNORES_MERGES
    bos = special["bos"] if metadata.get("add_bos_token", begins) else None
    eos = special["eos"] if metadata.get("add_eos_token", False) else None
    used = {token: metadata["tokens"].index(token) for token in (bos, eos) if token}
    if used:
        single = [token for token in (bos, "$A", eos) if token]
        pair = single + [f"{token}:1" for token in (bos, "$B", eos) if token]
        tokenizer.post_processor = TemplateProcessing(single=single, pair=pair, special_tokens=list(used.items()))
