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
from .protocol import Body, ChatBody, CompletionBody
from .tools import forced_call

#: Log-probabilities that a request may ask for, alternatives included. Each takes up to 0.3 kB until it is answered.
MAX_LOGPROBS = 2**21
#: Values of a body in addition to the ids of as many prompts as it may have, each as long as the engine allows.
SPARE_VALUES = 10_000


def engine_requests(body: Body, tenant: str | None, engine: Engine, salt: str | None) -> list[Request]:
    """The engine's requests, one per prompt. Answer i of all is drawn with seed + i.

    Args:
        salt: the client's, for the prefix cache, in addition to the request's.

    Raises ValueError for a prompt that is none.
    """
    require_room(body, engine)
    salt, requests = "\0".join(filter(None, (salt, body.cache_salt))) or None, []
    contexts = body.context_lengths if isinstance(body, CompletionBody) else [None]
    variables = body.variables if isinstance(body, ChatBody) else {}
    structure = body.structure
    if isinstance(body, ChatBody) and body.tools:
        structure = forced_call(body) or structure
        if "tools" not in engine.tokenizer.get_chat_template():
            raise wrong_field("tools", "tools: the model's chat template has no place for them; leave them out")
    for i, (prompt, context) in enumerate(zip(body.prompts, contexts, strict=True)):
        stops, new = tuple(body.stop_token_ids), body.new_tokens
        if body.only_echoes:  # no score is shown, so all of the prompt is the adapter's
            prompt = prompt_ids(prompt, engine)
            context = len(prompt)
        if body.chat and (new is None or variables):
            stops += () if body.ignore_eos else turn_stop_ids(engine.tokenizer, prompt)
            prompt = prompt_ids(prompt, engine, variables)
        requests.append(
            Request(
                prompt,
                tenant,
                max_new_tokens=max(1, engine.max_length - len(prompt)) if new is None else new,
                temperature=0 if body.use_beam_search else body.temperature,
                top_p=body.top_p,
                top_k=max(0, body.top_k),
                stop=tuple(body.stop),
                stop_token_ids=stops,
                ignore_eos=body.ignore_eos or one_token_is_scored(body),
                seed=None if body.seed is None else (body.seed + i * body.n) % 2**32,
                n=body.n,
                num_beams=body.n if body.use_beam_search else 1,
                length_penalty=body.length_penalty,
                strip=False,
                logprobs=body.alternatives,
                prompt_logprobs=(0 if body.only_echoes else body.alternatives) if body.echo else None,
                context_length=context,
                structured_outputs=structure,
                cache_salt=salt,
            )
        )
    return requests


def require_few(body: bytes, max_length: int) -> None:
    """Raises ApiError 400 for a body with more values than a request can use. It isn't parsed then: that would make an
    object of each value in one call, during which no other thread runs."""
    most = MAX_SAMPLES * max_length + SPARE_VALUES
    if sum(map(body.count, (b"[", b"{", b","))) > most:
        message = f"the body has more than {most} values; send fewer prompts, messages or token ids"
        raise ApiError(400, message + known_words(max_length), code="context_length_exceeded")


def known_words(max_length: int) -> str:
    """The words by which gateways find out that a prompt is too long, and ask another model."""
    return f"; this model's maximum context length is {max_length} tokens"


def prompt_ids(prompt: Prompt | Ids, engine: Engine, variables: Variables | None = None) -> Ids:
    if isinstance(prompt, tuple):
        return prompt
    most = longest_prompt(engine.tokenizer, engine.max_length)
    return tuple(encode_prompt(engine.tokenizer, prompt, most=most, variables=variables, may_be_blank=True))


def one_token_is_scored(body: Body) -> bool:
    """Whether the one new token is in the answer even if it ends it. Clients that score a prompt by echo ask for one
    new token and leave the last one out (lm-eval's local-completions), so there must be one."""
    ends = body.stop or body.stop_token_ids
    return body.echo and body.alternatives is not None and body.max_tokens == 1 and not ends


def require_room(body: Body, engine: Engine) -> None:
    """Raises ApiError 400 for more answers than the queue can ever take at once, and for too many log-probabilities."""
    count = len(body.prompts) * body.n
    most = min(limit or math.inf for limit in (engine.queue_limit, engine.queue_limit_per_tenant))
    if count > most:
        raise wrong_field("n", f"the request asks for {count} answers, and the queue takes {most}; ask for less")
    if logprobs_of(body, engine.max_length) > max(MAX_LOGPROBS, engine.max_length * ((body.alternatives or 0) + 1)):
        name = "top_logprobs" if body.chat else "logprobs"
        message = f"{name} is {body.alternatives}, for too many tokens; ask for fewer answers, or in several requests"
        raise wrong_field(name, message)


def logprobs_of(body: Body, max_length: int) -> int:
    """How many log-probabilities a request asks for, of answers and echoed prompts, alternatives included, at most: a
    character has up to four bytes, and each may be a token."""
    if body.alternatives is None:
        return 0
    most, new = body.n * max_length, math.inf if body.new_tokens is None else body.n * body.new_tokens
    echoed = [len(prompt) * (4 if isinstance(prompt, str) else 1) * body.echo for prompt in body.prompts]
    return sum(int(min(most, new + count)) for count in echoed) * (body.alternatives + 1)


@lru_cache(8)
def longest_prompt(tokenizer, max_length: int) -> int:
    """Characters of a prompt that may fit, at most."""
    return most_characters(tokenizer, max_length)


def refused(error: ValueError, body: Body, max_length: int) -> ApiError:
    """The engine's refusal as an error that names the client's field."""
    tokens = "max_completion_tokens" if "max_completion_tokens" in body.model_fields_set else "max_tokens"
    scores = "top_logprobs" if body.chat and body.alternatives else "logprobs"
    message = re.sub(r"\b(prompt_)?logprobs\b", scores, str(error).replace("max_new_tokens", tokens))
    form = "response_format" if body.form else "tools" if body.structure is None else "structured_outputs"
    message = message.replace("structured_outputs", form)
    message = re.sub("^num_beams", "n", message).replace("num_beams", "use_beam_search")
    param = message.split(":")[0].split(" ")[0]
    if param not in type(body).model_fields:
        param = "prompt"  # what the tokenizer or its chat template says of it
    code = None
    if "max_length" in message or "maximum number of tokens" in message:
        code, message = "context_length_exceeded", message + known_words(max_length)
    if isinstance(error, TemplateError) and isinstance(body, ChatBody) and body.variables:
        message += f"; chat_template_kwargs is {shorten(body.chat_template_kwargs)}"
    return wrong_field("messages" if body.chat and param == "prompt" else param, message, code)
