"""A line of a job's input becomes requests, one for each sample, each with a key of all that its answer depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import NamedTuple

from ..adapters.bank import AdapterBank, Entry
from ..config import require
from ..data.examples import require_unicode
from ..inference.content import ANSWERS_VERSION, backbone_content, writing_content
from ..inference.sampling import derived_seed
from .answers import MAX_LINE
from .engine import Engine
from .request import Request, check_request

FIELDS = ("prompt", "messages", "tenant", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop", "n", "id")
#: The tenant that is the base model, as on the command line; null is too.
BASE = "base"
#: Levels of lists and objects in a line, and characters of its id as JSON.
MAX_DEPTH, MAX_ID = 64, 2**16
#: Characters of an error in an answer.
MAX_ERROR = 1000


class LineSample(NamedTuple):
    """One sample that a line asks for, or a line's error."""

    line: int
    """from 1"""
    index: int
    key: str
    """of everything that the answer depends on; for an error, of the line"""
    id: object
    """the line's own"""
    request: Request | None
    """None if the line could not be read"""
    entry: Entry | None = None
    """the adapter that answers, which is part of the key"""
    error: str | None = None


class Answerer(NamedTuple):
    """Who answers a job's lines."""

    bank: AdapterBank | None
    text: str
    """a hash of the backbone, the tokenizer and the version of para_jax's answers"""
    chat: str
    """the same, with the chat template"""


def answerer(engine: Engine) -> Answerer:
    """Raises ValueError if the bank has a tenant called `base`, whom no line could name."""
    taken = engine.bank is not None and BASE in engine.bank
    require(not taken, "bank: tenant", BASE, "another name: in a job's lines this one is the base model")
    tokenizer, stops = engine.tokenizer, engine.stop_ids
    text = hashed([ANSWERS_VERSION, backbone_content(engine.model), writing_content(tokenizer, stops)])
    return Answerer(engine.bank, text, hashed([text, tokenizer.chat_template]))


def samples(number: int, line: bytes | None, defaults: Request, by: Answerer) -> list[LineSample]:
    """The samples of a line, or one with the line's error, whatever is wrong with it.

    Args:
        number: of the line, from 1.
        line: None: longer than MAX_LINE.
        defaults: what holds for a line that does not say it itself. Its seed is the job's, from which each line without
            a seed derives its own.
    """
    id, request = None, None
    try:
        found = json_object(line)
        given = found.pop("id", None)
        require_small_id(given)
        id = given
        request = request_of(number, found, defaults)
        entry = entry_of(by.bank, request.tenant)
        shared = line_key(by, id, request, entry)
        seeds = [(request.seed + index) % 2**32 for index in range(request.n)]  # pyright: ignore[reportOptionalOperand]
        keys = [hashed([shared, seed]) if request.temperature > 0 else shared for seed in seeds]
        asked = [replace(request, n=1, seed=seed) for seed in seeds]
        return [LineSample(number, i, keys[i], id, asked[i], entry) for i in range(request.n)]
    except Exception as error:  # a line's fault is its own, never the job's
        key = hashlib.sha256(line or b"").hexdigest()[:32]
        return [LineSample(number, 0, key, id, request, None, error_text(error))]


def line_key(by: Answerer, id: object, request: Request, entry: Entry | None) -> str:
    """A hash of all that the answers to a request depend on, apart from the seeds of what is drawn, and of what they
    repeat (id and tenant). None of them depends on the engine's max_length."""
    asked = {field.name: getattr(request, field.name) for field in fields(request) if field.name not in ("n", "seed")}
    asked |= {"id": id, "stop": sorted(set(request.stop_texts))}
    asked |= {"temperature": float(request.temperature), "top_p": float(request.top_p)}
    if request.temperature == 0:
        asked |= {"top_k": None, "top_p": None}
    adapter = None if entry is None or by.bank is None else [entry.content, by.bank.dtype]
    return hashed([by.text if isinstance(request.prompt, str) else by.chat, adapter, asked])


def error_text(error: Exception) -> str:
    """What an answer says about an error, bounded."""
    text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return text[:MAX_ERROR]


def json_object(line: bytes | None) -> dict:
    if line is None:
        raise ValueError(f"line: longer than {MAX_LINE} bytes; split it")
    try:
        found = json.loads(line)
    except RecursionError:
        raise ValueError(f"line: nested too deeply; at most {MAX_DEPTH} levels are possible") from None
    except ValueError as error:
        raise ValueError(f"line: not JSON: {str(error)[:100]}") from None
    if not isinstance(found, dict):
        raise ValueError(f"line: expected a JSON object, found {type(found).__name__}")
    return found


def request_of(number: int, found: dict, defaults: Request) -> Request:
    """The request of a line's object, with a seed. Raises ValueError that names the field."""
    require_flat("line", found)
    require_unicode("line", found)
    unknown = [name for name in found if name not in FIELDS]
    require(not unknown, "fields", unknown[:3], "some of " + ", ".join(FIELDS))
    if ("prompt" in found) == ("messages" in found):
        raise ValueError("prompt: expected either prompt, a text, or messages, a list of turns")
    prompt = found.pop("messages") if "messages" in found else found.pop("prompt")
    require(isinstance(prompt, (str, list)), "prompt", prompt, "a text")
    found["tenant"] = found.get("tenant", defaults.tenant)
    if found["tenant"] == BASE:
        found["tenant"] = None
    if isinstance(found.get("stop"), list):
        found["stop"] = tuple(found["stop"])
    if found.get("seed") is None:
        found["seed"] = derived_seed(defaults.seed or 0, number)
    request = replace(defaults, prompt=prompt, **found)
    check_request(request)
    return replace(request, stop=request.stop_texts)


def entry_of(bank: AdapterBank | None, tenant: str | None) -> Entry | None:
    """The adapter that a tenant has now. Raises ValueError for one who is not known."""
    if tenant is None:
        return None
    if bank is None:
        raise ValueError(f"tenant: {tenant[:80]!r} is not known, because the job has no adapters; leave it out")
    try:
        return bank.entry(tenant)
    except ValueError as error:
        raise ValueError(f"tenant: {error}") from None


def require_small_id(id: object) -> None:
    """Raises ValueError for an id that an answer could not repeat."""
    require_flat("id", id)
    require_unicode("id", id)
    try:
        length = len(json.dumps(id, allow_nan=False))
    except ValueError:
        raise ValueError("id: holds a number that is not finite, which JSON lacks; give it as a text") from None
    require(length <= MAX_ID, "id: characters as JSON", length, f"at most {MAX_ID}")


def require_flat(name: str, value: object) -> None:
    """Raises ValueError for a value that is nested too deeply, without recursion."""
    level, depth = [value], 0
    while level := [child for one in level for child in children(one)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"{name}: nested too deeply; at most {MAX_DEPTH} levels are possible")


def children(value: object) -> Iterable:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def hashed(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]
