"""Conversations as the tokenizer's chat template renders them, and which part of the text is the answer's turn."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ..io.checks import shorten
from ..io.untrusted import require_unicode
from .chat_template import TemplateError, default_template, render_template


def render(tokenizer, messages: list[dict], **options: bool) -> str:
    """The conversation as the tokenizer's chat template renders it, including its BOS. The template gets all keys of a
    message: it may read more than role and content, such as tool_calls.

    Args:
        options: add_generation_prompt and continue_final_message, as in transformers' apply_chat_template.

    Raises TemplateError, a ValueError, if the template fails.
    """
    return render_all(tokenizer, [(messages, options)])[0]


def render_all(tokenizer, conversations: Sequence[tuple[list[dict], dict[str, Any]]]) -> list[str]:
    """`render` for each (messages, options). If one fails, all do."""
    if not conversations:
        return []
    if not tokenizer.chat_template:
        raise ValueError(
            "prompt is a list of messages, but the tokenizer has no chat template\npass text, or put "
            "chat_template.jinja into the tokenizer's folder (one in an adapter's folder is not read)"
        )
    tokens = tokenizer.special_tokens_map
    template = default_template(tokenizer)
    texts = []
    for messages, options in conversations:
        try:
            texts.append(render_template(template, with_known_roles(template, messages), **{**tokens, **options}))
        except TemplateError as error:
            raise TemplateError(f"the tokenizer's chat template fails on {shorten(messages)}: {error}") from None
    require_unicode("the tokenizer's chat template", texts)
    return texts


def with_known_roles(template: str, messages: list[dict]) -> list[dict]:
    """The messages, with the role system in place of developer if the template does not know the latter. It would leave
    such a message out, or write a role that the model has never seen. OpenAI's models treat the two alike."""
    if "developer" in template:
        return messages
    return [message | {"role": "system"} if message.get("role") == "developer" else message for message in messages]


#: How a model that reasons marks its thought.
THOUGHT, END_OF_THOUGHT = "<think>", "</think>"


def answered(tokenizer, pairs: Sequence[tuple[list[dict], str]]) -> list[tuple[str, str]]:
    """Each conversation up to its answer, and the answer's turn, as the chat template renders them. The turn is what
    the conversation with the answer adds to the one before it.

    Some of Mistral's templates write the system message into the last message, and leave it out if that is the
    assistant's. The turn is then that of the conversation without it, if both prompts end with the user's message and
    the same text after it.
    """
    found = with_and_without_answer(tokenizer, pairs)
    moved = {i: without_system(pairs[i][0]) for i, (before, whole) in enumerate(found) if not whole.startswith(before)}
    moved = {i: rest for i, rest in moved.items() if rest and len(rest) < len(pairs[i][0])}
    turns = dict(enumerate(found))
    with suppress(TemplateError):
        plain = with_and_without_answer(tokenizer, [(rest, pairs[i][1]) for i, rest in moved.items()])
        for (i, rest), parts in zip(moved.items(), plain, strict=True):
            content, end = rest[-1]["content"].strip(), common_end(found[i][0], parts[0])
            if content in end and len(content) < len(end):
                turns[i] = parts
    return [(before, turn_between(*turns[i])) for i, (before, _) in enumerate(found)]


def with_and_without_answer(tokenizer, pairs: Sequence[tuple[list[dict], str]]) -> list[tuple[str, str]]:
    """Each conversation up to its answer, and with it, as the chat template renders them."""
    given: list[tuple[list[dict], dict[str, bool]]] = []
    for prompt, completion in pairs:
        given.append((prompt, dict(add_generation_prompt=True)))
        whole = [*prompt, {"role": "assistant", "content": completion}]
        given.append((whole, dict(add_generation_prompt=False)))
    texts = render_all(tokenizer, given)
    turns = zip(texts[::2], texts[1::2], pairs, strict=True)
    return [(before, with_thought(before, whole, completion)) for before, whole, (_, completion) in turns]


def with_thought(before: str, whole: str, completion: str) -> str:
    """The whole conversation, with a thought in the answer if the generation prompt begins one.

    The templates of DeepSeek-R1 and QwQ end the generation prompt with <think> and leave thoughts out of answers, so an
    answer would not start with its generation prompt. The completion's own thought is put back, or else an empty one.
    """
    head, opened, rest = before.rpartition(THOUGHT)
    if not opened or rest.strip() or whole.startswith(before) or not whole.startswith(head):
        return whole
    thought = completion.rpartition(END_OF_THOUGHT)[0].strip().removeprefix(THOUGHT).strip()
    answer = whole[len(head) :].rpartition(END_OF_THOUGHT)[2].lstrip()
    return f"{before}{thought}\n{END_OF_THOUGHT}\n\n{answer}"


def without_system(messages: list[dict]) -> list[dict]:
    return [message for message in messages if message["role"] not in ("system", "developer")]


def common_end(one: str, other: str) -> str:
    """The longest text with which both end."""
    return os.path.commonprefix([one[::-1], other[::-1]])[::-1]


def turn_between(before: str, whole: str) -> str:
    """The assistant turn: what the rendered conversation adds to the one before it."""
    if not whole.startswith(before) or len(whole) == len(before):
        raise ValueError(
            "the tokenizer's chat template renders an assistant turn that does not start with its generation prompt "
            f"({shorten(before[-40:])} is not in {shorten(whole[max(0, len(before) - 40) :])}); use another template"
        )
    return whole[len(before) :]
