"""Turns a line of a job's input into requests, one per sample. Each has a key: a hash of everything its answer depends
on."""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import replace
from typing import NamedTuple

from .. import __version__
from ..adapters.bank import AdapterBank, Entry
from ..adapters.loading_bank import LoadingBank
from ..backbone.content import backbone_content
from ..config import BASE
from ..data.rows import json_problem
from ..inference.content import ANSWERS_VERSION, writing_content
from ..inference.sampling import derived_seed
from ..io.checks import shorten, without_repeats
from ..io.untrusted import MAX_DEPTH, require_unicode
from .answers import MAX_LINE
from .engine import Engine
from .request import Request, check_request

FIELDS = ("prompt", "messages", "tenant", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop", "n", "id")
#: Fields of a request that no job has: its answers don't show them.
NOT_IN_JOBS = ("logprobs", "prompt_logprobs", "context_length", "cache_salt")
#: Fields that hold whole numbers.
WHOLE = ("max_new_tokens", "top_k", "n", "seed")
#: Names that other servers use for a field.
OTHER_NAMES = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens", "model": "tenant"}
#: Characters of a line's id as JSON.
MAX_ID = 2**16
#: Characters of an error in an answer.
MAX_ERROR = 1000


class LineSample(NamedTuple):
    """One sample that a line asks for, or a line's error."""

    line: int
    """from 1"""
    index: int
    key: str
    """a hash of everything that the answer depends on; for an error, of the line"""
    id: object
    """as the line gives it"""
    request: Request | None
    """None if the line could not be read"""
    entry: Entry | None = None
    """the adapter that answers, which is part of the key"""
    error: str | None = None


class KeyParts(NamedTuple):
    """What the answers of a job depend on besides its lines."""

    bank: AdapterBank | None
    text: str
    """a hash of the backbone, the tokenizer and the version of para_jax's answers"""
    chat: str
    """the same, with the chat template"""


def key_parts(engine: Engine) -> KeyParts:
    """The KeyParts of an engine. Raises ValueError if its bank has a tenant called `base`, which no line could name."""
    if engine.bank is not None and BASE in engine.bank:
        raise ValueError(f"bank: the tenant {BASE!r} needs another name; in a job's lines it is the base model")
    tokenizer, stops = engine.tokenizer, engine.stop_ids
    text = hashed([ANSWERS_VERSION, backbone_content(engine.model), writing_content(tokenizer, stops)])
    template = tokenizer.chat_template
    return KeyParts(engine.bank, text, hashed([text, template, *roles_in_template(tokenizer)]))


def roles_in_template(tokenizer) -> list[tuple[str, str]]:
    """The special tokens that the chat template writes by their roles, such as bos_token: (role, token)."""
    special = tokenizer.special_tokens_map.items()
    return sorted((role, str(token)) for role, token in special if role in str(tokenizer.chat_template))


def job_settings(engine: Engine, defaults: Request) -> dict:
    """What all shards of a job must share, so that their answers are those of one worker. Values that an error shows
    are short, the others are hashed."""
    tokenizer, bank = engine.tokenizer, engine.bank
    roles = roles_in_template(tokenizer)
    left_out = ("prompt", "id", "alone", *NOT_IN_JOBS)
    asked = {name: value for name, value in vars(defaults).items() if name not in left_out}
    held = sorted(bank.identities()) if bank is not None else []
    return {
        "version": [__version__, ANSWERS_VERSION],
        "backbone": backbone_content(engine.model),
        "tokenizer": writing_content(tokenizer, engine.stop_ids),
        "chat_template": hashed([tokenizer.chat_template, *roles] if roles else tokenizer.chat_template),
        "adapters": [len(held), hashed([held, bank.dtype if bank is not None else None])],
        "max_length": engine.max_length,
        "defaults": json.loads(json.dumps(asked)),
    }


def samples(number: int, line: bytes | None, defaults: Request, by: KeyParts) -> list[LineSample]:
    """The samples of a line, or one sample with the line's error.

    Args:
        number: of the line, from 1.
        line: None if it is longer than MAX_LINE.
        defaults: the fields that the line leaves out. Its seed is the job's: a line without a seed derives one from it.
    """
    id, request = None, None
    try:
        fields = json_object(line)
        given = fields.pop("id", None)
        require_small_id(given)
        id = given
        request = request_of(number, fields, defaults)
        content, entry = adapter_of(by.bank, request.tenant)
        shared = line_key(by, id, request, content)
        found = []
        for index in range(request.n):
            seed = request.sampling.for_index(index).seed
            key = hashed([shared, seed]) if request.temperature > 0 else shared
            found.append(LineSample(number, index, key, id, replace(request, n=1, seed=seed), entry))
        return found
    except Exception as error:  # a wrong line must not end the job
        key = hashlib.sha256(line or b"").hexdigest()[:32]
        return [LineSample(number, 0, key, id, request, None, error_text(error))]


def line_key(by: KeyParts, id: object, request: Request, content: str | None) -> str:
    """A hash of everything that the answers to a request depend on apart from the seeds, and of what they repeat (id,
    tenant). The engine's max_length changes no answer.

    Args:
        content: a hash of the adapter; None for the base model.
    """
    left_out = ("n", "seed", *NOT_IN_JOBS, *(["alone"] if request.strip else []))
    asked = {name: value for name, value in vars(request).items() if name not in left_out}
    asked |= {"id": id, "stop": sorted(set(request.stop_texts))}
    asked |= {"temperature": float(request.temperature), "top_p": float(request.top_p)}
    if request.temperature == 0:
        asked |= {"top_k": None, "top_p": None}
    adapter = None if content is None or by.bank is None else [content, by.bank.dtype]
    return hashed([by.text if isinstance(request.prompt, str) else by.chat, adapter, asked])


def error_text(error: Exception) -> str:
    """The text of an error as an answer holds it, cut to MAX_ERROR characters."""
    text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return text[:MAX_ERROR]


def json_object(line: bytes | None) -> dict:
    if line is None:
        raise ValueError(f"line: longer than {MAX_LINE} bytes; split it")
    try:
        found = json.loads(line, object_pairs_hook=without_repeats)
    except RecursionError:
        raise ValueError(f"line: it nests deeper than {MAX_DEPTH} levels") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"line: not JSON: {json_problem(error)}") from None
    except ValueError as error:  # a name that comes twice, or a number of too many digits
        raise ValueError(f"line: {json_problem(error)}") from None
    if not isinstance(found, dict):
        raise ValueError(f"line: a JSON {type(found).__name__}; write an object")
    return found


def request_of(number: int, found: dict, defaults: Request) -> Request:
    """The request of a line's object, with a seed. Raises ValueError that names the field."""
    require_unicode("line", found)
    if {"body", "custom_id"} <= found.keys():
        raise ValueError(
            "fields: a line of OpenAI's batch format; write the fields of `body` themselves, with custom_id as id, "
            "model as tenant and max_tokens as max_new_tokens"
        )
    found = {name: value for name, value in found.items() if value is not None or name == "tenant"}
    unknown = [name for name in found if name not in FIELDS]
    if unknown:
        raise ValueError("fields: " + "; ".join(map(unknown_field, unknown[:3])))
    if ("prompt" in found) == ("messages" in found):
        raise ValueError("prompt: give either prompt, a text, or messages, a list of turns")
    if "messages" in found and not isinstance(found["messages"], list):
        raise ValueError(f"messages: {shorten(found['messages'])} is not a list of turns; give a text as prompt")
    prompt = found.pop("messages") if "messages" in found else found.pop("prompt")
    if not isinstance(prompt, (str, list)) or (prompt and isinstance(prompt[0], int)):  # token ids
        raise ValueError(f"prompt: {shorten(prompt)} is not a text; write one")
    found["tenant"] = found.get("tenant", defaults.tenant)
    if found["tenant"] == BASE:
        found["tenant"] = None
    if isinstance(found.get("stop"), list):
        found["stop"] = tuple(found["stop"])
    for name in WHOLE:  # a table writes 8 as 8.0 where other rows have no value
        if isinstance(found.get(name), float) and found[name].is_integer():
            found[name] = int(found[name])
    if "seed" not in found:
        found["seed"] = derived_seed(defaults.seed or 0, number)
    request = replace(defaults, prompt=prompt, **found)
    check_request(request)
    return replace(request, stop=request.stop_texts)


def unknown_field(name: str) -> str:
    """Says that a field does not exist, and which one was perhaps meant."""
    nearest = difflib.get_close_matches(OTHER_NAMES.get(name, name), FIELDS, n=1)
    meant = f"did you mean {nearest[0]}?" if nearest else f"the fields are {', '.join(FIELDS)}"
    return f"no field {shorten(name, 80)}; {meant}"


def adapter_of(bank: AdapterBank | None, tenant: str | None) -> tuple[str | None, Entry | None]:
    """A hash of the adapter that a tenant has now, and the adapter. A bank that loads adapters when they are needed
    never replaces one, so it gives None for the latter: lines that are answered already need no adapter.

    Raises ValueError for an unknown tenant.
    """
    if tenant is None:
        return None, None
    if bank is None:
        raise ValueError(f"tenant: {tenant[:80]!r} is unknown, because the job has no adapters; leave it out")
    try:
        if isinstance(bank, LoadingBank):
            return bank.content(tenant), None
        entry = bank.entry(tenant)
        return entry.content, entry
    except ValueError as error:
        raise ValueError(f"tenant: {error}") from None


def require_small_id(id: object) -> None:
    """Raises ValueError for an id that an answer could not repeat."""
    require_unicode("id", id)
    try:
        length = len(json.dumps(id, allow_nan=False))
    except ValueError:
        raise ValueError("id: a number in it is not finite, which JSON lacks; give it as a text") from None
    if length > MAX_ID:
        raise ValueError(f"id: {length} characters as JSON are too many; use at most {MAX_ID}")


def hashed(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]
