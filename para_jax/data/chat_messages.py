"""The messages of a chat, checked, and the assistant's turns among them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from ..io.checks import one_of, shorten
from ..io.messages import warn

#: The roles that the messages of a request may have.
ROLES = ("system", "developer", "user", "assistant")
#: Keys with which an assistant message calls tools. It may then have no content.
CALLS = ("tool_calls", "function_call")
#: Fields of a part with text. The last two tell other servers what to cache.
TEXT_PART = ("type", "text", "cache_control", "prompt_cache_breakpoint")


def checked_messages(name: str, value: object) -> list[dict]:
    """The messages of a chat. One that calls tools, and has no content, gets an empty one."""
    if not isinstance(value, list):
        raise ValueError(f"{name} must be text or a list of messages, not {type(value).__name__}")
    messages = [checked_message(name, message) for message in value]
    return prompt_messages(messages) if name == "prompt" else messages


def checked_message(name: str, message: Any) -> dict:
    if isinstance(message, dict):  # a template may ask whether the field is there, even if it is empty
        message = {key: value for key, value in message.items() if key not in CALLS or value}
    found = message
    content = message.get("content") if isinstance(message, dict) else ""
    if content is None and any(message.get(key) for key in CALLS):
        found = message | {"content": ""}
    elif isinstance(content, list) and content and all(map(is_text_part, content)):
        found = message | {"content": joined_parts(content)}
    if not isinstance(found, dict) or not all(isinstance(found.get(k), str) for k in ("role", "content")):
        raise ValueError(f'{name}: {shorten(message)} is not a message; write {{"role": text, "content": text}}')
    warn_of_role(found["role"])
    return found


def is_text_part(part: object) -> bool:
    """Whether this is a part of a content as OpenAI writes it, with text and nothing else. Null fields don't count."""
    filled = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {}
    return filled.keys() <= set(TEXT_PART) and filled.get("type") == "text" and isinstance(filled.get("text"), str)


def joined_parts(parts: list[dict]) -> str:
    """The texts of a content's parts, as lines."""
    return "\n".join(part["text"] for part in parts)


@lru_cache(64)
def warn_of_role(role: str) -> None:
    """Warns of a role that no request to the server may have."""
    if role not in ROLES:
        warn(f"a message has the role {shorten(role)}; requests can have only {one_of(ROLES)}")


def prompt_messages(messages: list[dict]) -> list[dict]:
    if not messages:
        raise ValueError("prompt is empty: there is no message before the assistant's")
    return messages


def split_conversation(messages: list[dict]) -> list[tuple[list[dict], dict]]:
    """A conversation with k assistant turns as k pairs (everything before the turn, the turn)."""
    return [(messages[:i], turn) for i, turn in enumerate(messages) if turn["role"] == "assistant"]
