"""Fields: the pydantic base of the bodies of requests. Errors are ApiError 400 that name the field and its value."""

from __future__ import annotations

import difflib
from functools import partial
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ..io.checks import shorten
from .errors import ApiError, wrong_field

WHOLE = 2**31 - 1
NOT_COMPUTED = "it is not supported; leave it out"

Name = Annotated[str, Field(min_length=1, max_length=1000)]
Label = Annotated[str, Field(max_length=1000)]
Count = Annotated[int, Field(ge=0, le=WHOLE)]


class Fields(BaseModel):
    """Whole numbers, texts and truth values are those of JSON, without conversion."""

    model_config = ConfigDict(extra="forbid", strict=True)


T = TypeVar("T", bound=Fields)


def read_fields(model: type[T], found: dict, inside: str = "") -> T:
    """The fields of an object. One that is null counts as missing, because OpenAI's clients send such fields.

    Args:
        inside: the name of the field that holds the object.
    """
    found, place = {name: value for name, value in found.items() if value is not None}, f"{inside}." if inside else ""
    for name in found:
        if name not in model.model_fields:  # at the first: pydantic lists all
            near = difflib.get_close_matches(name[:100], model.model_fields, n=1)
            advice = f"; did you mean {near[0]}?" if near else ""
            raise wrong_field(place + shorten(name)[1:-1], f"no field {shorten(place + name)}{advice}")
    try:
        return model.model_validate(found)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
    name = str(problem["loc"][0])
    if name not in found:
        raise wrong_field(place + name, f"{place}{name} is missing")
    ours = problem.get("ctx", {}).get("error")
    advice = problem["msg"].replace("Input should", "it must").replace("String should", "it must")
    raise wrong_value(place + name, found[name], str(ours or advice))


def wrong_value(place: str, value: object, advice: str) -> ApiError:
    return wrong_field(place, f"{place} is {shorten(value)}; {advice}")


def only(*allowed: Any, advice: str = NOT_COMPUTED) -> AfterValidator:
    """The check of a field that the server does not implement. It allows the values that change nothing."""
    return AfterValidator(partial(refuse_others, allowed, advice))


def refuse_others(allowed: tuple, advice: str, value: Any) -> Any:
    if not any(type(value) is type(each) and value == each for each in allowed):
        raise ValueError(advice)
    return value
