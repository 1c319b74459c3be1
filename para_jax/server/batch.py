"""Batch jobs with lines of OpenAI's batch format, which are read as the server reads them, without a server."""

from __future__ import annotations

from ..config import BASE
from ..io.shards import parse_shard
from ..io.storage.bucket import Place
from ..serving.engine import Engine
from ..serving.job_lines import URLS
from ..serving.jobs import run_job
from ..serving.request import Request
from .config import require_packages


def run_batch(
    engine: Engine,
    source: str | Place,
    output: str | Place,
    *,
    defaults: Request | None = None,
    shard: str | None = None,
) -> int:
    """Answers a file of requests, as `para-jax generate --input` does. Called again after a stop, it continues.

    Args:
        engine: without open requests.
        source: one request per line: OpenAI's batch format, which needs the extra `serve`, or the short form
            (docs/jobs.md). A path, a bucket's URL or a pipe.
        output: the file of answers.
        defaults: the fields that a line of the short form leaves out; its prompt is not used.
        shard: "I/N": every N-th line, from line I on, counted from 0.

    Returns:
        How many answers are errors. A line that can't be served gets one, and the others are served.

    Raises:
        ValueError: another process writes the output, it is of other requests or another shard, two lines have one
            custom_id, or the source has no line.
        OSError: an answer can't be written.

    >>> engine = Engine(model, bank, tokenizer, slots=2, max_length=64)
    >>> run_batch(engine, "prompts.jsonl", "answers.jsonl")
    0
    """
    default = Request("") if defaults is None else defaults
    return run_job(
        engine, source, output, default, shard=parse_shard(shard) if shard else None, read_body=batch_request
    )


def batch_request(line: dict, engine: Engine) -> Request:
    """The request of a line with `method`, `url` and `body`. Raises ValueError that names the field, or the packages
    that are missing."""
    require_packages("OpenAI's batch format")
    from .engine_requests import engine_requests
    from .errors import ApiError
    from .protocol import ChatBody, CompletionBody, validated

    if line.get("method") != "POST" or line.get("url") not in URLS:
        raise ValueError(f"url: give POST and {' or '.join(URLS)}; got {line.get('method')} {line.get('url')}")
    try:
        body = validated(ChatBody if line["url"] == URLS[0] else CompletionBody, line["body"])
        if len(body.prompts) > 1 or body.stream or body.echo or body.alternatives is not None or body.may_call:
            raise ValueError("body: a job takes one prompt per line, without stream, echo, logprobs and tools")
        return engine_requests(body, None if body.model == BASE else body.model, engine, None)[0]
    except ApiError as error:
        raise ValueError(error.message) from None
