"""The process that renders chat templates for chat_template.py. It reads one JSON request per line, and writes one JSON
answer per line.

It runs as a script and imports nothing from para_jax.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

#: Bytes that templates may use, besides what Python and transformers use.
MEMORY = 2**29


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # nothing else that is printed may look like an answer
    about_torch = "PyTorch was not found"  # templates need none
    logging.getLogger("transformers").addFilter(lambda record: not record.getMessage().startswith(about_torch))
    from transformers.utils.chat_template_utils import render_jinja_template

    limit_memory()
    unblock_time_limit()
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line), render_jinja_template)) + "\n")
        answers.flush()


def answer(request: dict, render: Callable) -> dict:
    """{"texts": [...]} or {"error": ...}."""
    seconds, most = request["bounds"]
    texts = []
    try:
        for messages, variables in request["conversations"]:
            limit_time(seconds)
            text = render_chat(messages, render, {"chat_template": request["template"]} | variables)
            if len(text) > most:
                raise ValueError(f"it writes {len(text)} characters, more than {most}")
            texts.append(text)
        return {"texts": texts}
    except BaseException as error:  # RecursionError and MemoryError too: the template caused it
        own = type(error) is ValueError or type(error).__module__.startswith("jinja2")
        said = [str(error)[:1000]] if own else [type(error).__name__, str(error)[:1000]]
        return {"error": ": ".join(filter(None, said)) or type(error).__name__}
    finally:
        limit_time(0)


def render_chat(messages: list[dict], render: Callable, options: dict) -> str:
    """The text of a chat. OpenAI writes the arguments of tool calls as JSON text. Most templates take an object and
    write its JSON, so a text would be encoded twice. Templates that take a text fail with an object, or write it as
    Python does."""
    objects: list[dict] = []
    parsed = [with_parsed_calls(message, objects) for message in messages]
    if objects:
        with suppress(Exception):
            (text,), _ = render([parsed], **options)
            if not any(is_pythons(one, text, messages) for one in objects):
                return text
    (text,), _ = render([messages], **options)
    return text


def is_pythons(found: dict, text: str, messages: list[dict]) -> bool:
    """Whether a text has an object as Python writes it, and the messages' contents do not."""
    written = str(found)
    of_messages = any(written in str(message.get("content")) for message in messages)
    return written in text and not of_messages and written != json.dumps(found, ensure_ascii=False)


def with_parsed_calls(message: dict, found: list[dict]) -> dict:
    """The message with the arguments of its calls as objects, which are also added to `found`."""
    if not isinstance(calls := message.get("tool_calls"), list):
        return message
    return message | {"tool_calls": [with_parsed_arguments(call, found) for call in calls]}


def with_parsed_arguments(call: Any, found: list[dict]) -> Any:
    """The call with its arguments as an object, if they are the JSON text of one."""
    function = call.get("function") if isinstance(call, dict) else None
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        with suppress(ValueError, RecursionError):
            if isinstance(parsed := json.loads(function["arguments"], object_pairs_hook=without_repeats), dict):
                found.append(parsed)
                return call | {"function": function | {"arguments": parsed}}
    return call


def without_repeats(pairs: list[tuple[str, Any]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def limit_time(seconds: float) -> None:
    """Ends the process after this many seconds of processor time; 0 means never. Windows has no such limit."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def unblock_time_limit() -> None:
    """Lets the signal from limit_time end this process. A parent that loaded libtpu ignores or blocks the signal, and a
    new process inherits that."""
    if hasattr(signal, "SIGPROF"):
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])


def limit_memory() -> None:
    with suppress(ImportError, OSError):  # Windows and macOS limit only the time
        import resource

        with open("/proc/self/statm") as sizes:
            now = int(sizes.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))


if __name__ == "__main__":
    main()
