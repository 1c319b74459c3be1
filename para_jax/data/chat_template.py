"""Renders chats by a tokenizer's chat template, which is a program that came with the backbone: it runs in a process of
its own (template_process.py), with bounds on time, memory and output.

A sandbox alone is not enough: a template of one line can build a list that takes hours, or all memory, to print.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

from ..config import shorten

#: Bounds of one conversation: seconds of processor time, and characters of the text.
SECONDS, OUTPUT = 2.0, 2**24


class TemplateError(ValueError):
    """The template refused the conversation, failed, or needed too much time or memory."""


def render_template(template: str, messages: list[dict], **variables: Any) -> str:
    """The text that transformers makes of the messages by the template. Several threads may call this at once.

    Args:
        variables: what the template may read next to the messages, and transformers' `continue_final_message`.

    Raises TemplateError, and OSError where the process can't be started.
    """
    return render_templates(template, [(messages, variables)])[0]


def render_templates(template: str, conversations: Sequence[tuple[list[dict], dict[str, Any]]]) -> list[str]:
    """As `render_template` for each (messages, variables), with one question to the process for all of them. Each
    conversation has the time of one alone; if one fails, all do."""
    if not isinstance(template, str):
        raise TemplateError(f"the template is a {type(template).__name__}, not a text")
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


@cache
def template_process(pid: int) -> TemplateProcess:
    """The one of this process; those forked from it have their own."""
    return TemplateProcess()


class TemplateProcess:
    """A Python that renders templates. It starts when asked, and again after a template has been stopped. It stops
    when the process that asks ends."""

    def __init__(self):
        self.lock, self.process = Lock(), None

    def ask(self, request: str) -> dict:
        answer, code = "", None
        with self.lock:
            try:
                self.process = self.process or start()
                with suppress(BrokenPipeError):  # it ended; the code says why
                    self.process.stdin.write(request + "\n")
                    self.process.stdin.flush()
                answer = self.process.stdout.readline()
            finally:  # after Ctrl-C too: a late answer must not become that of the next conversation
                if not answer.endswith("\n"):
                    code = self.stop()
        return json.loads(answer) if code is None else {"error": reason(code)}

    def stop(self) -> int | None:
        process, self.process = self.process, None
        if process is None:
            return None
        process.kill()
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
        return process.wait()


def start() -> subprocess.Popen:
    script = Path(__file__).with_name("template_process.py")
    command = [sys.executable, "-P", str(script)]  # -P: modules next to it are not imported
    found = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8")
    return subprocess.Popen(command, env=os.environ | found, process_group=0, **pipes)  # a group: Ctrl-C is not for it


def reason(code: int) -> str:
    """Why the process ended instead of answering."""
    if code == -getattr(signal, "SIGPROF", 0):
        return f"it took more than {SECONDS:g} seconds"
    return f"it ended the process that renders it (exit code {code})"
