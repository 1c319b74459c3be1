"""Functions that a chat may call: OpenAI's `tools`. What a forced call must be, and which calls an answer makes."""

from __future__ import annotations

import json
import re
import secrets
from typing import Any

from .protocol import ChatBody, FunctionName

#: How the chat templates of Qwen, Hermes and SmolLM3 have calls written. Others have the JSON alone (Llama, Mistral).
OPEN, CLOSE = "<tool_call>", "</tool_call>"


def forced_call(body: ChatBody) -> dict | None:
    """What an answer must be that has to call a function, as the engine's structured_outputs; None if it need not."""
    choice, functions = body.tool_choice, [tool.function for tool in body.tools]
    if isinstance(choice, FunctionName):
        return {"json": next(one.parameters for one in functions if one.name == choice)}
    if choice != "required":
        return None
    calls: list[dict] = [
        {
            "type": "object",
            "properties": {"name": {"const": one.name}, "arguments": one.parameters},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for one in functions
    ]
    most = {} if body.parallel_tool_calls else {"maxItems": 1}
    return {"json": {"type": "array", "items": {"anyOf": calls}, "minItems": 1, **most}}


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


def calls_of(text: str, body: ChatBody) -> tuple[str, list[dict]]:
    """The rest of an answer's text as content and calls, in OpenAI's form. What is no call of a function that there is
    stays content."""
    if isinstance(body.tool_choice, FunctionName):
        return "", [call(body.tool_choice, text)]
    content, opening, after = text.partition(OPEN)
    parts = re.findall(f"{OPEN}(.*?)(?:{CLOSE}|$)", opening + after, re.DOTALL) if opening else [text]
    names, calls = {tool.function.name for tool in body.tools}, []
    for part in parts:
        try:
            found = json.loads(part)
        except (ValueError, RecursionError):
            return text, []
        for one in found if isinstance(found, list) else [found]:
            if not isinstance(one, dict) or one.get("name") not in names:
                return text, []
            calls.append(call(one["name"], one.get("arguments", one.get("parameters", {}))))
    return content if opening else "", calls if body.parallel_tool_calls else calls[:1]


def call(name: str, arguments: Any) -> dict:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": str(name), "arguments": text},
    }
