"""Request bodies: OpenAI's fields, those of vLLM that we compute, and a few of our own.

A field that we do not compute is refused by name, never ignored. Only the value that asks for nothing is allowed.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    PlainValidator,
    ValidationError,
)
from pydantic import model_validator as validator
from pydantic_core import PydanticCustomError, from_json

from ..config import Variables, template_variables
from ..data.chats import ROLES, is_text_part, joined_parts
from ..data.examples import Ids, Prompt
from ..io.checks import shorten
from ..serving.request import MAX_SALT, MAX_SAMPLES, MAX_STOP_LENGTH, MAX_STOPS
from .errors import ApiError, wrong_field

#: New tokens of /v1/completions without max_tokens, as OpenAI has it.
DEFAULT_TOKENS = 16
MOST_STOP_IDS = 1000
WHOLE = 2**31 - 1
NOT_COMPUTED = "it is not supported; leave it out"
NO_TOOLS = "tools are not supported; leave it out"

Name = Annotated[str, Field(min_length=1, max_length=1000)]
Label = Annotated[str, Field(max_length=1000)]
Count = Annotated[int, Field(ge=0, le=WHOLE)]
Positive = Annotated[int, Field(ge=1, le=WHOLE)]


class Fields(BaseModel):
    """An object of a body. Numbers, texts and truth values are those of JSON, without conversion."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @validator(mode="before")
    @classmethod
    def without_nulls(cls, value: Any) -> Any:
        """A field that is null counts as missing, because OpenAI's clients send such fields."""
        if not isinstance(value, dict):
            raise ValueError("give a JSON object")
        for name in value.keys() - cls.model_fields:  # one error: pydantic would make one for each of them
            near = difflib.get_close_matches(name[:100], cls.model_fields, n=1)
            advice = f"; did you mean {near[0]}?" if near else ""
            error = {"name": shorten(name)[1:-1], "error": f"no field {shorten(name)}{advice}"}
            raise PydanticCustomError("unknown", "no such field", error)
        return {name: field for name, field in value.items() if field is not None}


T = TypeVar("T", bound=Fields)


def read(model: type[T], body: bytes) -> T:
    """The fields of a body of JSON. Raises ApiError 400 that names the wrong field and its value."""
    try:
        fields = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    return validated(model, fields)


def validated(model: type[T], fields: object) -> T:
    """The fields of a body that is parsed. Raises ApiError as `read` does."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
    path = [part for part in problem["loc"] if not isinstance(part, str) or not part.startswith("function-")]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)[1:]
    context, message = problem.get("ctx", {}), problem["msg"]
    if problem["type"] == "unknown":
        raise wrong_field(f"{place}.{context['name']}".lstrip("."), context["error"])
    if problem["type"] == "missing":
        raise wrong_field(place, f"{place} is missing")
    advice = str(context.get("error", message)).replace("Input should", "it must").replace("String should", "it must")
    raise wrong_field(place or None, f"{place or 'the body'} is {shorten(problem['input'])}; {advice}")


def only(*allowed: Any, advice: str = NOT_COMPUTED) -> AfterValidator:
    """The check of a field that the server does not compute. It allows the values that change nothing."""
    return AfterValidator(partial(refuse_others, allowed, advice))


def refuse_others(allowed: tuple, advice: str, value: Any) -> Any:
    if value not in allowed:
        raise ValueError(advice)
    return value


def read_stop(value: Any) -> tuple[str, ...]:
    texts = [] if value == "" else [value] if isinstance(value, str) else value
    if isinstance(texts, list) and len(texts) <= MAX_STOPS:
        if all(isinstance(text, str) and 0 < len(text) <= MAX_STOP_LENGTH for text in texts):
            return tuple(texts)
    raise ValueError(f"give a text or at most {MAX_STOPS} texts of 1 to {MAX_STOP_LENGTH} characters")


def is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int and 0 <= one <= WHOLE for one in value)


def read_prompts(value: Any) -> list[str | Ids]:
    """The prompts of /v1/completions: a text, token ids, or a list of either."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if is_ids(value):
            return [tuple(value)]
        if len(value) > MAX_SAMPLES:
            raise ValueError(f"give at most {MAX_SAMPLES} prompts")
        if all(isinstance(one, str) for one in value):
            return list(value)
        if all(one and is_ids(one) for one in value):
            return [tuple(ids) for ids in value]
    raise ValueError("give a text, a list of token ids, or a list of them")


def listed(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def read_content(content: Any) -> str:
    """A text, or the texts of a list of parts as lines."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content and all(map(is_text_part, content)):
        return joined_parts(content)
    raise ValueError('give a text, or a list of parts {"type": "text", "text": ...} without other fields')


class Message(Fields):
    role: Annotated[Any, only(*ROLES, advice=f"give one of {', '.join(ROLES)}")]
    content: Annotated[str, PlainValidator(read_content)]
    name: Name | None = None
    """for the chat template"""
    reasoning_content: Any = None
    reasoning: Any = None
    """the thoughts of an assistant, which no prompt has"""
    tool_calls: Annotated[Any, only([], advice=NO_TOOLS)] = None
    tool_call_id: Annotated[Any, only(advice=NO_TOOLS)] = None
    function_call: Annotated[Any, only(advice=NO_TOOLS)] = None
    audio: Annotated[Any, only()] = None
    refusal: Annotated[Any, only()] = None
    annotations: Annotated[Any, only([])] = None
    type: Annotated[Any, only("text")] = None  # lm-eval up to 0.4.9 sends it

    def for_template(self) -> dict[str, str]:
        return {"role": self.role, "content": self.content} | ({"name": self.name} if self.name else {})


class StreamOptions(Fields):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    """vLLM's: whether each event has the usage so far"""
    include_obfuscation: Annotated[Any, only(False)] = None


class Body(Fields):
    """The fields of both endpoints. Whether the prompt fits the engine is seen later."""

    model: Name
    max_tokens: Count | None = None
    """None: as many as fit"""
    temperature: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    top_p: Annotated[float, Field(ge=1e-9, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=WHOLE)] = 0
    """vLLM's -1 is all tokens, as 0 is"""
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] = 1
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Annotated[tuple[str, ...], PlainValidator(read_stop)] = ()
    stop_token_ids: Annotated[list[Count], Field(max_length=MOST_STOP_IDS), FailFast()] = []
    ignore_eos: bool = False
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT // 2)] | None = None
    """prompts share their beginnings only with those of the same salt"""
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    timeout: Annotated[float, Field(ge=0.001, le=1e9)] | None = None
    """seconds; None: the server's"""

    # labels, from which nothing is computed
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    prompt_cache_retention: Label | None = None

    frequency_penalty: Annotated[Any, only(0)] = None
    presence_penalty: Annotated[Any, only(0)] = None
    repetition_penalty: Annotated[Any, only(1)] = None
    logit_bias: Annotated[Any, only({})] = None
    min_p: Annotated[Any, only(0)] = None
    min_tokens: Annotated[Any, only(0)] = None
    length_penalty: Annotated[Any, only(1)] = None
    use_beam_search: Annotated[Any, only(False)] = None
    skip_special_tokens: Annotated[Any, only(True)] = None
    spaces_between_special_tokens: Annotated[Any, only(True)] = None
    include_stop_str_in_output: Annotated[Any, only(False)] = None
    return_token_ids: Annotated[Any, only(False)] = None
    priority: Annotated[Any, only(0)] = None

    # what the other endpoint has in place of these
    echo: bool = False
    """whether the prompt is a part of the answer"""
    chat: ClassVar[bool] = False

    @validator(mode="after")
    def options_need_a_stream(self):
        if "stream_options" in self.model_fields_set and not self.stream:
            raise wrong_field("stream_options", "stream_options go with stream; set stream to true")
        return self

    @property
    def prompts(self) -> list[Prompt | Ids]:
        raise NotImplementedError

    @property
    def new_tokens(self) -> int | None:
        """The most new tokens of an answer; None: as many as fit."""
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """Alternatives per token; None: no log-probabilities."""
        raise NotImplementedError

    @property
    def only_echoes(self) -> bool:
        """Whether the answer is the prompt alone, without scores."""
        return self.echo and self.max_tokens == 0 and self.alternatives is None


class ChatBody(Body):
    """The body of /v1/chat/completions."""

    prompt: Annotated[Any, only(advice="a prompt goes to /v1/completions")] = None
    messages: Annotated[list[Message], Field(min_length=1), FailFast()]
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    logprobs: bool = False
    top_logprobs: Count = 0
    chat_template_kwargs: Annotated[dict, PlainValidator(partial(template_variables, "it"))] = {}
    reasoning_effort: Annotated[Any, only("none", advice='only "none" is supported; leave it out')] = None
    metadata: dict | None = None
    prompt_cache_options: dict | None = None

    echo: Annotated[Any, only(False)] = False
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
    chat: ClassVar[bool] = True

    @validator(mode="after")
    def fields_go_together(self):
        if self.max_completion_tokens and self.max_tokens not in (None, self.max_completion_tokens):
            raise wrong_field("max_tokens", "max_tokens and max_completion_tokens mean the same, and differ; give one")
        if self.top_logprobs and not self.logprobs:
            raise wrong_field("top_logprobs", "top_logprobs needs logprobs; set logprobs to true")
        return self

    @property
    def prompts(self) -> list[Prompt | Ids]:
        return [[message.for_template() for message in self.messages]]

    @property
    def new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    @property
    def variables(self) -> Variables:
        """Of the chat template; the server's own hold for others."""
        thinking: Variables = {"enable_thinking": False} if self.reasoning_effort is not None else {}
        return thinking | self.chat_template_kwargs


class CompletionBody(Body):
    """The body of /v1/completions."""

    messages: Annotated[Any, only(advice="messages go to /v1/chat/completions")] = None
    prompt: Annotated[list, PlainValidator(read_prompts)]
    max_tokens: Count = DEFAULT_TOKENS
    logprobs: Count | None = None
    context_length: Annotated[list[Positive], FailFast(), BeforeValidator(listed)] = []
    """how many of a prompt's tokens the adapter reads as its prompt: one number, or one for each prompt"""
    best_of: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    suffix: Annotated[Any, only("")] = None
    add_special_tokens: Annotated[Any, only(True)] = None

    @validator(mode="after")
    def fields_go_together(self):
        answers = len(self.prompt) * self.n
        if answers > MAX_SAMPLES:
            raise wrong_field("prompt", f"prompt and n ask for {answers} answers; ask for at most {MAX_SAMPLES}")
        if self.max_tokens == 0 and not self.echo:
            raise wrong_field("max_tokens", "max_tokens is 0; give at least 1, or set echo for the prompt alone")
        if self.only_echoes and self.n > 1:
            raise wrong_field("n", f"n is {self.n}, but with max_tokens 0 each answer is the prompt; ask for one")
        if self.best_of not in (None, self.n):
            raise wrong_field("best_of", "best_of is not supported; leave it out")
        if self.context_length and not (self.echo and self.logprobs is not None):
            raise wrong_field("context_length", "context_length is for scores; it needs echo and logprobs")
        if len(self.context_length) not in (0, 1, len(self.prompt)):
            raise wrong_field("context_length", f"context_length: give one number, or {len(self.prompt)}")
        return self

    @property
    def prompts(self) -> list[Prompt | Ids]:
        return self.prompt

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def context_lengths(self) -> Sequence[int | None]:
        """One for each prompt."""
        lengths = self.context_length or [None]
        return lengths * len(self.prompt) if len(lengths) == 1 else lengths
