"""Answers that follow a grammar: which tokens may come next. llguidance (extra `serve`) compiles the grammar and reads
the tokens, on the host."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import numpy as np

from ..io.checks import printable, shorten

#: The kinds of a structure, as vLLM's structured_outputs has them.
GIVEN = {
    "json": "a schema, an object",
    "json_object": "true",
    "regex": "a text",
    "choice": "a list of texts",
    "grammar": "rules in Lark's syntax",
}
#: Characters of a grammar, at most.
LONGEST = 2**16
#: What a token's mask may cost, about 5 ms, and what the states of one answer's lexer may take, about 40 MB.
LIMITS: dict[str, Any] = {
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
}
#: JSON is written as json.dumps does it. Free white space would let a small model write nothing else.
STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def has_grammars() -> bool:
    return find_spec("llguidance") is not None


class Grammars:
    """Compiles structures for one tokenizer. Any thread may use it."""

    def __init__(self, tokenizer, vocab_size: int, ends: Iterable[int]):
        """
        Args:
            ends: the token ids that may end an answer.
        """
        self.tokenizer, self.vocab_size, self.ends = tokenizer, vocab_size, list(ends)

    @cached_property
    def _tokens(self):
        from llguidance.hf import from_tokenizer

        return from_tokenizer(self.tokenizer, n_vocab=self.vocab_size, eos_token=self.ends)

    def guide(self, structure: dict) -> Guide:
        """The guide of an answer with this structure. Raises ValueError that says what is wrong with it."""
        if not has_grammars():
            raise ValueError("structured_outputs needs llguidance; pip install 'para_jax[serve]'")
        from llguidance import LLMatcher, LLParserLimits

        matcher = LLMatcher(self._tokens, grammar_text(structure), log_level=0, limits=LLParserLimits(**LIMITS))
        return Guide(matcher, words_of(self.vocab_size))


class Guide:
    """What may follow the tokens of one answer."""

    def __init__(self, matcher: Any, words: int):
        self.matcher = matcher
        self.first = np.zeros(words, np.int32)
        """the tokens that the answer may begin with"""
        self._read = 0
        self.allow([], self.first)

    def copy(self) -> Guide:
        return Guide(self.matcher.deep_copy(), len(self.first))

    def allow(self, tokens: Sequence[int], mask: np.ndarray) -> None:
        """Writes which tokens may follow these into a mask, int32 [words], one bit a token. `tokens` are the answer so
        far. Raises ValueError where the grammar takes more work than LIMITS allow."""
        from llguidance.numpy import fill_next_token_bitmask

        self.matcher.consume_tokens(list(tokens[self._read :]))
        self._read = len(tokens)
        if not self.matcher.is_error():
            fill_next_token_bitmask(self.matcher, mask[None])
        if self.matcher.is_error():
            raise ValueError(f"structured_outputs: {printable(' '.join(self.matcher.get_error().split()), 300)}")

    def restart(self) -> None:
        self.matcher.reset()
        self._read = 0


def words_of(vocab_size: int) -> int:
    """The int32 numbers of a mask with one bit per token."""
    return -(-vocab_size // 32)


def grammar_text(structure: Any) -> str:
    """A structure as llguidance takes it: {"json": schema}, {"json_object": True}, {"regex": pattern},
    {"choice": texts} or {"grammar": rules in Lark's syntax}."""
    from llguidance import LLMatcher

    if not isinstance(structure, dict) or len(structure) != 1 or not structure.keys() <= GIVEN.keys():
        raise ValueError(f"structured_outputs is {shorten(structure)}; give a dict with one of {', '.join(GIVEN)}")
    ((kind, value),) = structure.items()
    if kind == "choice":
        valid = isinstance(value, list) and value and all(isinstance(one, str) and one for one in value)
    else:
        valid = value is True if kind == "json_object" else isinstance(value, dict if kind == "json" else str)
    if not valid:
        raise ValueError(f"structured_outputs: {kind} is {shorten(value)}; give {GIVEN[kind]}")
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) > LONGEST:
        raise ValueError(f"structured_outputs: {kind} has {len(text)} characters; give at most {LONGEST}")
    if kind == "regex":
        return LLMatcher.grammar_from_regex(text)
    if kind == "grammar":
        return LLMatcher.grammar_from_lark(text)
    if kind == "choice":
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(one, ensure_ascii=False) for one in value))
    schema = {"type": "object"} if kind == "json_object" else value
    try:
        return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=STYLE)  # pyright: ignore
    except ValueError as error:  # nested too deeply
        raise ValueError(f"structured_outputs: {kind}: {error}") from None
