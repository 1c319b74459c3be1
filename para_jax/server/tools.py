"""Functions that a chat may call: OpenAI's `tools`. What a forced call must be, and which calls an answer makes."""

from __future__ import annotations

import json
import re
import secrets
from typing import Any

from .protocol import ChatBody, Named

#: How the chat templates of Qwen, Hermes and SmolLM3 have calls written. Others have the JSON alone (Llama, Mistral).
OPEN, CLOSE = "<tool_call>", "</tool_call>"
CALL = re.compile(f"{OPEN}(.*?)(?:{CLOSE}|$)", re.DOTALL)


def forced_call(body: ChatBody) -> dict | None:
    """What an answer must be that has to call a function, as the engine's structured_outputs; None if it need not."""
    choice, functions = body.tool_choice, [tool.function for tool in body.tools]
    if isinstance(choice, Named):
        return {"json": {"type": "object"} | next(one.parameters for one in functions if one.name == choice.name)}
    if choice != "required":
        return None
    schemas = {f"f{i}": within({"type": "object"} | one.parameters, f"#/$defs/f{i}") for i, one in enumerate(functions)}
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": one.name}, "arguments": {"$ref": f"#/$defs/{place}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for place, one in zip(schemas, functions, strict=True)
    ]
    most = {} if body.parallel_tool_calls else {"maxItems": 1}
    return {"json": {"$defs": schemas, "type": "array", "items": {"anyOf": calls}, "minItems": 1, **most}}


def within(schema: Any, place: str) -> Any:
    """A schema as it is at a place of another one, to which its own references then point."""
    if isinstance(schema, list):
        return [within(one, place) for one in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {name: within(value, place) for name, value in schema.items()}
    if isinstance(moved.get("$ref"), str) and moved["$ref"].startswith("#"):
        moved["$ref"] = place + moved["$ref"][1:]
    return moved


def certain(text: str, body: ChatBody, begun: bool) -> int:
    """How many characters of an answer's text so far can be no part of a call.

    Args:
        begun: whether the answer has text before this one.
    """
    if body.tool_choice != "auto" or (not begun and text.lstrip()[:1] in ("", "{", "[")):
        return 0
    if OPEN in text:
        return text.index(OPEN)
    return next((len(text) - n for n in range(len(OPEN) - 1, 0, -1) if text.endswith(OPEN[:n])), len(text))


def calls_of(text: str, body: ChatBody, begun: bool = False) -> tuple[str, list[dict]]:
    """The rest of an answer's text as content and calls, in OpenAI's form. Where one of them is no call of a function
    that there is, with an object as its arguments, all stays content."""
    if isinstance(body.tool_choice, Named):
        return "", [call(body.tool_choice.name, text)]
    marked = OPEN in text
    parts = CALL.findall(text) if marked else [] if begun else [text]
    names, calls = {tool.function.name for tool in body.tools}, []
    try:
        for part in parts:
            found = json.loads(part)
            for one in found if isinstance(found, list) else [found]:
                arguments = one.get("arguments", one.get("parameters", {}))
                arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
                if one["name"] not in names or not isinstance(arguments, dict):
                    return text, []
                calls.append(call(one["name"], json.dumps(arguments, allow_nan=False)))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):  # it is something else
        return text, []
    if not calls:
        return text, []
    before = text[: text.index(OPEN)] if marked else ""
    after = CALL.sub("", text[len(before) :]).strip() if marked else ""
    return before + after, calls if body.parallel_tool_calls else calls[:1]


def call(name: str, arguments: str) -> dict:
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
