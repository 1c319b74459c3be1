"""The text of an answer. Training puts a space between a prompt and its completion, so an answer's first token begins
with one: white space at both ends of an answer is not part of its text.

AnswerText is the same text while its tokens come one at a time: cut before the first stop text, then stripped, and
released as soon as no later token can change it. The cost is linear in the tokens, because only a short tail is decoded
again.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import groupby

from ..data.examples import encode, special_tokens

#: Tokens that a character may take.
CHARACTER_TOKENS = 4
#: At most this many tokens may wait for the character that they are part of. The limit keeps long runs of invalid bytes
#: cheap.
LONGEST_TAIL = 16
INVALID = "\N{REPLACEMENT CHARACTER}"


class AnswerText:
    """`pieces` holds one text per token, which may be empty. Joined, they are the answer."""

    def __init__(self, tokenizer, stop: tuple[str, ...] = (), *, strip: bool = True, after: Sequence[int] = ()):
        """
        Args:
            stop: texts that end the answer; white space in them counts.
            strip: whether to leave out the white space at the answer's ends.
            after: tokens that the answer follows; see `word_tokens`.
        """
        self.pieces: list[str] = []
        self._tokenizer, self._stop, self._strip = tokenizer, stop, strip
        self._special = special_ids(tokenizer, len(tokenizer))
        self._tail: list[int] = list(after)
        """the last tokens with decided text, then those with undecided text"""
        self._decided, self._shown = len(self._tail), len(text_of(tokenizer, self._tail))
        """how many tokens of the tail are decided, and how many characters of its text are released"""
        self._held = ""
        """decided text that may begin a stop text"""
        self._begun = False
        """whether a character other than white space is released"""
        self._space: list[str] = []
        """white space after it, released before more text"""
        self._ended = False
        """whether a stop text has ended the answer"""

    def add(self, token: int) -> bool:
        """Adds the next token. Returns whether a stop text has ended the answer; if so, nothing more may be added."""
        return self._take("" if token in self._special else self._decode(token))

    def finish(self) -> bool:
        """Releases the rest, after the last token. Returns whether a stop text has ended the answer."""
        if self._ended:  # the token that ended it may go on, with half a character
            return True
        ended = self._take(text_of(self._tokenizer, self._tail)[self._shown :])
        self.pieces[-1] += self._released(self._held)
        self._held = ""
        return ended

    def __str__(self) -> str:
        return "".join(self.pieces)

    def _decode(self, token: int) -> str:
        """The text that this token decides. An incomplete character stays undecided."""
        self._tail.append(token)
        text = text_of(self._tokenizer, self._tail)
        decided = text.removesuffix(INVALID)
        new, undecided = decided[self._shown :], len(text) - len(decided)
        self._shown += len(new)
        if new and not undecided:
            # The next tokens are decoded together with these: a tokenizer may strip the first space of a text.
            self._tail = self._tail[self._decided :]
            self._decided = len(self._tail)
        elif len(self._tail) - self._decided > LONGEST_TAIL:  # invalid bytes, or tokens without text
            del self._tail[self._decided : -CHARACTER_TOKENS]
        else:
            return new
        self._shown = len(text_of(self._tokenizer, self._tail)) - undecided
        return new

    def _take(self, new: str) -> bool:
        text = self._held + new
        ends = [text.index(stop) for stop in self._stop if stop in text]
        cut = min(ends) if ends else min((beginning(text, stop) for stop in self._stop), default=len(text))
        self.pieces.append(self._released(text[:cut]))
        self._held, self._ended = "" if ends else text[cut:], bool(ends)
        return self._ended

    def _released(self, text: str) -> str:
        """What can be shown of the text that no stop text cuts: nothing of the white space that may be at an end."""
        if not self._strip:
            return text
        kept = text.rstrip()
        if not kept:
            self._space += [text] if self._begun else []
            return ""
        before, self._space = "".join(self._space), [text[len(kept) :]]
        begun, self._begun = self._begun, True
        return before + kept if begun else kept.lstrip()


def beginning(text: str, stop: str) -> int:
    """The index from which the text's end may begin a stop text; the text's length if nowhere."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0 and not stop.startswith(text[at:]):
        at = text.find(stop[0], at + 1)
    return len(text) if at < 0 else at


def text_of(tokenizer, tokens: Sequence[int], after: Sequence[int] = ()) -> str:
    """The text of tokens that follow those of `after`, without special tokens. Bytes that are not a character become
    U+FFFD."""
    if after:
        return text_of(tokenizer, [*after, *tokens])[len(text_of(tokenizer, after)) :]
    text = decoded(tokenizer, tokens)
    return decoded(tokenizer, with_valid_bytes(tokenizer, tokens)) if INVALID in text else text


def decoded(tokenizer, tokens: Sequence[int]) -> str:
    return tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def with_valid_bytes(tokenizer, tokens: Sequence[int]) -> Sequence[int]:
    """The tokens, with U+FFFD in place of byte tokens that are not a character. SentencePiece's decoders would
    otherwise replace the whole run of byte tokens around them."""
    bytes_of = byte_tokens(tokenizer, len(tokenizer))
    if bytes_of.keys().isdisjoint(tokens):
        return tokens
    token_of = {byte: token for token, byte in bytes_of.items()}
    special = special_ids(tokenizer, len(tokenizer))  # a run goes on after them
    valid: list[int] = []
    for are_bytes, run in groupby((one for one in tokens if one not in special), bytes_of.__contains__):
        if are_bytes:
            text = bytes(bytes_of[token] for token in run).decode(errors="replace")
            run = (token_of[byte] for byte in text.encode())
        valid += run
    return valid


@lru_cache(maxsize=8)
def word_tokens(tokenizer) -> tuple[int, ...]:
    """The tokens of a word, none if the tokenizer lacks it. An answer that is decoded after them keeps the space before
    its first word, which SentencePiece's decoders drop from an answer alone."""
    with suppress(ValueError):
        return tuple(encode(tokenizer, "a"))
    return ()


@lru_cache(maxsize=8)
def special_ids(tokenizer, length: int) -> frozenset[int]:
    """The tokens without text. `length` is as in `special_tokens`."""
    return frozenset(special_tokens(tokenizer, length).values())


@lru_cache(maxsize=8)
def byte_tokens(tokenizer, length: int) -> dict[int, int]:
    """The tokens that are one byte of a SentencePiece vocabulary, such as <0xE4>, with their bytes. Empty if the
    tokenizer does not decode them as bytes. `length` is as in `special_tokens`."""
    ids = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in range(256)])
    token_of = {byte: id for byte, id in enumerate(ids) if id is not None and is_byte(tokenizer, id)}
    invalid = [token_of.get(byte) for byte in INVALID.encode()]
    if None in invalid or tokenizer.decode(invalid, skip_special_tokens=True) != INVALID:
        return {}
    return {id: byte for byte, id in token_of.items()}


def is_byte(tokenizer, token: int) -> bool:
    """Whether a token is one byte of a SentencePiece vocabulary, such as <0xE4>."""
    piece = tokenizer.convert_ids_to_tokens(token)
    return isinstance(piece, str) and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
