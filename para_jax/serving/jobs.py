"""A batch job: reads requests from a JSON-lines file, and writes the engine's answers to another as they end. A job
that was killed resumes where it stopped: no line is answered twice, and none is lost."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import BinaryIO

from ..data.chats import fixed_date, writes_date
from ..data.token_cache import today
from ..io.checks import expanded, printable, shorten
from ..io.messages import say, warn
from ..io.progress import Progress
from ..io.shards import Shard, ShardOutput, job_shard_file, write_part
from ..io.storage.bucket import Place
from .answers import MAX_LINE, Answers, KeptAnswer, bounded_lines, check_shard
from .engine import Engine
from .job_lines import MAX_ERROR, NOT_IN_JOBS, KeyParts, LineSample, error_text, job_settings, key_parts, samples
from .open_requests import QueueFull
from .request import Completion, Request, check_request

#: Requests that wait in the engine's queue per slot: enough to refill each slot at once.
AHEAD = 2
#: Rounds that may fail one after the other, with the one that ends the job.
TRIALS = 3
#: The ids that are remembered, to warn of one that comes twice.
MOST_IDS = 1_000_000


class InputSeen:
    """What was read of a job's input, for its shard file."""

    lines = samples = 0
    """all lines, and the samples of those that are answered here"""

    def __init__(self, stream: BinaryIO):
        self.stream, self.sha256 = stream, hashlib.sha256()

    def readline(self, most: int) -> bytes:
        data = self.stream.readline(most)
        self.sha256.update(data)
        return data


def run_job(
    engine: Engine, source: str | Place, output: str | Place, defaults: Request, *, shard: Shard | None = None
) -> Counter[str]:
    """Answers each line of `source` that `output` does not answer yet. Returns how many errors of each kind there are.

    Lines that an earlier run answered with an error are asked again. Both files may be pipes; a job cannot resume from
    an output that is a pipe.

    Args:
        engine: without open requests.
        defaults: the fields that a line leaves out. Its seed is the job's.
        shard: answer only the lines of this shard. A file next to the output describes it, and serving/job_merge.py
            joins the outputs of all shards.

    Raises ValueError if another process is writing `output`, if it is the output of another shard, if it is damaged or
    answers other requests (the line, the defaults, the adapter or the model has changed), if `source` has no line, and
    for wrong defaults; OSError, naming the file, if an answer can't be written.
    """
    source, output = expanded(source), expanded(output)
    with Answers(output) as answers:
        return answer_lines(engine, source, answers, defaults, shard)


def answer_lines(
    engine: Engine, source: Place, answers: Answers, defaults: Request, shard: Shard | None
) -> Counter[str]:
    """As `run_job`, with an output that is already open."""
    check_request(replace(defaults, prompt="a"))
    for name in NOT_IN_JOBS:
        if getattr(defaults, name) is not None:
            raise ValueError(f"{name} is {getattr(defaults, name)}; a job's answers have no log-probabilities")
    if engine.open:
        raise ValueError(f"engine: {engine.open} requests are open; take their answers first")
    check_shard(answers, shard)
    part = None if shard is None else ShardOutput(answers.file, shard, job_settings(engine, defaults), False, {})
    # One date for the whole job, also after midnight.
    day = (answers.date or today()) if writes_date(engine.tokenizer) else None
    with nullcontext() if day is None else fixed_date(engine.tokenizer, day):
        by = key_parts(engine)
        total = checked_lines(source, answers, defaults, by, shard) if source.is_file() else None
        if part is not None:
            write_part(job_shard_file(answers.file), part)
        with source.open("rb") as stream:
            seen = InputSeen(stream)
            left = unanswered(seen, source, answers, defaults, by, shard)
            errors = answer_left(engine, source, answers, left, total, seen, shard, day)
    if part is not None:
        found, spare = {"lines": seen.lines, "sha256": seen.sha256.hexdigest()}, len(answers.beyond(seen.lines))
        content = {"answers": seen.samples, **({"spare": spare} if spare else {})}
        ended = part._replace(settings=part.settings | {"input": found}, ended=True, content=content)
        write_part(job_shard_file(answers.file), ended)
    return errors


def answer_left(
    engine: Engine,
    source: Place,
    answers: Answers,
    left: Iterator[tuple[LineSample, KeptAnswer | None]],
    total: int | None,
    seen: InputSeen,
    shard: Shard | None,
    day: str | None,
) -> Counter[str]:
    """Answers the samples that are left, and finishes the output. Returns how many errors of each kind there are.

    Args:
        total: lines of the input; None: unknown.
        seen: counts the lines of the input as they are read.
        shard: the shard that the answers are of. Its file keeps answers to lines beyond the input's end, since the
            input may have been cut off, but none that a line of the input no longer asks for: `merge` couldn't tell
            them from the others.
        day: that the chat template writes; None if it writes none.
    """
    waiting: dict[tuple[int, int], tuple[LineSample, KeptAnswer | None]] = {}
    errors, tokens, begun = Counter(), 0, time.monotonic()
    first: tuple[int, str] | None = None
    try:
        with Progress("answering", total, unit="line", keep=True) as bar:
            for completion in served(engine, left, waiting):
                sample, before = waiting.pop(completion.id)  # pyright: ignore[reportArgumentType]
                error = completion.error and completion.error[:MAX_ERROR]
                if error:
                    errors[kind(error)] += 1
                    first = min(first or (sample.line, error), (sample.line, error))
                if before is None or before.key != sample.key or before.error != error:
                    answers.add(record(sample, completion._replace(error=error), day))
                    if before is not None:
                        answers.stale.add(before.row)
                tokens += len(completion.tokens)
                rate = tokens / max(time.monotonic() - begun, 1e-9)
                bar.advance(max(sample.line - bar.done, 0), **{"tokens/s": round(rate)})
    finally:
        for id in waiting:  # the engine is the caller's; none of our requests may stay in it
            engine.cancel(id)
        while engine.open:
            engine.step()
    spare = answers.beyond(0 if shard is None else seen.lines)
    answers.stale |= {kept.row for place, kept in answers.kept.items() if place not in spare}
    if spare:
        say(f"{answers.file}: keeps {len(spare)} answers that no line of {source} asks for")
    answers.finish()
    if first is not None:
        say(f"the first error, line {first[0]} of {source}: {printable(first[1])}")
    return errors


def served(engine: Engine, left: Iterator[tuple[LineSample, KeptAnswer | None]], waiting: dict) -> Iterator[Completion]:
    """The completions of samples as they end. Samples join the engine's queue as it empties.

    Args:
        left: samples to answer, each with the error that an earlier run answered.
        waiting: gets the items that the engine holds, by (line, index). The caller takes out what has ended.
    """
    most = min((1 + AHEAD) * engine.slots, engine.queue_limit or sys.maxsize)
    refused = None  # the next item, if the queue of its tenant was full
    while True:
        while len(waiting) < most:
            item = refused or next(left, None)
            refused = None
            if item is None:
                break
            id = (item[0].line, item[0].index)
            try:
                error = submit(engine, item[0], id)
            except QueueFull:
                refused = item
                break
            waiting[id] = item
            if error is not None:
                yield Completion(id, 0, "", [], "error", error)
        if not waiting:
            return
        yield from step(engine)


def submit(engine: Engine, sample: LineSample, id: tuple[int, int]) -> str | None:
    """Submits a sample, to be answered by the adapter in its key, even if the tenant has another one by now. Returns
    the error of a sample that cannot be submitted. Raises QueueFull."""
    if sample.error is not None or sample.request is None:
        return sample.error
    try:
        engine.submit(replace(sample.request, id=id), entry=sample.entry)
    except QueueFull:
        raise
    except Exception as error:  # of rendering or tokenising this request
        return error_text(error)


def step(engine: Engine) -> list[Completion]:
    """One round of the engine. A round that raises is repeated: the engine may need TRIALS to find the prompt that
    fails."""
    for _ in range(TRIALS - 1):
        try:
            return engine.step()
        except Exception as error:
            say(f"a round failed and is repeated: {shorten(str(error), 200)}")
    return engine.step()


def unanswered(
    seen: InputSeen, source: Place, answers: Answers, defaults: Request, by: KeyParts, shard: Shard | None
) -> Iterator[tuple[LineSample, KeptAnswer | None]]:
    """The samples that are left to answer, each with the error that an earlier run answered. Takes each sample's answer
    out of `answers.kept`."""
    lines: dict[bytes, int] | None = {}  # by their id
    for sample in line_samples(seen, source, defaults, by, shard):
        seen.samples += 1
        if lines is not None and sample.id is not None and sample.index == 0:
            lines = with_id(lines, sample)
        before = answers.kept.pop((sample.line, sample.index), None)
        require_same(sample, before, answers.file)
        if before is None or before.error is not None:
            yield sample, before


def with_id(lines: dict[bytes, int], sample: LineSample) -> dict[bytes, int] | None:
    """The lines by a hash of their id, with one more. Warns of the first that repeats an id; then None, as after
    MOST_IDS: nothing more is remembered."""
    digest = hashlib.sha256(json.dumps(sample.id, sort_keys=True).encode()).digest()[:16]
    if digest in lines:
        warn(
            f"line {sample.line} has the id of line {lines[digest]}, {shorten(sample.id)}; `line` tells their answers "
            "apart"
        )
        return None
    lines[digest] = sample.line
    return lines if len(lines) < MOST_IDS else None


def checked_lines(source: Place, answers: Answers, defaults: Request, by: KeyParts, shard: Shard | None) -> int:
    """The number of lines in `source`. Raises ValueError, before anything is answered, if a line was answered as
    another request."""
    if answers.kept:
        with source.open("rb") as stream:
            for sample in line_samples(InputSeen(stream), source, defaults, by, shard):
                require_same(sample, answers.kept.get((sample.line, sample.index)), answers.file)
    with source.open("rb") as stream:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: stream.read(2**20), b""))


def line_samples(
    seen: InputSeen, source: Place, defaults: Request, by: KeyParts, shard: Shard | None
) -> Iterator[LineSample]:
    """All samples of a shard's lines, in order. Those of a line follow each other, so they share its prefill."""
    empty = True
    for number, line in enumerate(bounded_lines(seen, MAX_LINE), 1):
        seen.lines = number
        if line is None or line.strip():
            empty = False
            if shard is None or shard.has_line(number):
                yield from samples(number, line, defaults, by)
    if empty:
        raise ValueError(f"{source}: no line there; write one request per line")


def require_same(sample: LineSample, before: KeptAnswer | None, output: Place) -> None:
    if before is not None and before.error is None and before.key != sample.key:
        changed = "the line, an option, its adapter, the backbone or para_jax has changed since"
        raise ValueError(
            f"{output}: line {sample.line} of the input was answered as another request: {sample.error or changed}. "
            "Choose another file, or undo the change."
        )


def record(sample: LineSample, completion: Completion, day: str | None) -> dict:
    """An answer as a line of the output. The answer to a chat has the day that the chat template wrote."""
    line: dict[str, object] = {"line": sample.line, "index": sample.index, "request": sample.key}
    if sample.id is not None:
        line["id"] = sample.id
    if sample.request is not None:
        line["tenant"] = sample.request.tenant
        if day is not None and not isinstance(sample.request.prompt, str):
            line["date"] = day
    line |= {"text": completion.text, "tokens": len(completion.tokens), "finish_reason": completion.finish_reason}
    if completion.error is not None:
        line["error"] = completion.error
    return line


def kind(error: str) -> str:
    """The kind of an error, for counting: the field that it names first."""
    start = re.split(r":| is ", error, maxsplit=1)[0]
    return "".join(filter(str.isprintable, start[:40]))
