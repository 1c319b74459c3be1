"""A request body becomes requests of the engine, one per prompt, and the engine's refusals become errors of fields."""

from __future__ import annotations

import math
import re
from functools import lru_cache

from ..config import Variables
from ..data.chats import TemplateError
from ..data.examples import Ids, Prompt, encode_prompt, most_characters, turn_stop_ids
from ..io.checks import shorten
from ..serving.engine import Engine
from ..serving.request import MAX_SAMPLES, Request
from .errors import ApiError, wrong_field
from .protocol import Asked, ChatBody, CompletionBody

#: Log-probabilities that a request may ask for, alternatives included. Each takes up to 0.3 kB until it is answered.
MAX_LOGPROBS = 2**21
#: Values of a body in addition to the ids of as many prompts as it may have, each as long as the engine allows.
SPARE_VALUES = 10_000


def engine_requests(asked: Asked, tenant: str | None, engine: Engine, salt: str | None) -> list[Request]:
    """The engine's requests, one per prompt. Answer i of all is drawn with seed + i.

    Args:
        salt: the client's, for the prefix cache, in addition to the request's.

    Raises ValueError for a prompt that is none.
    """
    require_room(asked, engine)
    salt, made = "\0".join(filter(None, (salt, asked.cache_salt))) or None, []
    for i, prompt in enumerate(asked.prompts):
        sampling = dict(asked.sampling, max_new_tokens=asked.max_tokens, cache_salt=salt)
        if asked.only_echoes and isinstance(prompt, str):
            prompt = prompt_ids(prompt, engine)
        if asked.max_tokens is None or asked.variables:
            assert not isinstance(prompt, tuple), "only chats have no max_tokens, or variables"
            stops = () if sampling["ignore_eos"] else turn_stop_ids(engine.tokenizer, prompt)
            prompt = prompt_ids(prompt, engine, asked.variables)
            sampling["stop_token_ids"] += stops
        if asked.max_tokens is None:
            sampling["max_new_tokens"] = max(1, engine.max_length - len(prompt))
        if one_token_is_scored(asked):
            sampling["ignore_eos"] = True
        seed = None if asked.seed is None else (asked.seed + i * asked.n) % 2**32
        made.append(Request(prompt, tenant, seed=seed, n=asked.n, strip=False, **scores(asked, i, prompt), **sampling))
    return made


def require_few(body: bytes, max_length: int) -> None:
    """Raises ApiError 400 for a body with more values than a request can use. It isn't parsed then: that would make an
    object of each value in one call, during which no other thread runs."""
    most = MAX_SAMPLES * max_length + SPARE_VALUES
    values = lambda text: sum(map(text.count, (b"[", b"{", b",")))  # noqa: E731
    if values(body) <= most:
        return
    bare = body.replace(b"\\\\", b"").replace(b'\\"', b"")  # now each quote begins or ends a text
    if bare.count(b'"') > 4 * most or values(b"".join(bare.split(b'"')[::2])) > most:
        message = f"the body has more than {most} values; send fewer prompts, messages or token ids"
        raise ApiError(400, message + known_words(max_length), code="context_length_exceeded")


def known_words(max_length: int) -> str:
    """The words by which gateways find out that a prompt is too long, and ask another model."""
    return f"; this model's maximum context length is {max_length} tokens"


def prompt_ids(prompt: Prompt, engine: Engine, variables: Variables | None = None) -> Ids:
    most = longest_prompt(engine.tokenizer, engine.max_length)
    return tuple(encode_prompt(engine.tokenizer, prompt, most=most, variables=variables, may_be_blank=True))


def scores(asked: Asked, number: int, prompt: Prompt | Ids) -> dict[str, int | None]:
    """The log-probabilities that a prompt asks for, as arguments of the engine's Request. Where none are shown, all of
    the prompt is the adapter's."""
    context_length = asked.context_lengths[number] if asked.context_lengths else None
    if asked.only_echoes:
        context_length = len(prompt)
    return {"logprobs": asked.logprobs, "prompt_logprobs": prompt_logprobs(asked), "context_length": context_length}


def one_token_is_scored(asked: Asked) -> bool:
    """Whether the one new token is in the answer even if it ends it. Clients that score a prompt by echo ask for one
    new token and leave the last one out (lm-eval's local-completions), so there must be one."""
    ends = asked.sampling["stop"] or asked.sampling["stop_token_ids"]
    return asked.echo and asked.logprobs is not None and asked.max_tokens == 1 and not ends


def prompt_logprobs(asked: Asked) -> int | None:
    """Alternatives per token of the prompt. Without new tokens, the pass over the prompt is what the engine does."""
    if not asked.echo:
        return None
    return 0 if asked.only_echoes else asked.logprobs


def require_room(asked: Asked, engine: Engine) -> None:
    """Raises ApiError 400 for more answers than the queue can ever take at once, and for too many log-probabilities."""
    count = len(asked.prompts) * asked.n
    limits = [one for one in (engine.queue_limit, engine.queue_limit_per_tenant) if one is not None]
    if limits and count > min(limits):
        raise wrong_field("n", f"the request asks for {count} answers, and the queue takes {min(limits)}; ask for less")
    if asked.logprobs is None:
        return
    tokens = scored_tokens(asked, engine.max_length)
    most = max(MAX_LOGPROBS // (asked.logprobs + 1), engine.max_length)  # one answer may have them in any case
    if tokens > most:
        name = "top_logprobs" if asked.chat else "logprobs"
        message = f"{name} is {asked.logprobs}, for up to {tokens} tokens; ask for them for at most {most} tokens"
        raise wrong_field(name, message)


def logprobs_of(asked: Asked, max_length: int) -> int:
    """How many log-probabilities a request asks for, alternatives included, at most."""
    return 0 if asked.logprobs is None else scored_tokens(asked, max_length) * (asked.logprobs + 1)


def scored_tokens(asked: Asked, max_length: int) -> int:
    """Tokens of a request's answers, and of its prompts if they are echoed, at most: a character has up to four bytes,
    and each may be a token."""
    most, new = asked.n * max_length, math.inf if asked.max_tokens is None else asked.n * asked.max_tokens
    echoed = [len(prompt) * (4 if isinstance(prompt, str) else 1) * asked.echo for prompt in asked.prompts]
    return sum(int(min(most, new + count)) for count in echoed)


@lru_cache(8)
def longest_prompt(tokenizer, max_length: int) -> int:
    """Characters of a prompt that may fit, at most."""
    return most_characters(tokenizer, max_length)


#: The engine's names of fields, and what clients call them.
NAMES = {"prompt_logprobs": "logprobs", "max_new_tokens": "max_tokens"}


def refused(error: ValueError, asked: Asked, max_length: int) -> ApiError:
    """The engine's refusal as an error that names the client's field."""
    names = NAMES | {"max_new_tokens": asked.max_tokens_field}
    if asked.chat and asked.logprobs:
        names["logprobs"] = "top_logprobs"
    message = re.sub(rf"\b({'|'.join(names)})\b", lambda found: names[found[0]], str(error))
    param = message.split(":")[0].split(" ")[0]
    long = "max_length" in message or "maximum number of tokens" in message
    code = "context_length_exceeded" if long else None
    if param not in {*ChatBody.model_fields, *CompletionBody.model_fields}:
        param = "prompt"  # what the tokenizer or its chat template says of it
    message += known_words(max_length) * long
    if isinstance(error, TemplateError) and asked.variables:
        message += f"; chat_template_kwargs is {shorten(asked.variables)}"
    return wrong_field("messages" if asked.chat and param == "prompt" else param, message, code)
