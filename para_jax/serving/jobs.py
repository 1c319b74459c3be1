"""A batch job: requests from a JSON-lines file through the engine, answers to another as they end. A job that was
killed goes on where it stopped: no line is answered twice, and none is lost."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from ..config import require
from .engine import Engine
from .request import Completion, Request, check_request

FIELDS = ("prompt", "messages", "tenant", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop", "n", "id")
#: Requests that wait in the engine's queue, in slots' worth: enough to refill each at once.
AHEAD = 2


class Task(NamedTuple):
    """One sample of one line."""

    line: int
    """from 1"""
    index: int
    digest: str
    """of the line's text"""
    name: object
    """the line's own id"""
    request: Request | None
    error: str | None


def run_job(engine: Engine, source: Path, output: Path, defaults: Request) -> int:
    """Answers every line of `source` that `output` does not answer yet; how many were answered with an error.

    Args:
        defaults: the sampling of lines that do not say theirs.

    Raises ValueError where `output` holds answers to other requests.
    """
    done = answered(output)
    bar = tqdm(total=count_lines(source), desc="answers", unit="line", disable=None)
    left = (task for task in tasks(source, defaults) if not known(task, done, output))
    waiting: dict[tuple[int, int], Task] = {}
    failed = tokens = 0
    with output.open("a") as stream:
        for completion in served(engine, left, waiting):
            task = waiting.pop(completion.id)  # pyright: ignore[reportArgumentType]
            failed += completion.finish_reason == "error"
            tokens += len(completion.tokens)
            stream.write(json.dumps(record(task, completion), ensure_ascii=False) + "\n")
            stream.flush()
            bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tokens/s")
            bar.n = max(bar.n, task.line)
            bar.refresh()
        os.fsync(stream.fileno())
    bar.close()
    return failed


def served(engine: Engine, left: Iterator[Task], waiting: dict) -> Iterator[Completion]:
    """The completions of tasks, which join the engine's queue as it empties."""

    def top_up():
        while len(waiting) < (1 + AHEAD) * engine.slots:
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


def tasks(source: Path, defaults: Request) -> Iterator[Task]:
    """One task a sample and line, in order; samples of a line follow each other, so that they share its prefill."""
    with source.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            digest = hashlib.sha256(line.strip()).hexdigest()[:16]
            try:
                name, request = parsed(line, defaults)
            except ValueError as error:
                yield Task(number, 0, digest, None, None, str(error))
                continue
            for index in range(request.n):
                one = dataclasses.replace(request, n=1, seed=(request.seed + index) % 2**32)
                yield Task(number, index, digest, name, one, None)


def parsed(line: bytes, defaults: Request) -> tuple[object, Request]:
    """The line's own id, and its request. Raises ValueError, naming the field."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the line is not JSON: {str(error)[:100]}") from None
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


def answered(output: Path) -> dict[tuple[int, int], str]:
    """The digests of the lines that an earlier run answered. What it was writing when it was killed is cut off."""
    if not output.exists():
        return {}
    done, whole = {}, 0
    with output.open("rb") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                break
            try:
                found = json.loads(line)
                done[found["line"], found["index"]] = found["request"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{output}: holds something else than answers; choose another file") from None
            whole += len(line)
    os.truncate(output, whole)
    return done


def known(task: Task, done: dict[tuple[int, int], str], output: Path) -> bool:
    """Whether a task is answered already."""
    digest = done.get((task.line, task.index))
    if digest not in (None, task.digest):
        raise ValueError(f"{output}: line {task.line} answers another request; choose another file")
    return digest is not None


def count_lines(source: Path) -> int:
    with source.open("rb") as lines:
        return sum(1 for _ in lines)
