"""Turns a line of a job's input into a request: a line of OpenAI's batch format, or the short form. Each has a key, a
hash of everything its answer depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from .. import __version__
from ..adapters.bank import AdapterBank, Entry
from ..adapters.loading_bank import LoadingBank
from ..backbone.content import backbone_content
from ..config import BASE
from ..inference.content import ANSWERS_VERSION, writing_content
from ..inference.sampling import derived_seed
from ..io.checks import near_name, shorten
from .engine import Engine
from .request import Request, check_request

#: Where the requests of a batch line go: chats, and texts.
URLS = ("/v1/chat/completions", "/v1/completions")
#: The fields of the short form.
FIELDS = (
    "custom_id prompt messages tenant max_new_tokens temperature top_k top_p seed stop n num_beams length_penalty "
    "structured_outputs".split()
)
#: Characters of an error in an answer.
MAX_ERROR = 1000


class Line(NamedTuple):
    """A line of the input, read."""

    number: int
    """from 1"""
    custom_id: str
    """line-N where the line gives none"""
    key: str
    request: Request | None
    """None if the line could not be read"""
    entry: Entry | None = None
    """the adapter that answers, which is part of the key"""
    error: str | None = None
    chat: bool = False


class Reader(NamedTuple):
    """What the lines of a job are read with."""

    engine: Engine
    defaults: Request
    """the fields that a line of the short form leaves out. Its seed is the job's"""
    settings: dict
    """what all answers depend on (job_settings)"""
    read_body: Callable[[dict, Engine], Request]
    """the request of a batch line; the server's protocol is in a package above this one"""

    def read(self, number: int, text: bytes) -> Line:
        """The request of a line, or its error: a wrong line must not end the job."""
        custom_id = f"line-{number}"
        try:
            fields = json.loads(text)
            custom_id = str(fields.get("custom_id") or custom_id)
            if "body" in fields:
                request, chat = self.read_body(fields, self.engine), fields["url"] == URLS[0]
            else:
                request, chat = short_form(fields, self.defaults), "messages" in fields
            if request.seed is None:
                request = replace(request, seed=derived_seed(self.defaults.seed or 0, number))
            content, entry = adapter_of(self.engine.bank, request.tenant)
            asked = vars(request) | {"id": None, "seed": request.seed if request.temperature > 0 else None}
            key = hashed([self.settings, content, asked, chat])
            return Line(number, custom_id, key, replace(request, id=number), entry, None, chat)
        except Exception as error:
            return Line(number, custom_id, hashed(text.decode(errors="replace")), None, None, error_text(error))


def job_settings(engine: Engine) -> dict:
    """What the answers of a job depend on next_tos its lines and adapters."""
    return {
        "version": [__version__, ANSWERS_VERSION],
        "backbone": backbone_content(engine.model),
        "tokenizer": writing_content(engine.tokenizer, engine.stop_ids),
        "chat_template": hashed(engine.tokenizer.chat_template),
    }


def short_form(fields: dict, defaults: Request) -> Request:
    """The request of a line such as {"prompt": "a", "tenant": "acme"}. Raises ValueError that names the field."""
    found = {name: value for name, value in fields.items() if value is not None or name == "tenant"}
    found.pop("custom_id", None)
    for name in found:
        if name not in FIELDS:
            raise ValueError(f"no field {shorten(name)}{near_name(name, FIELDS)}")
    if ("prompt" in found) == ("messages" in found):
        raise ValueError("prompt: give either prompt, a text, or messages, a list of turns")
    text, turns = found.pop("prompt", None), found.pop("messages", None)
    prompt = text if turns is None else turns
    if found.get("tenant") == BASE:
        found["tenant"] = None
    request = replace(defaults, prompt=prompt, **{"seed": None, **found})
    check_request(request)
    return replace(request, stop=request.stop_texts)


def adapter_of(bank: AdapterBank | None, tenant: str | None) -> tuple[str | None, Entry | None]:
    """A hash of the adapter that a tenant has now, with its dtype in the bank, and the adapter. A bank that loads
    adapters when they are needed never replaces one, so it gives None for the latter: lines that are answered already
    need no adapter."""
    if tenant is None:
        return None, None
    if bank is None:
        raise ValueError(f"tenant: {shorten(tenant)} is unknown, because the job has no adapters; leave it out")
    if isinstance(bank, LoadingBank):
        return bank.content(tenant) + bank.dtype, None
    entry = bank.entry(tenant)
    return entry.content + bank.dtype, entry


def error_text(error: Exception) -> str:
    """The text of an error as an answer holds it, cut to MAX_ERROR characters."""
    text = f"line: not JSON: {error}" if isinstance(error, json.JSONDecodeError) else str(error)
    return (text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}")[:MAX_ERROR]


def hashed(value: object) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:32]
