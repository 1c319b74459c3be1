"""The messages of a chat, checked. What a message may say, and the engine does not compute, is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from ..data.chats import ROLES, TEXT_PART, is_text_part, joined_parts
from ..io.checks import shorten
from .errors import wrong_field
from .fields import Fields, Name, only, read_fields, wrong_value

NO_TOOLS = "tools are not supported; leave it out"
#: Fields of an assistant's message that no prompt has.
THOUGHTS = ("reasoning_content", "reasoning")


class Message(Fields):
    role: Annotated[Any, only(*ROLES, advice=f"give one of {', '.join(ROLES)}")]
    content: Any = None
    name: Name | None = None
    """for the chat template"""
    tool_calls: Annotated[Any, only([], advice=NO_TOOLS)] = None
    tool_call_id: Annotated[Any, only(advice=NO_TOOLS)] = None
    function_call: Annotated[Any, only(advice=NO_TOOLS)] = None
    audio: Annotated[Any, only()] = None
    refusal: Annotated[Any, only()] = None
    annotations: Annotated[Any, only([])] = None
    type: Literal["text"] | None = None  # lm-eval up to 0.4.9 sends it


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
    if value.get("role") == "assistant":
        value = {name: value[name] for name in value if name not in THOUGHTS}
    message = read_fields(Message, value, at)
    made = {"role": message.role, "content": read_content(message.content, f"{at}.content")}
    return made if message.name is None else made | {"name": message.name}


def read_content(content: object, at: str) -> str:
    """A text, or the texts of a list of parts as lines."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise wrong_value(at, content, "give a text")
    for i, part in enumerate(content):
        if is_text_part(part):
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            shown = part if kind in (None, "text") else kind
            raise wrong_value(f"{at}[{i}]", shown, 'only parts {"type": "text", "text": ...} are supported')
        others = [name for name, value in part.items() if name not in TEXT_PART and value is not None]
        message = f"{at}[{i}] has a field {shorten(others[0])}; only type and text are supported"
        raise wrong_field(f"{at}[{i}]", message)
    return joined_parts(content)
