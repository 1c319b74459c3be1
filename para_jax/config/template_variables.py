"""Variables of a tokenizer's chat template, such as {"enable_thinking": false}: what a config, a command line or a
request gives, checked."""

import json
from typing import Any

from ..io.checks import shorten

#: What transformers' renderer and Jinja take under these names is no variable of the template, or is ours to give.
TAKEN = {
    "messages", "conversations", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "return_assistant_tokens_mask", "self",
}  # fmt: skip
Variables = dict[str, bool | int | float | str | None]


def template_variables(name: str, given: Any) -> Variables:
    """The variables of a chat template, from a mapping or the JSON text of one. None has none.

    Args:
        name: what an error calls them.

    Raises ValueError for anything but a mapping of names to truth values, numbers, texts and null, and for a name that
    transformers or para_jax gives itself, such as messages.
    """
    try:
        variables = json.loads(given) if isinstance(given, str) else {} if given is None else given
    except (ValueError, RecursionError):
        variables = None
    if not isinstance(variables, dict):
        raise ValueError(f'{name} must be a JSON object, such as {{"enable_thinking": false}}; got {shorten(given)}')
    for variable, value in variables.items():
        is_name = str(variable).isidentifier() and variable not in TAKEN
        if not is_name or not isinstance(value, bool | int | float | str | None):
            raise ValueError(
                f"{name}: {shorten(variable)} can't be {shorten(value)}; give variables of the chat template with "
                "true, false, null, a number or a text"
            )
    return variables
