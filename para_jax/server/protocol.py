"""What a request body asks for: OpenAI's fields, those of vLLM that we compute, and a few of our own.

A field that we do not compute is refused by name, never ignored. Only its value that asks for nothing is allowed.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

from pydantic import Field, PlainValidator

from ..config import Variables, template_variables
from ..data.examples import Ids, Prompt
from ..io.checks import shorten
from ..serving.request import MAX_SALT, MAX_SAMPLES, MAX_STOP_LENGTH, MAX_STOPS
from .chat_messages import NO_TOOLS, read_messages
from .errors import wrong_field
from .fields import WHOLE, Count, Fields, Label, Name, only, read_fields, wrong_value

#: New tokens of /v1/completions without max_tokens, as OpenAI has it.
DEFAULT_TOKENS = 16
MOST_STOP_IDS = 1000


def read_stop(value: object) -> tuple[str, ...]:
    texts = [] if value == "" else [value] if isinstance(value, str) else value
    if isinstance(texts, list) and len(texts) <= MAX_STOPS:
        if all(isinstance(text, str) and 0 < len(text) <= MAX_STOP_LENGTH for text in texts):
            return tuple(texts)
    raise ValueError(f"give a text or at most {MAX_STOPS} texts of 1 to {MAX_STOP_LENGTH} characters")


def read_stop_ids(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > MOST_STOP_IDS or not is_ids(value):
        raise ValueError(f"give a list of at most {MOST_STOP_IDS} token ids")
    return tuple(value)


class Body(Fields):
    """The fields of both endpoints."""

    model: Name
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    top_p: Annotated[float, Field(ge=1e-9, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=WHOLE)] = 0
    """vLLM's -1 is all tokens, as 0 is"""
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] = 1
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Annotated[tuple[str, ...], PlainValidator(read_stop)] = ()
    stop_token_ids: Annotated[tuple[int, ...], PlainValidator(read_stop_ids)] = ()
    ignore_eos: bool = False
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT // 2)] | None = None
    stream: bool = False
    stream_options: dict | None = None
    timeout: Annotated[float, Field(ge=0.001, le=1e9)] | None = None

    # labels, from which nothing is computed
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    prompt_cache_retention: Label | None = None

    frequency_penalty: Annotated[Any, only(0, 0.0)] = None
    presence_penalty: Annotated[Any, only(0, 0.0)] = None
    repetition_penalty: Annotated[Any, only(1, 1.0)] = None
    logit_bias: Annotated[Any, only({})] = None
    min_p: Annotated[Any, only(0, 0.0)] = None
    min_tokens: Annotated[Any, only(0)] = None
    length_penalty: Annotated[Any, only(1, 1.0)] = None
    use_beam_search: Annotated[Any, only(False)] = None
    skip_special_tokens: Annotated[Any, only(True)] = None
    spaces_between_special_tokens: Annotated[Any, only(True)] = None
    include_stop_str_in_output: Annotated[Any, only(False)] = None
    return_token_ids: Annotated[Any, only(False)] = None
    priority: Annotated[Any, only(0)] = None


class StreamOptions(Fields):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    """vLLM's"""
    include_obfuscation: Annotated[Any, only(False)] = None


class ChatBody(Body):
    """The body of /v1/chat/completions."""

    messages: Any = None
    max_tokens: Annotated[int, Field(ge=1, le=WHOLE)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=WHOLE)] | None = None
    logprobs: bool = False
    top_logprobs: Count = 0
    chat_template_kwargs: Any = None
    reasoning_effort: Annotated[Any, only("none", advice='only "none" is supported; leave it out')] = None
    metadata: dict | None = None
    prompt_cache_options: dict | None = None

    tools: Annotated[Any, only([], advice=NO_TOOLS)] = None
    tool_choice: Annotated[Any, only("none", "auto", advice=NO_TOOLS)] = None
    functions: Annotated[Any, only([], advice=NO_TOOLS)] = None
    function_call: Annotated[Any, only("none", "auto", advice=NO_TOOLS)] = None
    parallel_tool_calls: Annotated[Any, only(True, False, advice=NO_TOOLS)] = None
    response_format: Annotated[Any, only({"type": "text"}, advice='only {"type": "text"} is supported')] = None
    modalities: Annotated[Any, only(["text"], advice="only text is supported")] = None
    audio: Annotated[Any, only()] = None
    prediction: Annotated[Any, only()] = None
    moderation: Annotated[Any, only()] = None
    verbosity: Annotated[Any, only("medium")] = None
    web_search_options: Annotated[Any, only()] = None
    service_tier: Annotated[Any, only("auto", "default", advice="there is one tier; leave it out")] = None
    store: Annotated[Any, only(False, advice="nothing is stored; leave it out")] = None
    add_generation_prompt: Annotated[Any, only(True)] = None
    continue_final_message: Annotated[Any, only(False)] = None
    add_special_tokens: Annotated[Any, only(False)] = None


class CompletionBody(Body):
    """The body of /v1/completions."""

    prompt: Any = None
    max_tokens: Count = DEFAULT_TOKENS
    logprobs: Count | None = None
    echo: bool = False
    context_length: Any = None
    best_of: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    suffix: Annotated[Any, only("")] = None
    add_special_tokens: Annotated[Any, only(True)] = None


class Asked(NamedTuple):
    """A request body, checked field by field. Whether the prompt fits the engine is seen later."""

    model: str
    prompts: list[Prompt | Ids]
    max_tokens: int | None
    """None: as many as fit"""
    sampling: dict[str, Any]
    """temperature, top_p, top_k, stop, stop_token_ids, ignore_eos: arguments of the engine's Request"""
    seed: int | None
    n: int
    logprobs: int | None
    """alternatives per token; None: no log-probabilities"""
    stream: bool
    include_usage: bool
    continuous_usage: bool
    """whether each event has the usage so far"""
    timeout: float | None
    """seconds; None: the server's"""
    cache_salt: str | None
    """prompts share their beginnings only with those of the same salt"""
    max_tokens_field: str = "max_tokens"
    """the name by which the client gave it"""
    echo: bool = False
    """whether the prompt is a part of the answer"""
    context_lengths: list[int] | None = None
    """for each prompt, how many of its tokens the adapter reads as its prompt"""
    variables: Variables = {}
    """of the chat template; the server's own hold for others"""

    @property
    def chat(self) -> bool:
        return not isinstance(self.prompts[0], (str, tuple))

    @property
    def only_echoes(self) -> bool:
        """Whether the answer is the prompt alone, without scores."""
        return self.echo and self.max_tokens == 0 and self.logprobs is None


def read_chat(found: dict) -> Asked:
    """What the body of /v1/chat/completions asks for."""
    messages = read_messages(found.get("messages"))  # first: its error names the other endpoint
    body = read_fields(ChatBody, found)
    counts = {"max_completion_tokens": body.max_completion_tokens, "max_tokens": body.max_tokens}
    counts = {name: count for name, count in counts.items() if count is not None}
    if len(set(counts.values())) > 1:
        raise wrong_field("max_tokens", "max_tokens and max_completion_tokens mean the same, and differ; give one")
    if body.top_logprobs and not body.logprobs:
        raise wrong_field("top_logprobs", "top_logprobs needs logprobs; set logprobs to true")
    try:
        variables = template_variables("chat_template_kwargs", body.chat_template_kwargs)
    except ValueError as error:
        raise wrong_field("chat_template_kwargs", str(error)) from None
    if body.reasoning_effort is not None:
        variables = {"enable_thinking": False, **variables}
    name, count = next(iter(counts.items()), ("max_tokens", None))
    logprobs = body.top_logprobs if body.logprobs else None
    return asked(body, [messages], count, logprobs, max_tokens_field=name, variables=variables)


def read_completion(found: dict) -> Asked:
    """What the body of /v1/completions asks for."""
    prompts = read_prompts(found.get("prompt"))  # first: its error names the other endpoint
    body = read_fields(CompletionBody, found)
    lengths = body.context_length
    if body.max_tokens == 0 and not body.echo:
        raise wrong_field("max_tokens", "max_tokens is 0; give at least 1, or set echo for the prompt alone")
    if lengths is not None:
        lengths = lengths if isinstance(lengths, list) else [lengths] * len(prompts)
        if len(lengths) != len(prompts):
            raise wrong_field("context_length", f"context_length has {len(lengths)} numbers for {len(prompts)} prompts")
        if not all(type(length) is int and length >= 1 for length in lengths):
            advice = "give a whole number of at least 1, or one for each prompt"
            raise wrong_value("context_length", body.context_length, advice)
        if not body.echo or body.logprobs is None:
            raise wrong_field("context_length", "context_length is for scores; it needs echo and logprobs")
    if body.best_of not in (None, body.n):
        raise wrong_field("best_of", "best_of is not supported; leave it out")
    made = asked(body, prompts, body.max_tokens, body.logprobs, echo=body.echo, context_lengths=lengths)
    if made.only_echoes and body.n > 1:
        raise wrong_field("n", f"n is {body.n}, but with max_tokens 0 each answer is the prompt; ask for one")
    if len(prompts) * body.n > MAX_SAMPLES:
        message = f"prompt and n ask for {len(prompts) * body.n} answers; ask for at most {MAX_SAMPLES}"
        raise wrong_field("prompt", message)
    return made


def asked(body: Body, prompts: list, max_tokens: int | None, logprobs: int | None, **others: Any) -> Asked:
    """What both endpoints have, joined with an endpoint's own."""
    if body.stream_options is not None and not body.stream:
        raise wrong_value("stream_options", body.stream_options, "give an object, together with stream")
    options = read_fields(StreamOptions, body.stream_options or {}, "stream_options")
    return Asked(
        model=body.model,
        prompts=prompts,
        max_tokens=max_tokens,
        sampling={
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": max(0, body.top_k),
            "stop": body.stop,
            "stop_token_ids": body.stop_token_ids,
            "ignore_eos": body.ignore_eos,
        },
        seed=body.seed,
        n=body.n,
        logprobs=logprobs,
        stream=body.stream,
        include_usage=options.include_usage,
        continuous_usage=options.continuous_usage_stats and options.include_usage,
        timeout=body.timeout,
        cache_salt=body.cache_salt,
        **others,
    )


def read_prompts(value: object) -> list[Prompt | Ids]:
    """The prompts of /v1/completions: a text, token ids, or a list of either."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if is_ids(value):
            return [tuple(value)]
        if len(value) > MAX_SAMPLES:
            raise wrong_field("prompt", f"prompt has {len(value)} prompts; give at most {MAX_SAMPLES}")
        if all(isinstance(one, str) for one in value):
            return list(value)
        if all(isinstance(one, list) and one and is_ids(one) for one in value):
            return [tuple(ids) for ids in value]
    found = "missing or empty" if value in (None, "", []) else shorten(value)
    advice = "give a text, a list of token ids, or a list of them. Messages go to /v1/chat/completions"
    raise wrong_field("prompt", f"prompt is {found}; {advice}")


def is_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(one) is int and 0 <= one <= WHOLE for one in value)
