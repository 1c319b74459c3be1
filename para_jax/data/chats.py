"""Chats: their messages, checked, and the texts that the tokenizer's chat template makes of them.

A template is a program that came with the backbone. It runs in transformers' sandboxed Jinja environment, so it can't
reach Python or files, but nothing bounds its time.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import date, datetime, time
from typing import Any

from ..config import Variables
from ..io.checks import printable, shorten

#: The roles that the messages of a request may have.
ROLES = ("system", "developer", "user", "assistant")
#: Keys with which an assistant message calls tools. It may then have no content.
CALLS = ("tool_calls", "function_call")
#: Fields of a part with text. The last two tell other servers what to cache.
TEXT_PART = ("type", "text", "cache_control", "prompt_cache_breakpoint")
#: How a model that reasons marks its thought.
THOUGHT, END_OF_THOUGHT = "<think>", "</think>"


class TemplateError(ValueError):
    """The template refused the conversation, or failed."""


# ------------------------------------------------------------------------------------------------------------ messages


def checked_messages(name: str, value: object) -> list[dict]:
    """The messages of a chat. One that calls tools, and has no content, gets an empty one."""
    if not isinstance(value, list):
        raise ValueError(f"{name} must be text or a list of messages, not {type(value).__name__}")
    if name == "prompt" and not value:
        raise ValueError("prompt is empty: there is no message before the assistant's")
    return [checked_message(name, message) for message in value]


def checked_message(name: str, message: Any) -> dict:
    if isinstance(message, dict):
        # a template may ask whether the field is there, even if it is empty
        found = {key: value for key, value in message.items() if key not in CALLS or value}
        content = found.get("content")
        if content is None and any(key in found for key in CALLS):
            found["content"] = ""
        elif isinstance(content, list) and content and all(map(is_text_part, content)):
            found["content"] = joined_parts(content)
        if isinstance(found.get("role"), str) and isinstance(found.get("content"), str):
            return found
    raise ValueError(f'{name}: {shorten(message)} is not a message; write {{"role": text, "content": text}}')


def is_text_part(part: object) -> bool:
    """Whether this is a part of a content as OpenAI writes it, with text and nothing else. Null fields don't count."""
    filled = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {}
    return filled.keys() <= set(TEXT_PART) and filled.get("type") == "text" and isinstance(filled.get("text"), str)


def joined_parts(parts: list[dict]) -> str:
    """The texts of a content's parts, as lines."""
    return "\n".join(part["text"] for part in parts)


def without_system(messages: list[dict]) -> list[dict]:
    return [message for message in messages if message["role"] not in ("system", "developer")]


# ----------------------------------------------------------------------------------------------------------- rendering


def render(tokenizer, messages: list[dict], /, **options: Any) -> str:
    """The conversation as the tokenizer's chat template renders it, including its BOS. The template gets all keys of a
    message: it may read more than role and content, such as tool_calls.

    Args:
        options: add_generation_prompt and continue_final_message, as in transformers' apply_chat_template, and
            variables of the template.

    Raises TemplateError, a ValueError, if the template fails.
    """
    template = tokenizer.get_chat_template()
    if "developer" not in template:  # it would leave such a message out; OpenAI's models treat the two roles alike
        messages = [m | {"role": "system"} if m.get("role") == "developer" else m for m in messages]
    try:
        return render_template(template, messages, **{**tokenizer.special_tokens_map, **options})
    except TemplateError as error:
        raise TemplateError(f"the tokenizer's chat template fails on {shorten(messages)}: {error}") from None


def render_template(template: str, messages: list[dict], /, **variables: Any) -> str:
    """The messages as transformers renders them with the template. Several threads may call this at once.

    OpenAI writes the arguments of tool calls as JSON text. Most templates take an object and write its JSON, so a text
    would be encoded twice. Those that take a text fail with an object, and get the text.
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


# ------------------------------------------------------------------------------------------------------ answers' turns


def answered(tokenizer, messages: list[dict], answer: str) -> tuple[str, str]:
    """The conversation up to its answer, and the answer's turn, as the chat template renders them. The turn is what the
    conversation with the answer adds to the one before it.

    Some of Mistral's templates write the system message into the last message, and leave it out if that is the
    assistant's. The turn is then that of the conversation without it, if both prompts end with the user's message and
    the same text after it.
    """
    prompt, complete = before, whole = with_and_without(tokenizer, messages, answer)
    rest = without_system(messages)
    if not whole.startswith(before) and 0 < len(rest) < len(messages):
        with suppress(TemplateError):
            other, complete_other = with_and_without(tokenizer, rest, answer)
            content, end = rest[-1]["content"].strip(), common_end(before, other)
            if content in end and len(content) < len(end):
                prompt, complete = other, complete_other
    if not complete.startswith(prompt) or len(complete) == len(prompt):
        raise ValueError(
            "the tokenizer's chat template renders an assistant turn that does not start with its generation prompt "
            f"({shorten(prompt[-40:])} is not in {shorten(complete[max(0, len(prompt) - 40) :])}); use another template"
        )
    return before, complete[len(prompt) :]


def with_and_without(tokenizer, messages: list[dict], answer: str) -> tuple[str, str]:
    """The conversation up to its answer, and with it."""
    before = render(tokenizer, messages, add_generation_prompt=True)
    whole = render(tokenizer, [*messages, {"role": "assistant", "content": answer}], add_generation_prompt=False)
    return before, with_thought(before, whole, answer)


def with_thought(before: str, whole: str, answer: str) -> str:
    """The whole conversation, with a thought in the answer if the generation prompt begins one.

    The templates of DeepSeek-R1 and QwQ end the generation prompt with <think> and leave thoughts out of answers, so an
    answer would not start with its generation prompt. The answer's own thought is put back, or else an empty one.
    """
    head, opened, rest = before.rpartition(THOUGHT)
    if not opened or rest.strip() or whole.startswith(before) or not whole.startswith(head):  # no thought begins there
        return whole
    thought = answer.rpartition(END_OF_THOUGHT)[0].strip().removeprefix(THOUGHT).strip()
    shown = whole[len(head) :].rpartition(END_OF_THOUGHT)[2].lstrip()
    return f"{before}{thought}\n{END_OF_THOUGHT}\n\n{shown}"


def common_end(one: str, other: str) -> str:
    """The longest text with which both end."""
    return os.path.commonprefix([one[::-1], other[::-1]])[::-1]


# ------------------------------------------------------------------------------------------------------ the template


def with_variables(template: str, variables: Variables) -> str:
    """The template with values for variables that the caller of the renderer does not give."""
    values = {name: json.dumps(value, ensure_ascii=False) for name, value in variables.items()}
    values |= {name: "none" for name, value in variables.items() if value is None}
    defaults = (f"{{% if {n} is not defined %}}{{% set {n} = {v} %}}{{% endif %}}" for n, v in values.items())
    return "".join(defaults) + "{{ '' }}" + template  # a newline after a block would be dropped


def with_date(template: str, day: date) -> str:
    """The template with `day` in place of the date and the time at which it is rendered, which strftime_now gives."""
    moment = datetime.combine(day, time())
    codes = sorted(set(re.findall(r"(?<!\{)%-?[a-zA-Z%]", template)), reverse=True)  # %% is last
    replaced = "".join(f" | replace({json.dumps(code)}, {json.dumps(moment.strftime(code))})" for code in codes)
    macro = f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}"
    return macro + "{{ '' }}" + template  # as in with_variables


def writes_date(tokenizer) -> bool:
    """Whether the tokenizer's chat template may write the current date, as those of Llama 3.2 and SmolLM3 do."""
    return "strftime" in str(tokenizer.chat_template)


@contextmanager
def fixed_date(tokenizer, day: str) -> Iterator[None]:
    """Meanwhile, the tokenizer's chat template writes this day, YYYY-MM-DD, as the date."""
    template = tokenizer.chat_template
    tokenizer.chat_template = with_date(tokenizer.get_chat_template(), date.fromisoformat(day))
    try:
        yield
    finally:
        tokenizer.chat_template = template
