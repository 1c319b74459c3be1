"""A batch job: requests from a JSON-lines file through the engine, answers to another as they end. A job that was
killed goes on where it stopped: no line is answered twice, and none is lost."""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import replace

from tqdm import tqdm

from ..config import require, shorten
from ..devices import say
from ..storage.bucket import Place
from .answers import MAX_LINE, Answers, Kept, bounded_lines
from .engine import Engine
from .job_lines import MAX_ERROR, Answerer, LineSample, answerer, error_text, samples
from .open_requests import QueueFull
from .request import Completion, Request, check_request

#: Requests that wait in the engine's queue, in slots' worth: enough to refill each at once.
AHEAD = 2


def run_job(engine: Engine, source: Place, output: Place, defaults: Request) -> Counter[str]:
    """Answers each line of `source` that `output` does not answer yet; the errors, counted by kind.

    Lines that an earlier run answered with an error are asked again. Both files may be pipes; an output that is one
    holds nothing to go on from.

    Args:
        engine: without open requests.
        defaults: what holds for lines that do not say it themselves. Its seed is the job's.

    Raises ValueError if `output` is being written by another process, is damaged, or answers another request (the line,
    the defaults, the adapter or the model has changed), if `source` has no line, and for defaults that no line could be
    served with; OSError, naming the file, if an answer can't be written.
    """
    with Answers(output) as answers:
        return answer_lines(engine, source, answers, defaults)


def answer_lines(engine: Engine, source: Place, answers: Answers, defaults: Request) -> Counter[str]:
    """As `run_job`, with an output that is open already."""
    check_request(replace(defaults, prompt="a"))
    require(not engine.open, "engine: open requests", engine.open, "none: take their answers first")
    by = answerer(engine)
    total = checked_lines(source, answers, defaults, by) if source.is_file() else None
    left = unanswered(source, answers, defaults, by)
    waiting: dict[tuple[int, int], tuple[LineSample, Kept | None]] = {}
    errors, tokens = Counter(), 0
    bar = tqdm(total=total, desc="answers", unit="line", disable=None)
    try:
        for completion in served(engine, left, waiting):
            sample, before = waiting.pop(completion.id)  # pyright: ignore[reportArgumentType]
            error = completion.error and completion.error[:MAX_ERROR]
            if error:
                errors[kind(error)] += 1
            if before is None or (before.key, before.error) != (sample.key, error):
                answers.add(record(sample, completion._replace(error=error)))
                answers.stale |= set() if before is None else {before.row}
            tokens += len(completion.tokens)
            bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tokens/s")
            bar.n = max(bar.n, sample.line)
            bar.refresh()
    finally:
        bar.close()
        for id in waiting:  # the engine is the caller's, and is left without requests of ours
            engine.cancel(id)
        while engine.open:
            engine.step()
    answers.stale |= {kept.row for kept in answers.kept.values() if kept.error is not None}
    spare = sum(kept.error is None for kept in answers.kept.values())
    if spare:
        say(f"{answers.file}: keeps {spare} answers that no line of {source} asks for")
    answers.finish()
    return errors


def served(engine: Engine, left: Iterator[tuple[LineSample, Kept | None]], waiting: dict) -> Iterator[Completion]:
    """The completions of samples, which join the engine's queue as it empties."""
    most = min((1 + AHEAD) * engine.slots, engine.queue_limit or sys.maxsize)
    refused: deque[tuple[LineSample, Kept | None]] = deque()

    def top_up():
        while len(waiting) < most:
            item = refused.popleft() if refused else next(left, None)
            if item is None:
                return
            id = (item[0].line, item[0].index)
            try:
                error = submit(engine, item[0], id)
            except QueueFull:  # for this tenant
                refused.append(item)
                return
            waiting[id] = item
            if error is not None:
                yield Completion(id, 0, "", [], "error", error)

    while True:
        yield from top_up()
        if not waiting:
            return
        yield from step(engine)


def submit(engine: Engine, sample: LineSample, id: tuple[int, int]) -> str | None:
    """Asks the engine for a sample, from the adapter that its key knows, whatever the tenant's name stands for by now;
    the error of one that can't be asked for. Raises QueueFull."""
    if sample.error is not None or sample.request is None:
        return sample.error
    try:
        engine.submit(replace(sample.request, id=id), entry=sample.entry)
    except QueueFull:
        raise
    except Exception as error:  # of rendering or tokenising this request
        return error_text(error)


def step(engine: Engine) -> list[Completion]:
    """A round of the engine, which can go on after one that raised: that one is made again, once."""
    try:
        return engine.step()
    except Exception as error:
        say(f"a round failed and is made again: {shorten(str(error), 200)}")
        return engine.step()


def unanswered(
    source: Place, answers: Answers, defaults: Request, by: Answerer
) -> Iterator[tuple[LineSample, Kept | None]]:
    """The samples that are left to answer, each with the error that an earlier run answered. What the file says of a
    sample is taken out of `answers.kept`."""
    for sample in asked(source, defaults, by):
        before = answers.kept.pop((sample.line, sample.index), None)
        require_same(sample, before, answers.file)
        if before is None or before.error is not None:
            yield sample, before


def checked_lines(source: Place, answers: Answers, defaults: Request, by: Answerer) -> int:
    """How many lines `source` has. Raises ValueError, before anything is answered, if one was answered as another
    request."""
    if answers.kept:
        for sample in asked(source, defaults, by):
            require_same(sample, answers.kept.get((sample.line, sample.index)), answers.file)
    with source.open("rb") as stream:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: stream.read(2**20), b""))


def asked(source: Place, defaults: Request, by: Answerer) -> Iterator[LineSample]:
    """All samples of all lines, in order; those of a line follow each other, so that they share its prefill."""
    empty = True
    with source.open("rb") as stream:
        for number, line in enumerate(bounded_lines(stream, MAX_LINE), 1):
            if line is None or line.strip():
                empty = False
                yield from samples(number, line, defaults, by)
    if empty:
        raise ValueError(f"{source}: no line there; expected a request per line")


def require_same(sample: LineSample, before: Kept | None, output: Place) -> None:
    if before is not None and before.error is None and before.key != sample.key:
        raise ValueError(
            f"{output}: line {sample.line} of the input was answered as another request: the line, an option, its "
            "adapter or the backbone has changed since. Choose another file, or go back to what it was."
        )


def record(sample: LineSample, completion: Completion) -> dict:
    made = {"line": sample.line, "index": sample.index, "request": sample.key}
    made |= {} if sample.id is None else {"id": sample.id}
    made |= {} if sample.request is None else {"tenant": sample.request.tenant}
    made |= {"text": completion.text, "tokens": len(completion.tokens), "finish_reason": completion.finish_reason}
    return made | ({} if completion.error is None else {"error": completion.error})


def kind(error: str) -> str:
    """What errors are counted by: the field or the part that they name first."""
    return "".join(filter(str.isprintable, error.partition(":")[0][:40]))
