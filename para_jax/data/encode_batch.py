"""Encodes many prompts and completions at once, with the same ids as `encode_example`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..io.untrusted import require_unicode
from .chat_messages import checked_messages
from .chats import answered
from .examples import (
    Example,
    Prompt,
    adds_own_space,
    answer_alone,
    continuation_text,
    eos_token_id,
    failures,
    following,
    joined_completion,
    may_have_added,
    require_filled,
    up_to_end_token,
    up_to_eos,
    with_end,
    without_added,
    without_ends,
)

#: Conversations per request to the chat template's process.
RENDERED_AT_ONCE = 64


def encode_examples(tokenizer, pairs: Sequence[tuple[Prompt, str]]) -> list[Example]:
    """The example of each (prompt, completion). A fast tokenizer uses all cores, in a few calls for all of them.

    Raises ValueError if one of them fails; `encode_example` shows which.
    """
    for prompt, completion in pairs:
        require_filled("prompt", prompt)
        require_filled("completion", completion)
        require_unicode("prompt", prompt)
        require_unicode("completion", completion)
    pairs = [
        (prompt, up_to_eos(tokenizer, completion))
        if isinstance(prompt, str)
        else (without_ends(tokenizer, checked_messages("prompt", prompt)), answer_alone(tokenizer, completion))
        for prompt, completion in pairs
    ]
    chats = [not isinstance(prompt, str) for prompt, _ in pairs]
    rendered = iter(render_chats(tokenizer, [pair for pair, chat in zip(pairs, chats, strict=True) if chat]))
    prompts, answers = [], []
    for prompt, completion in pairs:
        if isinstance(prompt, str):
            before, answer = prompt, joined_completion(prompt, completion)
        else:
            before, answer = next(rendered)
        prompts.append(before)
        answers.append(answer)
    prompt_ids, completions = encode_pairs(tokenizer, prompts, answers, chats)
    seen: dict[int, bool | None] = {}
    end = -1 if all(chats) else eos_token_id(tokenizer)  # unused for chats, whose tokenizer may lack one
    return [
        Example(prompt, up_to_end_token(tokenizer, ids, seen) if chat else with_end(ids, end))
        for prompt, ids, chat in zip(prompt_ids, completions, chats, strict=True)
    ]


def render_chats(tokenizer, pairs: Sequence[tuple[Any, str]]) -> list[tuple[str, str]]:
    """`answered`, some conversations per request."""
    parts = (pairs[start : start + RENDERED_AT_ONCE] for start in range(0, len(pairs), RENDERED_AT_ONCE))
    return [found for part in parts for found in answered(tokenizer, part)]


def encode_pairs(
    tokenizer, prompts: list[str], answers: list[str], chats: list[bool]
) -> tuple[list[list[int]], list[list[int]]]:
    """The ids of prompts, and of the answers that follow them, as `encode_following` gives them."""
    joined = list(map(str.__add__, prompts, answers)) if adds_own_space(tokenizer) else []
    ids = encode_prompts(tokenizer, prompts + joined, chats + chats[: len(joined)])
    prompt_ids = ids[: len(prompts)]
    found = list(map(following, prompt_ids, ids[len(prompts) :])) if joined else [None] * len(prompts)
    texts = [continuation_text(tokenizer, text) for text, one in zip(answers, found, strict=True) if one is None]
    alone = iter(encode_texts(tokenizer, texts, add_special_tokens=False))
    return prompt_ids, [next(alone) if one is None else one for one in found]


def encode_prompts(tokenizer, texts: list[str], chats: list[bool]) -> list[list[int]]:
    """The ids of prompts. Chats among them are already rendered.

    Args:
        chats: which of the texts are chats.
    """
    special = iter(encode_texts(tokenizer, [text for text, chat in zip(texts, chats, strict=True) if not chat]))
    rendered = [text for text, chat in zip(texts, chats, strict=True) if chat]
    plain = iter(encode_texts(tokenizer, rendered, add_special_tokens=False))
    found = [next(plain if chat else special) for chat in chats]
    doubtful = [i for i, ids in enumerate(found) if not chats[i] and may_have_added(tokenizer, ids)]
    without = encode_texts(tokenizer, [texts[i] for i in doubtful], add_special_tokens=False)
    for i, ids in zip(doubtful, without, strict=True):
        found[i] = without_added(tokenizer, found[i], ids)
    if not all(found):
        raise ValueError("a prompt becomes no tokens")
    return found


def encode_texts(tokenizer, texts: list[str], **options: bool) -> list[list[int]]:
    if not texts:
        return []
    only_ids = dict(return_attention_mask=False, return_token_type_ids=False, verbose=False)
    with failures(f"the tokenizer fails on one of {len(texts)} texts"):
        return tokenizer(texts, **only_ids, **options)["input_ids"]
