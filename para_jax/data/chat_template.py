"""Renders chats with a tokenizer's chat template, in transformers' sandboxed Jinja environment.

A template is a program that came with the backbone. It can't reach Python or files, but nothing bounds its time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import date, datetime, time
from typing import Any

from ..config import Variables
from ..io.checks import printable, shorten


class TemplateError(ValueError):
    """The template refused the conversation, or failed."""


def render_template(template: str, messages: list[dict], /, **variables: Any) -> str:
    """The messages as transformers renders them with the template. Several threads may call this at once.

    OpenAI writes the arguments of tool calls as JSON text. Most templates take an object and write its JSON, so a text
    would be encoded twice. Those that take a text fail with an object, and get the text.

    Args:
        variables: what else the template may read, and transformers' `continue_final_message`.
    """
    messages = [{name: value for name, value in message.items() if value is not None} for message in messages]
    parsed = [with_parsed_calls(message) for message in messages]
    if parsed != messages:
        with suppress(TemplateError):
            return rendered(template, parsed, variables)
    return rendered(template, messages, variables)


def rendered(template: str, messages: list[dict], variables: dict[str, Any]) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        (text,), _ = render_jinja_template([messages], chat_template=template, **variables)
    except Exception as error:  # of any kind: it is the template's
        kind = "" if type(error) is ValueError or type(error).__module__.startswith("jinja2") else type(error).__name__
        raise TemplateError(printable(": ".join(filter(None, (kind, str(error)))) or "it failed", 300)) from None
    return text


def with_parsed_calls(message: dict) -> dict:
    """The message with the arguments of its tool calls as objects."""
    calls = message.get("tool_calls")
    return message | {"tool_calls": list(map(with_parsed_arguments, calls))} if isinstance(calls, list) else message


def with_parsed_arguments(call: Any) -> Any:
    """The call with its arguments as an object, if they are the JSON text of one."""
    function = call.get("function") if isinstance(call, dict) else None
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        with suppress(ValueError, RecursionError):
            if isinstance(arguments := json.loads(function["arguments"]), dict):
                return call | {"function": function | {"arguments": arguments}}
    return call


def with_variables(template: str, variables: Variables) -> str:
    """The template with values for variables that the caller of the renderer does not give."""
    values = {name: json.dumps(value, ensure_ascii=False) for name, value in variables.items()}
    values |= {name: "none" for name, value in variables.items() if value is None}
    given = (f"{{% if {n} is not defined %}}{{% set {n} = {v} %}}{{% endif %}}" for n, v in values.items())
    return "".join(given) + "{{ '' }}" + template  # a newline after a block would be dropped


def with_date(template: str, day: date) -> str:
    """The template with `day` in place of the date and the time at which it is rendered, which strftime_now gives."""
    moment = datetime.combine(day, time())
    found = sorted(set(re.findall(r"(?<!\{)%-?[a-zA-Z%]", template)), reverse=True)  # %% is last
    replaced = "".join(f" | replace({json.dumps(one)}, {json.dumps(moment.strftime(one))})" for one in found)
    macro = f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}"
    return macro + "{{ '' }}" + template  # as in with_variables


def default_template(tokenizer) -> str:
    """The tokenizer's chat template; of several with names, the one named default. Raises ValueError if none is."""
    named = tokenizer.chat_template
    if isinstance(named, dict) and "default" not in named:
        names = shorten(", ".join(map(str, named)))
        raise ValueError(
            f"the tokenizer has chat templates named {names}, and none is the default\nput the one to use into "
            "the tokenizer's folder as chat_template.jinja"
        )
    return tokenizer.get_chat_template()


def writes_date(tokenizer) -> bool:
    """Whether the tokenizer's chat template may write the current date, as those of Llama 3.2 and SmolLM3 do."""
    return "strftime" in str(tokenizer.chat_template)


@contextmanager
def fixed_date(tokenizer, day: str) -> Iterator[None]:
    """Meanwhile, the tokenizer's chat template writes this day, YYYY-MM-DD, as the date."""
    template = tokenizer.chat_template
    tokenizer.chat_template = with_date(default_template(tokenizer), date.fromisoformat(day))
    try:
        yield
    finally:
        tokenizer.chat_template = template
