"""What a request body asks for: OpenAI's fields, those of vLLM that we compute, and a few of our own.

A field that we do not compute is refused by name, never ignored. Only its value that asks for nothing is allowed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..config import Variables, shorten, template_variables
from ..data.examples import Ids, Prompt
from ..serving.request import MAX_SALT, MAX_SAMPLES, MAX_STOP_LENGTH, MAX_STOPS
from .chat_messages import NO_TOOLS, NOT_COMPUTED, read_messages
from .errors import wrong_field
from .fields import Fields

#: New tokens of /v1/completions without max_tokens, as OpenAI has it.
DEFAULT_TOKENS = 16
MAX_NAME, MAX_USER, WHOLE = 1000, 1000, 2**31 - 1

#: Fields of both endpoints that we do not compute: the values that ask for nothing, and what to say of others.
INERT: dict[str, tuple[tuple, str]] = {
    "frequency_penalty": ((0, 0.0), NOT_COMPUTED),
    "presence_penalty": ((0, 0.0), NOT_COMPUTED),
    "repetition_penalty": ((1, 1.0), NOT_COMPUTED),
    "logit_bias": (({},), NOT_COMPUTED),
    "min_p": ((0, 0.0), NOT_COMPUTED),
    "min_tokens": ((0,), NOT_COMPUTED),
    "length_penalty": ((1, 1.0), NOT_COMPUTED),
    "use_beam_search": ((False,), NOT_COMPUTED),
    "skip_special_tokens": ((True,), NOT_COMPUTED),
    "spaces_between_special_tokens": ((True,), NOT_COMPUTED),
    "include_stop_str_in_output": ((False,), NOT_COMPUTED),
    "return_token_ids": ((False,), NOT_COMPUTED),
    "priority": ((0,), NOT_COMPUTED),
}
INERT_CHAT: dict[str, tuple[tuple, str]] = INERT | {
    "tools": (([],), NO_TOOLS),
    "tool_choice": (("none", "auto"), NO_TOOLS),
    "functions": (([],), NO_TOOLS),
    "function_call": (("none", "auto"), NO_TOOLS),
    "parallel_tool_calls": ((True, False), NO_TOOLS),
    "response_format": (({"type": "text"},), 'only {"type": "text"} is supported'),
    "modalities": ((["text"],), "only text is supported"),
    "audio": ((), NOT_COMPUTED),
    "prediction": ((), NOT_COMPUTED),
    "moderation": ((), NOT_COMPUTED),
    "verbosity": (("medium",), NOT_COMPUTED),
    "web_search_options": ((), NOT_COMPUTED),
    "service_tier": (("auto", "default"), "there is one tier; leave it out"),
    "store": ((False,), "nothing is stored; leave it out"),
    "add_generation_prompt": ((True,), NOT_COMPUTED),
    "continue_final_message": ((False,), NOT_COMPUTED),
    "add_special_tokens": ((False,), NOT_COMPUTED),
}
INERT_TEXT: dict[str, tuple[tuple, str]] = INERT | {
    "suffix": (("",), NOT_COMPUTED),
    "add_special_tokens": ((True,), NOT_COMPUTED),
}
#: Labels of a request. Nothing is computed from them.
LABELS = ("user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
CHAT_LABELS = ("metadata", "prompt_cache_options")
#: Fields of both endpoints that we compute, or that are labels.
COMPUTED = (
    "model", "max_tokens", "temperature", "top_p", "top_k", "n", "seed", "stop", "stop_token_ids", "ignore_eos",
    "cache_salt", "stream", "stream_options", "logprobs", "timeout", *LABELS,
)  # fmt: skip
CHAT_FIELDS = (
    *COMPUTED, "messages", "max_completion_tokens", "top_logprobs", "chat_template_kwargs", "reasoning_effort",
    *CHAT_LABELS, *INERT_CHAT,
)  # fmt: skip
TEXT_FIELDS = (*COMPUTED, "prompt", "echo", "best_of", "context_length", *INERT_TEXT)


class Asked(NamedTuple):
    """A request body, checked field by field. Whether the prompt fits the engine is seen later."""

    model: str
    prompts: list[Prompt | Ids]
    max_tokens: int | None
    """None: as many as fit"""
    max_tokens_field: str
    """the name by which the client gave it"""
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
    """The body of /v1/chat/completions."""
    fields = Fields(found)
    messages = read_messages(fields.take("messages"))
    names = [name for name in ("max_completion_tokens", "max_tokens") if name in fields]
    given = [fields.whole(name, 1, WHOLE) for name in names]
    if len(set(given)) > 1:
        raise wrong_field("max_tokens", "max_tokens and max_completion_tokens mean the same, and differ; give one")
    logprobs, top = fields.flag("logprobs"), fields.whole("top_logprobs", 0, WHOLE)
    if top and not logprobs:
        raise wrong_field("top_logprobs", "top_logprobs needs logprobs; set logprobs to true")
    for name in CHAT_LABELS:
        if not isinstance(value := fields.take(name) or {}, dict):
            fields.refuse(name, value, "give an object")
    try:
        variables = template_variables("chat_template_kwargs", fields.take("chat_template_kwargs"))
    except ValueError as error:
        raise wrong_field("chat_template_kwargs", str(error)) from None
    effort = fields.take("reasoning_effort")
    if effort == "none":
        variables = {"enable_thinking": False, **variables}
    elif effort is not None:
        fields.refuse("reasoning_effort", effort, 'only "none" is supported; leave it out')
    return read_rest(fields, INERT_CHAT, CHAT_FIELDS, {
        "variables": variables,
        "prompts": [messages],
        "max_tokens": given[0] if given else None,
        "max_tokens_field": names[0] if names else "max_tokens",
        "logprobs": (top or 0) if logprobs else None,
    })  # fmt: skip


def read_completion(found: dict) -> Asked:
    """The body of /v1/completions."""
    fields = Fields(found)
    prompts = read_prompts(fields.take("prompt"))
    echo, logprobs = fields.flag("echo"), fields.whole("logprobs", 0, WHOLE)
    max_tokens = fields.whole("max_tokens", 0, WHOLE)
    if max_tokens == 0 and not echo:
        raise wrong_field("max_tokens", "max_tokens is 0; give at least 1, or set echo for the prompt alone")
    lengths = fields.take("context_length")
    if lengths is not None:
        given = lengths if isinstance(lengths, list) else [lengths] * len(prompts)
        if len(given) != len(prompts):
            raise wrong_field("context_length", f"context_length has {len(given)} numbers for {len(prompts)} prompts")
        if not all(type(length) is int and length >= 1 for length in given):
            fields.refuse("context_length", lengths, "give a whole number of at least 1, or one for each prompt")
        if not echo or logprobs is None:
            raise wrong_field("context_length", "context_length is for scores; it needs echo and logprobs")
        lengths = given
    asked = read_rest(fields, INERT_TEXT, TEXT_FIELDS, {
        "prompts": prompts,
        "max_tokens": DEFAULT_TOKENS if max_tokens is None else max_tokens,
        "max_tokens_field": "max_tokens",
        "logprobs": logprobs,
        "echo": echo,
        "context_lengths": lengths,
    })  # fmt: skip
    if asked.only_echoes and asked.n > 1:
        raise wrong_field("n", f"n is {asked.n}, but with max_tokens 0 each answer is the prompt; ask for one")
    if len(prompts) * asked.n > MAX_SAMPLES:
        message = f"prompt and n ask for {len(prompts) * asked.n} answers; ask for at most {MAX_SAMPLES}"
        raise wrong_field("prompt", message)
    return asked


def read_rest(fields: Fields, inert: dict, known: tuple[str, ...], own: dict) -> Asked:
    """The fields that both endpoints have, joined with an endpoint's own. Refuses what is left."""
    if (model := fields.text("model", MAX_NAME)) is None:
        raise wrong_field("model", "model is missing; give a name of /v1/models")
    sampling = {
        "temperature": default(fields.number("temperature", 0, 1e6), 1.0),
        "top_p": default(fields.number("top_p", 1e-9, 1), 1.0),
        "top_k": max(0, default(fields.whole("top_k", -1, WHOLE), 0)),  # vLLM's -1 is all tokens, as 0 is
        "stop": read_stop(fields),
        "stop_token_ids": read_stop_ids(fields),
        "ignore_eos": fields.flag("ignore_eos"),
    }
    n, seed = default(fields.whole("n", 1, MAX_SAMPLES), 1), fields.whole("seed", -(2**63), 2**63 - 1)
    if default(fields.whole("best_of", 1, MAX_SAMPLES), n) != n:
        raise wrong_field("best_of", "best_of is not supported; leave it out")
    stream, include_usage, continuous_usage = fields.flag("stream"), False, False
    if (options := fields.take("stream_options")) is not None:
        if not stream or not isinstance(options, dict):
            fields.refuse("stream_options", options, "give an object, together with stream")
        inner = Fields(options, "stream_options")
        include_usage = inner.flag("include_usage")
        continuous_usage = inner.flag("continuous_usage_stats") and include_usage  # vLLM's
        inner.require_inert({"include_obfuscation": ((False,), NOT_COMPUTED)})
        inner.require_none_left(["include_usage", "continuous_usage_stats"])
    timeout = fields.number("timeout", 0.001, 1e9)
    cache_salt = fields.text("cache_salt", MAX_SALT // 2)
    for name in LABELS:
        fields.text(name, MAX_USER, least=0)
    fields.require_inert(inert)
    fields.require_none_left(known)
    return Asked(
        model=model, sampling=sampling, n=n, seed=seed, stream=stream, include_usage=include_usage,
        continuous_usage=continuous_usage, timeout=timeout, cache_salt=cache_salt, **own,
    )  # fmt: skip


def default(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


def read_stop(fields: Fields) -> tuple[str, ...]:
    value = fields.take("stop")
    texts = [] if value in (None, "") else [value] if isinstance(value, str) else value
    wanted = f"give a text or at most {MAX_STOPS} texts of 1 to {MAX_STOP_LENGTH} characters"
    if not isinstance(texts, list) or len(texts) > MAX_STOPS:
        fields.refuse("stop", value, wanted)
    if not all(isinstance(text, str) and 0 < len(text) <= MAX_STOP_LENGTH for text in texts):
        fields.refuse("stop", value, wanted)
    return tuple(texts)


def read_stop_ids(fields: Fields) -> tuple[int, ...]:
    value = fields.take("stop_token_ids")
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > 1000 or not is_ids(value):
        fields.refuse("stop_token_ids", value, "give a list of at most 1000 token ids")
    return tuple(value)


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
