"""Variables of a tokenizer's chat template, such as {"enable_thinking": false}: what a config, a command line or a
request gives, checked."""

import json
import math
import re
from typing import Any

from ..io.checks import require, shorten, without_repeats

#: What transformers' renderer and Jinja take under these names is no variable of the template, or is ours to give.
TAKEN = {
    "messages", "conversations", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "return_assistant_tokens_mask", "self",
}  # fmt: skip
MAX_VARIABLES, MAX_TEXT = 20, 1000
Variables = dict[str, bool | int | float | str | None]


def template_variables(name: str, given: Any) -> Variables:
    """The variables of a chat template, from a mapping or the JSON text of one. None has none.

    Args:
        name: what an error calls them.

    Raises ValueError for anything but a mapping of names to truth values, numbers, short texts and null, and for a name
    that transformers or para_jax gives itself, such as messages.
    """
    if given is None:
        return {}
    found = parsed(given) if isinstance(given, str) else given
    if not isinstance(found, dict):
        raise ValueError(f'{name} must be a JSON object, such as {{"enable_thinking": false}}; got {shorten(given)}')
    require(len(found) <= MAX_VARIABLES, name, given, f"an object of at most {MAX_VARIABLES} variables")
    for variable, value in found.items():
        plain = isinstance(variable, str) and re.fullmatch(r"[A-Za-z_]\w{0,99}", variable, re.ASCII)
        if not plain or variable in TAKEN:
            raise ValueError(f"{name}: {shorten(variable)} can't be set; give variables of the chat template")
        if not is_scalar(value):
            advice = f"give true, false, null, a number, or a text of at most {MAX_TEXT} characters"
            raise ValueError(f"{name}: {variable} is {shorten(value)}; {advice}")
    return found


def parsed(text: str) -> Any:
    """The value of a JSON text; None if it is none."""
    try:
        return json.loads(text, object_pairs_hook=without_repeats)
    except (ValueError, RecursionError):
        return None


def is_scalar(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= MAX_TEXT
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or (isinstance(value, int) and abs(value) < 2**63)
