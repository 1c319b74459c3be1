"""The text of single tokens, as log-probabilities show it. A token may hold a part of a character, so it has bytes."""

from __future__ import annotations

from ..inference.answer_text import is_byte


class TokenTexts:
    """The bytes and texts of a tokenizer's tokens. Any thread may use it."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._added = dict(tokenizer.added_tokens_decoder)  # which the tokenizer makes at each access
        decoder = repr(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None))
        self._of_piece = byte_level if "ByteLevel" in decoder else word_piece if "ByteFallback" in decoder else None
        """the bytes of a piece of the vocabulary; None: the tokenizer's own decoding"""
        self._known: dict[int, bytes] = {}

    def bytes(self, token: int) -> bytes:
        """The bytes that the token adds to a text. A special token's are its name."""
        if token not in self._known:
            self._known[token] = self._bytes(token)
        return self._known[token]

    def text(self, token: int) -> str:
        """The bytes as a text. Where they are a part of a character, they are written out, as in \\xe2\\x82."""
        try:
            return self.bytes(token).decode()
        except UnicodeDecodeError:
            return "".join(f"\\x{byte:02x}" for byte in self.bytes(token))

    def key(self, token: int) -> str:
        """The text, marked where it is bytes written out: different tokens then have different keys more often."""
        text = self.text(token)
        return text if text.encode() == self.bytes(token) else f"bytes:{text}"

    def _bytes(self, token: int) -> bytes:
        added = self._added.get(token)
        if added is not None:
            return added.content.encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if self._of_piece is None or not isinstance(piece, str):
            return self._tokenizer.decode([token], clean_up_tokenization_spaces=False).encode()
        if self._of_piece is word_piece and is_byte(self._tokenizer, token):
            return bytes([int(piece[3:5], 16)])
        return self._of_piece(piece)


def word_piece(piece: str) -> bytes:
    """SentencePiece writes a space as a low line."""
    return piece.replace("▁", " ").encode()


def byte_level(piece: str) -> bytes:
    """Byte-level BPE writes each byte as a character of its own."""
    return bytes(BYTES[character] for character in piece if character in BYTES)


def byte_characters() -> dict[str, int]:
    """The byte of each character of byte-level BPE, as GPT-2's bytes_to_unicode has it: printable bytes are themselves,
    and the others follow from 256 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTES = byte_characters()
