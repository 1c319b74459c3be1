"""The fewest tokens that a text can become, from its characters alone. So a text that can't fit is refused before it is
tokenised, which takes seconds for millions of characters.

A token covers the characters that it shows. So each character takes at least 1/L of a token, where L is the length of
the longest token with this character, and a text becomes at least the sum of these. This holds for BPE over bytes, as
GPT-2 has it, with bytes as the characters, and for SentencePiece's BPE. Other tokenizers drop or join characters, and
nothing is known of them.
"""

from __future__ import annotations

import json
import math
import sys
from functools import lru_cache

import numpy as np

#: How SentencePiece writes a space.
SPACE = "▁"


def fewest_tokens(tokenizer, text: str) -> int:
    """The fewest tokens that a text can become; 0 where nothing is known. The text has no half surrogate pair."""
    known = getattr(tokenizer, "backend_tokenizer", None) is not None
    weights = character_weights(tokenizer, len(tokenizer)) if known else None
    if weights is None:
        return 0
    bytewise = len(weights) == len(BYTES)
    codes = np.frombuffer(text.encode() if bytewise else text.encode("utf-32-le"), np.uint8 if bytewise else "<u4")
    return math.ceil(weights[codes].sum() - 1e-3)  # less than the rounding errors of the sum


@lru_cache(8)
def character_weights(tokenizer, size: int) -> np.ndarray | None:
    """The part of a token that each byte, or each code point, takes at least; None where nothing is known.

    Args:
        size: of the vocabulary, part of the cache key because users may add tokens.
    """
    backend = tokenizer.backend_tokenizer
    if not keeps_its_text(backend):
        return None
    kinds = kinds_of(backend)
    bytewise, space = "ByteLevel" in kinds, SPACE if kinds & {"Replace", "Metaspace"} else " "
    added = [one.content for one in backend.get_added_tokens_decoder().values()]
    vocabulary = backend.get_vocab(with_added_tokens=False)
    falls_back = backend.model.byte_fallback and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    if bytewise:
        code_of, codes = BYTES, len(BYTES)
        pieces = {*vocabulary, *("".join(CHARACTERS[byte] for byte in text.encode()) for text in added)}
    else:
        pieces, codes = {piece.replace(space, " ") for piece in [*vocabulary, *added]}, sys.maxunicode + 1
        code_of = {character: ord(character) for piece in pieces for character in piece}
    longest = {character: len(piece) for piece in sorted(pieces, key=len) for character in piece}
    weights = np.full(codes, float(falls_back))
    for character, length in longest.items():
        if character in code_of and (falls_back or character in pieces):  # others are dropped, or join to one token
            weights[code_of[character]] = 1 / length
    if not bytewise:
        weights[ord(space)] = weights[ord(" ")]
    return weights


def keeps_its_text(backend) -> bool:
    """Whether every token covers what it shows, and all tokens together the whole text."""
    model, kinds = backend.model, kinds_of(backend)
    return (
        type(model).__name__ == "BPE"
        and not model.continuing_subword_prefix
        and not model.end_of_word_suffix
        and not any(one.lstrip or one.rstrip for one in backend.get_added_tokens_decoder().values())
        and all(map(keeps_characters, steps_of(backend)))
        and not ("ByteLevel" in kinds and kinds & {"Replace", "Metaspace"})
    )


def keeps_characters(step: dict) -> bool:
    """Whether a step loses no character, and writes spaces as they are or as SentencePiece does."""
    match step["type"]:
        case "Replace":
            return step["pattern"] == {"String": " "} and step["content"] == SPACE
        case "Metaspace":
            return step["replacement"] == SPACE
        case "Split":
            return step["behavior"] != "Removed"
    return step["type"] in ("ByteLevel", "Digits", "Prepend")


def kinds_of(backend) -> set[str]:
    return {step["type"] for step in steps_of(backend)}


def steps_of(backend) -> list[dict]:
    """What becomes of a text before BPE, as tokenizer.json has it."""
    return parts_of(backend.normalizer) + parts_of(backend.pre_tokenizer)


def parts_of(component) -> list[dict]:
    """The steps of a normalizer or pre-tokenizer."""
    if component is None:
        return []
    found = json.loads(component.__getstate__())
    return found.get("normalizers") or found.get("pretokenizers") or [found]


def byte_characters() -> dict[str, int]:
    """The byte of each character of byte-level BPE, as GPT-2's bytes_to_unicode has it: printable bytes are themselves,
    and the others follow from 256 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTES = byte_characters()
CHARACTERS = {byte: character for character, byte in BYTES.items()}
