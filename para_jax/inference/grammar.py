"""Answers that follow a grammar: which tokens may come next. llguidance (extra `serve`) compiles the grammar and reads
the tokens, on the host. Its work for a grammar of a stranger is bounded here."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from importlib.util import find_spec
from threading import Lock
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
#: Characters, at most. Patterns may need time that grows much faster than they do.
LONGEST = {"json": 2**16, "choice": 2**16, "regex": 2000, "grammar": 2**13}
#: Patterns in a schema, which may have to hold together. 14 take milliseconds, 20 take seconds.
MOST_PATTERNS = 10
#: What a token's mask may cost, about 5 ms, and what the states of one answer's lexer may take, about 40 MB.
LIMITS: dict[str, Any] = {
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
#: JSON is written as json.dumps does it. Free white space would let a small model write nothing else.
STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
#: Compiled grammars that are kept.
KEPT = 8


def has_grammars() -> bool:
    return find_spec("llguidance") is not None


class Grammars:
    """Compiles structures for one tokenizer. Any thread may use it."""

    def __init__(self, tokenizer, vocab_size: int, ends: Iterable[int]):
        """
        Args:
            ends: the token ids that may end an answer.
        """
        self.tokenizer, self.words, self.ends = tokenizer, words_of(vocab_size), tuple(ends)
        self._size = max(vocab_size, len(tokenizer))
        self._lock = Lock()
        self._kept: OrderedDict[str, Guide] = OrderedDict()

    def prepare(self) -> None:
        """Reads the tokenizer's tokens, which takes a second or two. If llguidance can't, `guide` says so."""
        if has_grammars():
            with self._lock, suppress(ValueError):
                _ = self._tokens

    @cached_property
    def _tokens(self):
        from llguidance.hf import from_tokenizer

        return from_tokenizer(self.tokenizer, n_vocab=self._size, eos_token=list(self.ends))

    def guide(self, structure: dict) -> Guide:
        """The guide of an answer with this structure. Raises ValueError that says what is wrong with it."""
        if not has_grammars():
            raise ValueError("structured_outputs needs llguidance; pip install 'para_jax[serve]'")
        from llguidance import LLMatcher, LLParserLimits

        text = grammar_text(structure)
        with self._lock:
            if text not in self._kept:
                try:
                    matcher = LLMatcher(self._tokens, text, log_level=0, limits=LLParserLimits(**LIMITS))
                except ValueError as error:  # of a tokenizer that llguidance can't read
                    raise wrong(str(error)) from None
                self._kept[text] = Guide(matcher, self.words, words_of(self._size))
                if len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(text)
            return self._kept[text].copy()


class Guide:
    """What may follow the tokens of one answer."""

    def __init__(self, matcher: Any, words: int, tokenizer_words: int):
        """
        Args:
            words, tokenizer_words: of the model's masks, and of the tokenizer's, which may have more tokens.
        """
        self.matcher, self._read = matcher, 0
        self._mask = np.zeros((1, tokenizer_words), np.int32)
        self.first = np.zeros(words, np.int32)
        """the tokens that the answer may begin with"""
        self.allow([], self.first)

    def copy(self) -> Guide:
        return Guide(self.matcher.deep_copy(), len(self.first), self._mask.size)

    def allow(self, tokens: Sequence[int], mask: np.ndarray) -> None:
        """Writes which tokens may follow these into a mask, int32 [words], one bit a token. `tokens` are the answer so
        far, without one that ends it. Raises ValueError where the grammar takes more work than LIMITS allow."""
        from llguidance.numpy import fill_next_token_bitmask

        self.matcher.consume_tokens(list(tokens[self._read :]))
        self._read = len(tokens)
        if not self.matcher.is_error():
            fill_next_token_bitmask(self.matcher, self._mask)
        if self.matcher.is_error():
            raise wrong(self.matcher.get_error())
        mask[:] = self._mask[0, : len(mask)]

    def restart(self) -> None:
        self.matcher.reset()
        self._read = 0


def wrong(message: str) -> ValueError:
    return ValueError(f"structured_outputs: {printable(' '.join(message.split()), 300)}")


def words_of(vocab_size: int) -> int:
    """The int32 numbers of a mask with one bit per token."""
    return -(-vocab_size // 32)


def grammar_text(structure: Any) -> str:
    """A structure as llguidance takes it: {"json": schema}, {"json_object": True}, {"regex": pattern},
    {"choice": texts} or {"grammar": rules in Lark's syntax}."""
    from llguidance import LLMatcher

    given = structure if isinstance(structure, dict) else {}
    given = {kind: value for kind, value in given.items() if value is not None}
    if len(given) != 1 or not given.keys() <= GIVEN.keys():
        raise ValueError(f"structured_outputs is {shorten(structure)}; give a dict with one of {', '.join(GIVEN)}")
    ((kind, value),) = given.items()
    if kind == "choice":
        valid = isinstance(value, list) and value and all(isinstance(one, str) and one for one in value)
    else:
        valid = value is True if kind == "json_object" else isinstance(value, dict if kind == "json" else str)
    if not valid:
        raise ValueError(f"structured_outputs: {kind} is {shorten(value)}; give {GIVEN[kind]}")
    if kind == "json_object":
        kind, value = "json", {"type": "object"}
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if len(text.encode()) > LONGEST[kind]:
            raise ValueError(f"{kind} has {len(text)} characters; give at most {LONGEST[kind]}")
        if kind == "regex":
            return LLMatcher.grammar_from_regex(text)
        if kind == "grammar":
            if re.search("[&~]", re.sub(r'"(\\.|[^"\\\n])*"|/(\\.|[^/\\\n])*/', "", text)):
                raise ValueError("grammar: & and ~ are not supported; write alternatives")
            return LLMatcher.grammar_from_lark(text)
        if kind == "choice":
            texts = " | ".join(json.dumps(one, ensure_ascii=False) for one in value)
            return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {texts}")
        patterns = patterns_of(value)  # pyright: ignore[reportArgumentType]
        if len(patterns) > MOST_PATTERNS or sum(map(len, patterns)) > LONGEST["regex"]:
            most = f"at most {MOST_PATTERNS}, of {LONGEST['regex']} characters in all"
            raise ValueError(f"json has {len(patterns)} patterns; give {most}")
        return LLMatcher.grammar_from_json_schema(text, overrides=STYLE)
    except (ValueError, RecursionError) as error:  # also JSON that is nested too deeply, or no Unicode
        raise wrong(str(error)) from None


def patterns_of(schema: dict) -> list[str]:
    """The regular expressions in a JSON schema."""
    found, left = [], [schema]
    while left:
        node: Any = left.pop()
        if isinstance(node, dict):
            found += [node["pattern"]] if isinstance(node.get("pattern"), str) else []
            found += node["patternProperties"] if isinstance(node.get("patternProperties"), dict) else []
            left += node.values()
        elif isinstance(node, list):
            left += node
    return found
