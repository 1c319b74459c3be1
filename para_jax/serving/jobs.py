"""A batch job: requests from a JSON-lines file through the engine, answers to another as they end. A job that was
killed goes on where it stopped: no line is answered twice, and none is lost."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from ..config import require
from ..data.examples import require_unicode
from .engine import Engine
from .request import Completion, Request, check_request

FIELDS = ("prompt", "messages", "tenant", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop", "n", "id")
#: How each answer begins; `record` and `answered` agree on it.
HEAD = b'{"line": '
#: Requests that wait in the engine's queue, in slots' worth: enough to refill each at once.
AHEAD = 2


class Answered(NamedTuple):
    """How a line was answered by an earlier run."""

    digest: str
    """Task's"""
    errors: dict[int, bool]
    """by sample: whether its answer is an error"""


class Task(NamedTuple):
    """One sample of one line."""

    line: int
    """from 1"""
    index: int
    digest: str
    """of the line's text, the defaults and the adapter"""
    name: object
    """the line's own id"""
    request: Request | None
    error: str | None


def run_job(engine: Engine, source: Path, output: Path, defaults: Request) -> int:
    """Answers every line of `source` that `output` does not answer yet; how many errors `output` holds then. A line
    that an earlier run answered with an error is answered anew where it, the defaults or the adapters have changed.

    Args:
        defaults: the sampling of lines that do not say theirs.

    Raises ValueError where `output` holds answers to other requests (of other lines, defaults or adapters, or within
    another max_length), and for defaults that no line could be served with.
    """
    check_request(dataclasses.replace(defaults, prompt="a"))
    done = answered(output)
    bar = tqdm(total=count_lines(source), desc="answers", unit="line", disable=None)
    left = (task for task in tasks(source, defaults, engine) if not known(task, done, output))
    waiting: dict[tuple[int, int], Task] = {}
    tokens = 0
    with output.open("a", encoding="utf-8") as stream:
        for completion in served(engine, left, waiting):
            task = waiting.pop(completion.id)  # pyright: ignore[reportArgumentType]
            tokens += len(completion.tokens)
            stream.write(json.dumps(record(task, completion), ensure_ascii=False) + "\n")
            stream.flush()
            bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tokens/s")
            bar.n = max(bar.n, task.line)
            bar.refresh()
        os.fsync(stream.fileno())
    bar.close()
    return sum(sum(line.errors.values()) for line in answered(output).values())


def served(engine: Engine, left: Iterator[Task], waiting: dict) -> Iterator[Completion]:
    """The completions of tasks, which join the engine's queue as it empties."""
    most = min((1 + AHEAD) * engine.slots, engine.queue_limit or sys.maxsize)

    def top_up():
        while len(waiting) < most:
            task = next(left, None)
            if task is None:
                return
            key = (task.line, task.index)
            waiting[key] = task
            if task.request is None:
                yield Completion(key, 0, "", [], "error", task.error)
            else:
                engine.submit(dataclasses.replace(task.request, id=key))

    while True:
        yield from top_up()
        if not waiting:
            return
        for completion in engine.run():
            yield completion
            yield from top_up()


def tasks(source: Path, defaults: Request, engine: Engine) -> Iterator[Task]:
    """One task a sample and line, in order; samples of a line follow each other, so that they share its prefill."""
    shared = f"{defaults} {engine.max_length}"
    with source.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                name, request = parsed(line, defaults)
            except ValueError as error:
                yield Task(number, 0, digest(line, shared), None, None, str(error))
                continue
            made = digest(line, shared, content_of(engine, request.tenant))
            for index in range(request.n):
                one = dataclasses.replace(request, n=1, seed=((request.seed or 0) + index) % 2**32)
                yield Task(number, index, made, name, one, None)


def digest(line: bytes, *others: str) -> str:
    """Of a line and of what else its answer depends on."""
    return hashlib.sha256("\n".join([line.strip().hex(), *others]).encode()).hexdigest()[:16]


def content_of(engine: Engine, tenant: str | None) -> str:
    """The content of a tenant's adapter; empty for the base model, and for a tenant that the bank does not know."""
    if engine.bank is None or tenant is None or tenant not in engine.bank.names:
        return ""
    return engine.bank.entry(tenant).content


def parsed(line: bytes, defaults: Request) -> tuple[object, Request]:
    """The line's own id, and its request. Raises ValueError, naming the field."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the line is not JSON: {str(error)[:100]}") from None
    require_unicode("the line", found)
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object, found {type(found).__name__}")
    unknown = [name for name in found if name not in FIELDS]
    require(not unknown, "fields", unknown[:3], "some of " + ", ".join(FIELDS))
    if ("prompt" in found) == ("messages" in found):
        raise ValueError("expected either prompt, a text, or messages, a list of turns")
    name = found.pop("id", None)
    prompt = found.pop("messages") if "messages" in found else found.pop("prompt")
    if isinstance(found.get("stop"), list):
        found["stop"] = tuple(found["stop"])
    request = dataclasses.replace(defaults, prompt=prompt, **found)
    check_request(request)
    return name, request


def record(task: Task, completion: Completion) -> dict:
    made = {"line": task.line, "index": task.index, "request": task.digest}
    made |= {} if task.name is None else {"id": task.name}
    made |= {} if task.request is None else {"tenant": task.request.tenant}
    made |= {"text": completion.text, "tokens": len(completion.tokens), "finish_reason": completion.finish_reason}
    return made | ({} if completion.error is None else {"error": completion.error})


def answered(output: Path) -> dict[int, Answered]:
    """The lines that an earlier run answered, by number. What it was writing when it was killed is cut off, and errors
    of lines that were answered anew are taken out.

    Raises ValueError, and leaves the file as it is, where it holds something else.
    """
    if not output.exists():
        return {}
    done: dict[int, Answered] = {}
    whole, stale = 0, False
    with output.open("rb") as lines:
        for line in lines:
            try:
                if cut_off(line, HEAD):
                    break
                found = json.loads(line)
                number, digest, index = found["line"], found["request"], found["index"]
                error = found["finish_reason"] == "error"
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{output}: holds something else than answers; choose another file") from None
            if number not in done or done[number].digest != digest:
                stale |= number in done
                done[number] = Answered(digest, {})
            done[number].errors[index] = error
            whole += len(line)
    os.truncate(output, whole)
    if stale:
        keep_newest(output, done)
    return done


def keep_newest(output: Path, done: dict[int, Answered]) -> None:
    """Takes out the answers to what a line was before; the file is the old or the new one, whenever it is read."""
    part = output.with_name(f".{output.name}.part")
    with output.open("rb") as lines, part.open("wb") as stream:
        for line in lines:
            found = json.loads(line)
            if found["request"] == done[found["line"]].digest:
                stream.write(line)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, output)


def cut_off(line: bytes, head: bytes) -> bool:
    """Whether a line of those that begin with `head` was being written in a kill. Raises ValueError for another line
    without an end, which nobody here has written."""
    ours = line.startswith(head) or head.startswith(line)
    require(line.endswith(b"\n") or ours, "line", line[:20], "an end of line")
    return not line.endswith(b"\n")


def known(task: Task, done: dict[int, Answered], output: Path) -> bool:
    """Whether a task is answered already."""
    before = done.get(task.line)
    if before is None or before.digest == task.digest:
        return before is not None and task.index in before.errors
    if not all(before.errors.values()):
        raise ValueError(f"{output}: line {task.line} answers another request; choose another file")
    return False


def count_lines(source: Path) -> int:
    with source.open("rb") as lines:
        return sum(1 for _ in lines)
