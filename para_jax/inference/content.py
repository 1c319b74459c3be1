"""What an answer depends on in addition to its request and the backbone: this version, and how tokens become text. Jobs
and evaluation put both into the keys of kept answers, with a hash of the backbone (backbone/content.py)."""

from __future__ import annotations

import hashlib
import json

#: Part of every kept answer's key. Raise it when a change of para_jax changes the answers to the same questions.
ANSWERS_VERSION = 1


def writing_content(tokenizer, stop_ids: tuple[int, ...]) -> str:
    """A hash of the tokenizer and of the tokens that end an answer. The chat template is not part of it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # a tokenizer written in plain Python lacks one
    made = json.loads(backend.to_str()) if backend is not None else {"vocab": tokenizer.get_vocab()}
    made |= {"truncation": None, "padding": None}  # left over from the last call
    special = sorted(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return hashlib.sha256(json.dumps([made, special, stop_ids]).encode()).hexdigest()
