"""Request bodies: OpenAI's fields, those of vLLM that we compute, and a few of our own.

A field that we do not compute is refused by name, never ignored. Only a value that asks for nothing is allowed: null,
and those of `neutral`.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

from pydantic import (
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

from ..config import template_variables
from ..data.chats import is_text_part, joined_parts
from ..data.examples import Ids, Prompt
from ..io.checks import shorten
from ..serving.request import MAX_SAMPLES
from .errors import ApiError, wrong_field

#: New tokens of /v1/completions without max_tokens, as OpenAI has it.
DEFAULT_TOKENS = 16
WHOLE = 2**31 - 1

Name = Annotated[str, Field(min_length=1, max_length=1000)]
Label = Annotated[str, Field(max_length=1000)]
Count = Annotated[int, Field(ge=0, le=WHOLE)]
StopText = Annotated[str, Field(min_length=1, max_length=1024)]
Positive = Annotated[int, Field(ge=1, le=WHOLE)]


class Fields(BaseModel):
    """An object of a body. Numbers, texts and truth values are those of JSON, without conversion."""

    model_config = ConfigDict(extra="forbid", strict=True)
    neutral: ClassVar[dict[str, tuple]] = {}
    """the values that change nothing, of fields that are not computed"""

    @validator(mode="before")
    @classmethod
    def without_nulls(cls, value: Any) -> Any:
        """A field that is null counts as missing, because OpenAI's clients send such fields."""
        if not isinstance(value, dict):
            raise ValueError("give a JSON object")
        fields = {name: field for name, field in value.items() if field not in (None, *cls.neutral.get(name, ()))}
        known = {field.alias or name for name, field in cls.model_fields.items()}
        for name in fields.keys() - known:  # one error: pydantic would make one for each of them
            near = difflib.get_close_matches(name[:100], known, n=1)
            advice = f"did you mean {near[0]}?" if near else "leave it out"
            advice = "it is not supported; leave it out" if name in cls.neutral else advice
            error = {"name": shorten(name)[1:-1], "error": f"no field {shorten(name)}; {advice}"}
            raise PydanticCustomError("unknown", "no such field", error)
        return fields


T = TypeVar("T", bound=Fields)


def read(model: type[T], body: bytes) -> T:
    """The fields of a body of JSON. Raises ApiError 400 that names the wrong field and its value."""
    try:
        fields = from_json(body, allow_inf_nan=False)  # json.loads would take NaN
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    return validated(model, fields)


def validated(model: type[T], fields: object) -> T:
    """The fields of a body that is parsed. Raises ApiError as `read` does."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]  # one is enough to be told at a time
    path = [part for part in problem["loc"] if not isinstance(part, str) or not part.startswith("function-")]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)[1:]
    context, message = problem.get("ctx", {}), problem["msg"]
    if problem["type"] == "unknown":
        raise wrong_field(f"{place}.{context['name']}".lstrip("."), context["error"])
    if problem["type"] == "missing":
        raise wrong_field(place, f"{place} is missing")
    advice = str(context.get("error", message)).replace("Input should", "it must").replace("String should", "it must")
    raise wrong_field(place or None, f"{place or 'the body'} is {shorten(problem['input'])}; {advice}")


def is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int and 0 <= one <= WHOLE for one in value)


def read_prompts(value: Any) -> list[str | Ids]:
    """The prompts of /v1/completions: a text, token ids, or a list of either."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if is_ids(value):
            return [tuple(value)]
        if len(value) > MAX_SAMPLES:  # before each of them is looked at
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


class Named(NamedTuple):
    """A tool_choice that names the function to call."""

    name: str


def read_tool_choice(value: Any) -> str | Named:
    match value:
        case "none" | "auto" | "required":
            return value
        case {"type": "function", "function": {"name": str(name)}}:
            return Named(name)
    raise ValueError('give "none", "auto", "required" or {"type": "function", "function": {"name": ...}}')


class Function(Fields):
    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict = {}
    """a JSON schema"""
    strict: bool = True
    """a forced call keeps to the schema, also where this is false"""


class Tool(Fields):
    type: Literal["function"]
    function: Function


class CalledFunction(Fields):
    name: Name
    arguments: str
    """JSON"""


class ToolCall(Fields):
    id: Label
    type: Literal["function"] = "function"
    function: CalledFunction
    neutral = {"index": tuple(range(MAX_SAMPLES))}  # some clients send the pieces of a stream back


class Message(Fields):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, PlainValidator(read_content)]
    name: Name | None = None
    """for the chat template"""
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_SAMPLES), FailFast()] = []
    tool_call_id: Label | None = None
    reasoning_content: Any = None
    reasoning: Any = None
    """the thoughts of an assistant, which no prompt has"""
    neutral = {"annotations": ([],), "type": ("text",)}  # lm-eval up to 0.4.9 sends the type

    @validator(mode="before")
    @classmethod
    def calls_need_no_content(cls, value: Any) -> Any:
        calls = isinstance(value, dict) and value.get("tool_calls") and value.get("content") is None
        return value | {"content": ""} if calls else value

    def for_template(self) -> dict[str, Any]:
        fields = self.model_dump(include={"role", "content", "name", "tool_calls", "tool_call_id"}, exclude_none=True)
        return fields if self.tool_calls else {name: value for name, value in fields.items() if name != "tool_calls"}


class StreamOptions(Fields):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    """vLLM's: whether each event has the usage so far"""
    neutral = {"include_obfuscation": (False,)}


class JsonSchema(Fields):
    name: Label | None = None
    description: str | None = None
    strict: bool = True
    """an answer keeps to its schema, also where this is false"""
    definition: Annotated[dict, Field(alias="schema")] = {}


class ResponseFormat(Fields):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @validator(mode="after")
    def schema_is_there(self):
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with the type json_schema")
        return self


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
    use_beam_search: bool = False
    """vLLM's: the answers are the best of n beams; temperature, top_p, top_k and seed have no effect"""
    length_penalty: Annotated[float, Field(ge=-10, le=10)] = 1.0
    stop: Annotated[list[StopText], Field(max_length=16), FailFast(), BeforeValidator(listed)] = []
    stop_token_ids: Annotated[list[Count], Field(max_length=1000), FailFast()] = []
    ignore_eos: bool = False
    response_format: ResponseFormat | None = None
    structured_outputs: dict | None = None
    """vLLM's"""
    cache_salt: Annotated[str, Field(min_length=1, max_length=512)] | None = None
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

    neutral = {
        "stop": ("",),
        **dict.fromkeys(("frequency_penalty", "presence_penalty", "min_p", "min_tokens", "priority"), (0,)),
        "repetition_penalty": (1,),
        **dict.fromkeys(("include_stop_str_in_output", "return_token_ids"), (False,)),
        **dict.fromkeys(("skip_special_tokens", "spaces_between_special_tokens"), (True,)),
        "logit_bias": ({},),
    }

    # what the other endpoint has in place of these
    echo: bool = False
    """whether the prompt is a part of the answer"""
    chat: ClassVar[bool] = False

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
    def form(self) -> ResponseFormat | None:
        """The response_format, unless it is any text."""
        return None if self.response_format is None or self.response_format.type == "text" else self.response_format

    @validator(mode="after")
    def there_is_one_form(self):
        if self.form and self.structured_outputs is not None:
            raise wrong_field("structured_outputs", "structured_outputs and response_format: leave one of them out")
        return self

    @property
    def structure(self) -> dict | None:
        """What the answer must be, as the engine takes it."""
        if self.form is None:
            return self.structured_outputs
        return {"json": self.form.json_schema.definition} if self.form.json_schema else {"json_object": True}

    @property
    def may_call(self) -> bool:
        """Whether an answer may call functions."""
        return False

    @property
    def only_echoes(self) -> bool:
        """Whether the answer is the prompt alone, without scores."""
        return self.echo and self.max_tokens == 0 and self.alternatives is None


class ChatBody(Body):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1), FailFast()]
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    logprobs: bool = False
    top_logprobs: Count = 0
    chat_template_kwargs: Annotated[dict, PlainValidator(partial(template_variables, "it"))] = {}
    reasoning_effort: Literal["none"] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_SAMPLES), FailFast()] = []
    tool_choice: Annotated[str | Named, PlainValidator(read_tool_choice)] = "auto"
    parallel_tool_calls: bool = True
    metadata: dict | None = None
    prompt_cache_options: dict | None = None

    echo: Literal[False] = False
    chat: ClassVar[bool] = True
    neutral = Body.neutral | {
        "functions": ([],),
        "function_call": ("none", "auto"),
        **dict.fromkeys(("store", "continue_final_message", "add_special_tokens"), (False,)),
        "modalities": (["text"],),
        "verbosity": ("medium",),
        "service_tier": ("auto", "default"),
        "add_generation_prompt": (True,),
    }

    @validator(mode="after")
    def tools_go_together(self):
        choice, names = self.tool_choice, [tool.function.name for tool in self.tools]
        if choice in ("none", "auto"):
            return self
        wanted, missing = (choice.name, choice.name not in names) if isinstance(choice, Named) else (choice, not names)
        if missing:
            raise wrong_field("tool_choice", f"tool_choice is {shorten(wanted)}; tools has {shorten(names)}")
        if self.structure is not None:
            raise wrong_field("tool_choice", f"tool_choice is {shorten(wanted)}; leave out the answer's own form")
        return self

    @property
    def may_call(self) -> bool:
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def prompts(self) -> list[Prompt | Ids]:
        return [[message.for_template() for message in self.messages]]

    @property
    def new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return self.top_logprobs if self.logprobs or self.top_logprobs else None

    @property
    def variables(self) -> dict[str, Any]:
        """Of the chat template; the server's own hold for others."""
        thinking = {"enable_thinking": False} if self.reasoning_effort is not None else {}
        tools = [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in self.tools]
        return thinking | ({"tools": tools} if tools else {}) | self.chat_template_kwargs


class CompletionBody(Body):
    """The body of /v1/completions."""

    prompt: Annotated[list, PlainValidator(read_prompts)]
    max_tokens: Count = DEFAULT_TOKENS
    logprobs: Count | None = None
    context_length: Annotated[list[Positive], FailFast(), BeforeValidator(listed)] = []
    """how many of a prompt's tokens the adapter reads as its prompt: one number, or one for each prompt"""
    neutral = Body.neutral | {"best_of": (1,), "suffix": ("",), "add_special_tokens": (True,)}

    @validator(mode="after")
    def fields_go_together(self):
        answers = len(self.prompt) * self.n
        if answers > MAX_SAMPLES:
            raise wrong_field("prompt", f"prompt and n ask for {answers} answers; ask for at most {MAX_SAMPLES}")
        if self.max_tokens == 0 and not self.echo:
            raise wrong_field("max_tokens", "max_tokens is 0; give at least 1, or set echo for the prompt alone")
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
