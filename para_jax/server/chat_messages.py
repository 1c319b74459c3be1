"""The messages of a chat, checked. What a message may say, and the engine does not compute, is refused by name."""

from __future__ import annotations

from ..config import shorten
from ..data.chat_messages import ROLES, TEXT_PART, is_text_part, joined_parts
from .errors import wrong_field
from .fields import Fields

NO_TOOLS = "tools are not supported; leave it out"
NOT_COMPUTED = "it is not supported; leave it out"
MAX_NAME = 1000
#: Fields of a message other than its role and content. The chat template gets a name.
NOT_IN_MESSAGES: dict[str, tuple[tuple, str]] = {
    "tool_calls": (([],), NO_TOOLS),
    "tool_call_id": ((), NO_TOOLS),
    "function_call": ((), NO_TOOLS),
    "audio": ((), NOT_COMPUTED),
    "refusal": ((), NOT_COMPUTED),
    "annotations": (([],), NOT_COMPUTED),
    "type": (("text",), NOT_COMPUTED),  # lm-eval up to 0.4.9 sends it
}
#: Fields of an assistant's message that no prompt has.
THOUGHTS = ("reasoning_content", "reasoning")


def read_messages(value: object) -> list[dict]:
    """The messages of a chat, for the tokenizer's chat template."""
    if not isinstance(value, list) or not value:
        found = "missing or empty" if value in (None, "", []) else shorten(value)
        advice = "give a list of messages. A prompt goes to /v1/completions"
        raise wrong_field("messages", f"messages is {found}; {advice}")
    return [read_message(message, f"messages[{i}]") for i, message in enumerate(value)]


def read_message(value: object, at: str) -> dict:
    if not isinstance(value, dict):
        raise wrong_field(at, f'{at} is not an object; give {{"role": ..., "content": ...}}')
    fields = Fields(value, at)
    role = fields.take("role")
    if role not in ROLES:
        fields.refuse("role", role, f"give one of {', '.join(ROLES)}")
    message = {"role": role, "content": read_content(fields, at)}
    name = fields.text("name", MAX_NAME)
    for thought in THOUGHTS if role == "assistant" else ():
        fields.take(thought)
    fields.require_inert(NOT_IN_MESSAGES)
    fields.require_none_left(["role", "content", "name"])
    return message if name is None else message | {"name": name}


def read_content(fields: Fields, at: str) -> str:
    """A text, or the texts of a list of parts as lines."""
    content = fields.take("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        fields.refuse("content", content, "give a text")
    for i, part in enumerate(content):
        if is_text_part(part):
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            shown = part if kind in (None, "text") else kind
            fields.refuse(f"content[{i}]", shown, 'only parts {"type": "text", "text": ...} are supported')
        others = [name for name, value in part.items() if name not in TEXT_PART and value is not None]
        place = f"{at}.content[{i}]"
        raise wrong_field(place, f"{place} has a field {shorten(others[0])}; only type and text are supported")
    return joined_parts(content)
