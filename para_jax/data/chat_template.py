"""Renders chats with a tokenizer's chat template. A template is a program that came with the backbone, so it runs in a
separate process (template_process.py) with limits on time, memory and output.

A sandbox alone is not enough: a template of one line can build a list that takes hours, or all memory, to print.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import date, datetime, time
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

from ..config import Variables, shorten

#: Limits for one conversation: seconds of processor time, and characters of output.
SECONDS, OUTPUT = 2.0, 2**24


class TemplateError(ValueError):
    """The template refused the conversation, failed, or needed too much time or memory."""


def render_template(template: str, messages: list[dict], **variables: Any) -> str:
    """The messages as transformers renders them with the template. Several threads may call this at once.

    Args:
        variables: what else the template may read, and transformers' `continue_final_message`.

    Raises TemplateError, and OSError if the process cannot be started.
    """
    return render_templates(template, [(messages, variables)])[0]


def render_templates(template: str, conversations: Sequence[tuple[list[dict], dict[str, Any]]]) -> list[str]:
    """`render_template` for each (messages, variables), in one request to the process. Each conversation has its own
    time limit. If one fails, all do."""
    if not isinstance(template, str):
        raise TemplateError(f"the template is a {type(template).__name__}, not text")
    given = [
        ([{name: value for name, value in message.items() if value is not None} for message in messages], variables)
        for messages, variables in conversations
    ]
    try:
        line = json.dumps({"template": template, "conversations": given, "bounds": [SECONDS, OUTPUT]})
    except (TypeError, ValueError, RecursionError) as error:
        raise TemplateError(f"the messages are not JSON ({error})") from None
    answer = template_process(os.getpid()).ask(line)
    if "error" in answer:
        raise TemplateError(shorten(answer["error"], 300))
    return answer["texts"]


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


@cache
def template_process(pid: int) -> TemplateProcess:
    """The process that renders templates for the process `pid`: a fork needs its own."""
    return TemplateProcess()


class TemplateProcess:
    """A Python process that renders templates. It starts with the first request, restarts after a template had to be
    stopped, and ends with the process that asks."""

    def __init__(self):
        self.lock = Lock()
        self.process: subprocess.Popen[str] | None = None

    def ask(self, request: str) -> dict:
        answer, code = "", None
        with self.lock:
            try:
                if self.process is not None and self.process.poll() is not None:  # killed while it was idle
                    self.stop()
                self.process = self.process or start()
                assert self.process.stdin and self.process.stdout
                with suppress(BrokenPipeError):  # it ended; its exit code says why
                    self.process.stdin.write(request + "\n")
                    self.process.stdin.flush()
                answer = self.process.stdout.readline()
            finally:  # also after Ctrl-C: a late answer must not be taken for the next conversation's
                if not answer.endswith("\n"):
                    code = self.stop()
        return json.loads(answer) if code is None else {"error": exit_reason(code)}

    def stop(self) -> int | None:
        process, self.process = self.process, None
        if process is None:
            return None
        assert process.stdin and process.stdout
        process.kill()
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
        return process.wait()


def start() -> subprocess.Popen:
    script = Path(__file__).with_name("template_process.py")
    command = [sys.executable, "-P", str(script)]  # -P: never imports the modules next to the script
    python_path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        command,
        env=os.environ | python_path,
        process_group=0,  # its own group, so that Ctrl-C does not reach it
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
    )


def exit_reason(code: int) -> str:
    """Why the process ended without an answer."""
    if code == -getattr(signal, "SIGPROF", 0):
        return f"it took longer than {SECONDS:g} seconds"
    return f"it crashed the process that renders it (exit code {code})"
