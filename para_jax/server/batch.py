"""A line of OpenAI's batch format becomes a request of the engine. `generate --input` reads such files, without a
server."""

from __future__ import annotations

from ..config import BASE
from ..serving.engine import Engine
from ..serving.job_lines import URLS
from ..serving.request import Request
from .engine_requests import engine_requests
from .errors import ApiError
from .protocol import ChatBody, CompletionBody, validated


def batch_request(line: dict, engine: Engine) -> Request:
    """The request of a line with `method`, `url` and `body`. The body is read as the server reads it. Raises ValueError
    that names the field."""
    if line.get("method") != "POST" or line.get("url") not in URLS:
        raise ValueError(f"url: give POST and {' or '.join(URLS)}; got {line.get('method')} {line.get('url')}")
    try:
        body = validated(ChatBody if line["url"] == URLS[0] else CompletionBody, line["body"])
        if len(body.prompts) > 1 or body.stream or body.echo or body.alternatives is not None:
            raise ValueError("body: a job takes one prompt per line, without stream, echo and logprobs")
        return engine_requests(body, None if body.model == BASE else body.model, engine, None)[0]
    except ApiError as error:
        raise ValueError(error.message) from None
