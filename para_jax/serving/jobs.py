"""A batch job: reads requests from a JSON-lines file, and writes the engine's answers to another as they end. A job
that was killed resumes where it stopped: no line is answered twice, and none is lost."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import BinaryIO

from ..data.chats import fixed_date, writes_date
from ..io.checks import expanded, printable, shorten
from ..io.messages import say
from ..io.progress import Progress
from ..io.shards import Shard, ShardOutput, begin_part, job_shard_file, write_part
from ..io.storage.bucket import Place
from .answers import Answers
from .engine import Engine
from .job_lines import MAX_ERROR, Line, Reader, error_text, hashed, job_settings
from .open_requests import QueueFull
from .request import Completion, Request, check_request

#: Requests that wait in the engine's queue per slot: enough to refill each slot at once.
AHEAD = 2
#: Rounds that may fail one after the other, with the one that ends the job.
TRIALS = 3


def run_job(
    engine: Engine,
    source: str | Place,
    output: str | Place,
    defaults: Request,
    *,
    shard: Shard | None = None,
    read_body: Callable[[dict, Engine], Request],
) -> int:
    """Answers each line of `source` that `output` does not answer yet, and puts the answers into the order of the
    lines. Returns how many of them are errors.

    Lines that an earlier run answered with an error are asked again. Both files may be pipes; a job cannot resume from
    an output that is a pipe.

    Args:
        engine: without open requests.
        defaults: the fields that a line of the short form leaves out. Its seed is the job's.
        shard: answer only the lines of this shard. A file next to the output describes it, and serving/job_merge.py
            joins the outputs of all shards.
        read_body: the request of a line of OpenAI's batch format.

    Raises ValueError if another process is writing `output`, if it is the output of another shard, if it holds other
    lines or answers other requests (the line, the defaults, the adapter or the model has changed), if two lines have
    one custom_id, if `source` has no line, and for wrong defaults; OSError, naming the file, if an answer can't be
    written.
    """
    source = expanded(source)
    with Answers(expanded(output)) as answers:
        return answer_lines(engine, source, answers, defaults, shard, read_body)


def answer_lines(
    engine: Engine,
    source: Place,
    answers: Answers,
    defaults: Request,
    shard: Shard | None,
    read_body: Callable[[dict, Engine], Request],
) -> int:
    """As `run_job`, with an output that is already open."""
    check_request(replace(defaults, prompt="a"))
    if engine.open:  # the job would take their answers
        raise ValueError(f"engine: {engine.open} requests are open; take their answers first")
    part_file = job_shard_file(answers.file)
    if answers.regular:
        begin_part(part_file, answers.file, shard)
    # One date for the whole job, also after midnight.
    dated = writes_date(engine.tokenizer)
    with fixed_date(engine.tokenizer, answers.day) if dated else nullcontext():
        reader = Reader(engine, defaults, job_settings(engine), read_body)
        total = checked_lines(source, answers, reader, shard) if source.is_file() else None
        settings = shared_settings(reader, answers.day if dated else None)
        if shard is not None:
            write_part(part_file, ShardOutput(answers.file, shard, settings, False, {}))
        with source.open("rb") as stream:
            lines = Lines(stream, reader, shard)
            errors = answer_left(engine, source, answers, lines, total)
    if not lines.count:
        raise ValueError(f"{source}: no line there; write one request per line")

    def place(row: dict) -> tuple[int, str] | None:
        """Answers that no line asks for stay, after the others: the input may have been cut off. Errors go."""
        number = lines.numbers.get(row["custom_id"])
        return None if number is None and row["error"] else (number or sys.maxsize, row["custom_id"])

    answers.sort(place)
    if shard is not None:
        settings |= {"input": {"lines": lines.count, "sha256": lines.sha256.hexdigest()}}
        write_part(part_file, ShardOutput(answers.file, shard, settings, True, {"errors": errors}))
    return errors


def shared_settings(reader: Reader, day: str | None) -> dict:
    """What all shards of a job must share, so that their answers are those of one worker. Values that an error shows
    are short, the others are hashed."""
    engine, defaults = reader.engine, vars(reader.defaults)
    held = [] if engine.bank is None else [*sorted(engine.bank.identities()), engine.bank.dtype]
    return reader.settings | {
        "adapters": hashed(held),
        "max_length": engine.max_length,
        "defaults": {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()},
        "date": day,
    }


class Lines:
    """The lines of a shard, read one after the other. Blank ones do not count."""

    def __init__(self, stream: BinaryIO, reader: Reader, shard: Shard | None):
        self.stream, self.reader, self.shard = stream, reader, shard
        self.count, self.sha256 = 0, hashlib.sha256()
        """of all lines of the input"""
        self.numbers: dict[str, int] = {}
        """the lines of this shard by their custom_id"""

    def __iter__(self) -> Iterator[Line]:
        for number, text in enumerate(self.stream, 1):
            self.sha256.update(text)
            if not text.strip():
                continue
            self.count += 1
            if self.shard is None or self.shard.has_line(self.count):
                line = self.reader.read(number, text)
                before = self.numbers.setdefault(line.custom_id, number)
                if before != number:  # the output could not tell their answers apart
                    raise ValueError(
                        f"line {number} has the custom_id of line {before}, {shorten(line.custom_id)}; give it another"
                    )
                yield line


def checked_lines(source: Place, answers: Answers, reader: Reader, shard: Shard | None) -> int:
    """The number of lines in `source`. Raises ValueError, before anything is answered, if a line was answered as
    another request."""
    with source.open("rb") as stream:
        if answers.keys:
            for line in Lines(stream, reader, shard):
                is_answered(line, answers)
            stream.seek(0)
        return sum(chunk.count(b"\n") for chunk in iter(lambda: stream.read(2**20), b""))


def is_answered(line: Line, answers: Answers) -> bool:
    """Whether the output answers a line. Raises ValueError if it answers another request of the same custom_id: one
    output never mixes two models."""
    key = answers.keys.get(line.custom_id)
    if key is not None and key != line.key:
        changed = "the line, an option, its adapter, the backbone or para_jax has changed since"
        raise ValueError(
            f"{answers.file}: line {line.number} of the input was answered as another request: "
            f"{line.error or changed}. Choose another file, or undo the change."
        )
    return key is not None


def answer_left(engine: Engine, source: Place, answers: Answers, lines: Lines, total: int | None) -> int:
    """Answers the lines that are left. Returns how many errors there are.

    Args:
        total: lines of the input; None: unknown.
    """
    waiting: dict[int, tuple[Line, list[Completion]]] = {}
    left = (line for line in lines if not is_answered(line, answers))
    errors, tokens, begun = 0, 0, time.monotonic()
    first: tuple[int, str] | None = None
    try:
        with Progress("answering", total, unit="line", keep=True) as bar:
            for line, samples, error in served(engine, left, waiting):
                error = error and error[:MAX_ERROR]
                if error:
                    errors += 1
                    first = min(first or (line.number, error), (line.number, error))
                answers.put(line, samples, error)
                tokens += sum(len(one.tokens) for one in samples)
                rate = tokens / max(time.monotonic() - begun, 1e-9)
                bar.advance(max(line.number - bar.done, 0), **{"tokens/s": round(rate)})
    finally:
        for id in waiting:  # the engine is the caller's; none of our requests may stay in it
            engine.cancel(id)
        while engine.open:
            engine.step()
    if first is not None:
        say(f"the first error, line {first[0]} of {source}: {printable(first[1])}")
    return errors


def served(
    engine: Engine, left: Iterator[Line], waiting: dict[int, tuple[Line, list[Completion]]]
) -> Iterator[tuple[Line, list[Completion], str | None]]:
    """The lines as they end, with their samples or their error. Requests join the engine's queue as it empties.

    Args:
        waiting: gets the lines that the engine holds, by their numbers, with the samples that have ended.
    """
    refused = None  # the next line, if the queue of its tenant was full
    while True:
        while len(waiting) < (1 + AHEAD) * engine.slots:
            line = refused or next(left, None)
            refused = None
            if line is None:
                break
            error = line.error
            try:
                if line.request is not None:
                    # the adapter in the key answers, even if the tenant has another one by now
                    engine.submit(line.request, entry=line.entry)
                    waiting[line.number] = line, []
                    continue
            except Exception as problem:  # of rendering or tokenising this request
                if isinstance(problem, QueueFull) and waiting:
                    refused = line
                    break
                error = error_text(problem)
            yield line, [], error
        if not waiting:
            return
        for completion in step(engine):
            line, samples = waiting[completion.id]  # pyright: ignore[reportArgumentType]
            assert line.request is not None
            samples.append(completion)
            refusal = completion.error and not completion.prompt_tokens  # one for all samples
            if refusal or len(samples) == line.request.n:
                del waiting[line.number]
                yield line, samples, next((one.error for one in samples if one.error), None)


def step(engine: Engine) -> list[Completion]:
    """One round of the engine. A round that raises is repeated: the engine may need TRIALS to find the prompt that
    fails."""
    for _ in range(TRIALS - 1):
        try:
            return engine.step()
        except Exception as error:
            say(f"a round failed and is repeated: {shorten(str(error), 200)}")
    return engine.step()
