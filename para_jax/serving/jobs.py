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


class Before(NamedTuple):
    """What an earlier run answered a sample of a line with."""

    digest: str
    """Task's"""
    error: bool
    stale: bool
    """whether an older answer stands in the file too"""


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
    failed = {place for place, before in done.items() if before.error}
    stale, tokens = any(before.stale for before in done.values()), 0
    with output.open("a", encoding="utf-8") as stream:
        for completion in served(engine, left, waiting):
            place = completion.id
            task = waiting.pop(place)  # pyright: ignore[reportArgumentType]
            stale |= place in done
            (failed.add if completion.finish_reason == "error" else failed.discard)(place)  # pyright: ignore
            tokens += len(completion.tokens)
            stream.write(json.dumps(record(task, completion), ensure_ascii=False) + "\n")
            stream.flush()
            bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tokens/s")
            bar.n = max(bar.n, task.line)
            bar.refresh()
        os.fsync(stream.fileno())
    bar.close()
    if stale:
        keep_newest(output)
    return len(failed)


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
                one = dataclasses.replace(request, n=1, seed=(request.seed + index) % 2**32)
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


def answered(output: Path) -> dict[tuple[int, int], Before]:
    """What an earlier run answered, by line and sample. What it was writing when it was killed is cut off."""
    if not output.exists():
        return {}
    done, whole = {}, 0
    with output.open("rb") as lines:
        for line in lines:
            try:
                if cut_off(line, HEAD):
                    break
                found = json.loads(line)
                place = found["line"], found["index"]
                done[place] = Before(found["request"], found["finish_reason"] == "error", place in done)
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{output}: holds something else than answers; choose another file") from None
            whole += len(line)
    os.truncate(output, whole)
    return done


def cut_off(line: bytes, head: bytes) -> bool:
    """Whether a line of those that begin with `head` was being written in a kill. Raises ValueError for another line
    without an end, which nobody here has written."""
    ours = line.startswith(head) or head.startswith(line)
    require(line.endswith(b"\n") or ours, "line", line[:20], "an end of line")
    return not line.endswith(b"\n")


def known(task: Task, done: dict[tuple[int, int], Before], output: Path) -> bool:
    """Whether a task is answered already."""
    before = done.get((task.line, task.index))
    if before is None or before.digest == task.digest:
        return before is not None
    if not before.error:
        raise ValueError(f"{output}: line {task.line} answers another request; choose another file")
    return False


def keep_newest(output: Path) -> None:
    """Takes out answers that a later one of the same line and sample stands for."""
    newest = {}
    with output.open("rb") as lines:
        for number, line in enumerate(lines):
            found = json.loads(line)
            newest[found["line"], found["index"]] = number
    kept, part = set(newest.values()), output.with_name(f".{output.name}.part")
    with output.open("rb") as lines, part.open("wb") as stream:
        stream.writelines(line for number, line in enumerate(lines) if number in kept)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, output)


def count_lines(source: Path) -> int:
    with source.open("rb") as lines:
        return sum(1 for _ in lines)
