"""Adapters that are loaded and unloaded while the server runs: POST /v1/load_lora_adapter and /v1/unload_lora_adapter,
with vLLM's fields. The adapters may be of any method that the bank takes.

Loading runs in a worker thread, one at a time. A request that decodes keeps the adapter with which it began.
"""

from __future__ import annotations

import asyncio
import difflib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from ..config import expanded, printable, shorten
from ..hub import HUB_ID, is_inside_folder
from ..messages import say
from .api_keys import require_unlimited
from .errors import ApiError, wrong_field
from .models import Models

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
#: Bytes of a request, and characters of a tenant's name, at most.
MAX_BODY, MAX_NAME = 2**16, 128


def routes(models: Models, root: str | Path, *, allow_hub: bool = False) -> list[BaseRoute]:
    """The two endpoints. A server that does not allow updates lacks them, so clients get 404, as with vLLM.

    Args:
        root: the folder with all adapters that may be loaded.
        allow_hub: whether a path may also be a hub id, user/name or user/name@revision.

    Raises ValueError for a root that is not a folder.
    """
    updates = AdapterUpdates(models, root, allow_hub=allow_hub)
    return [Route(LOAD, updates.load, methods=["POST"]), Route(UNLOAD, updates.unload, methods=["POST"])]


class AdapterUpdates:
    def __init__(self, models: Models, root: str | Path, *, allow_hub: bool = False):
        place = expanded(root)
        if not isinstance(place, Path) or not place.is_dir():
            raise ValueError(f"--adapter-root {root} is not a folder of this machine\ngive the folder of the adapters")
        self.models, self.root, self.allow_hub = models, place.resolve(), allow_hub
        self._alone = asyncio.Lock()

    async def load(self, request: Request) -> Response:
        """Adds a tenant, or replaces its adapter with load_inplace."""
        require_unlimited(request.state.access)
        fields = await read_fields(request, LOAD_FIELDS)
        return await self._in_worker(self._load, **fields)

    async def unload(self, request: Request) -> Response:
        """Removes a tenant."""
        require_unlimited(request.state.access)
        fields = await read_fields(request, UNLOAD_FIELDS)
        return await self._in_worker(self._unload, **fields)

    async def _in_worker(self, work: Callable[..., dict], **fields) -> Response:
        async with self._alone:
            return JSONResponse(await asyncio.to_thread(work, **fields))

    # ------------------------------------------------------------------------------------------------ in the worker thread

    def _load(self, lora_name: str, lora_path: str, load_inplace: bool, base_model_name: str | None) -> dict:
        bank = self.models.bank
        if bank is None:
            raise wrong_field("lora_name", "this server has the base model alone; start it with --adapters")
        self._check_name(lora_name)
        if base_model_name not in (None, "", self.models.base):
            message = f"base_model_name is {shorten(base_model_name)}; this server has {self.models.base}"
            raise wrong_field("base_model_name", message)
        replaced = lora_name in bank
        if replaced and not load_inplace:
            message = f"{shorten(lora_name)} is loaded already; send load_inplace: true to replace its adapter"
            raise wrong_field("lora_name", message)
        source = self._source(lora_path)
        try:
            (bank.replace if replaced else bank.add)(lora_name, source)
        except (ValueError, OSError) as error:
            raise wrong_field("lora_path", printable(str(error).replace(f"{self.root}/", ""), 1000)) from None
        self.models.note(lora_name, lora_path)
        entry = bank.entry(lora_name)
        say(
            f"server: {'replaced' if replaced else 'loaded'} {shorten(lora_name)}, {entry.method}, {entry.content[:12]}"
        )
        return {
            "message": f"Success: LoRA adapter '{lora_name}' added successfully.",
            "lora_name": lora_name,
            "method": entry.method,
            "content": entry.content,
            "replaced": replaced,
        }

    def _unload(self, lora_name: str, lora_int_id: None) -> dict:
        if self.models.bank is None or lora_name not in self.models.bank:
            message = f"the adapter {shorten(lora_name)} is not loaded"
            raise ApiError(404, message, param="lora_name", code="model_not_found")
        self.models.bank.remove(lora_name)
        self.models.forget(lora_name)
        say(f"server: unloaded {shorten(lora_name)}")
        return {"message": f"Success: LoRA adapter '{lora_name}' removed successfully.", "lora_name": lora_name}

    def _check_name(self, name: str) -> None:
        try:
            self.models.require_free(name)
        except ValueError as error:
            raise wrong_field("lora_name", str(error)) from None
        if len(name) > MAX_NAME or not name.isprintable() or "," in name or name != name.strip():
            message = (
                f"lora_name is {shorten(name)}; give 1 to {MAX_NAME} characters, no comma and no control character"
            )
            raise wrong_field("lora_name", message)

    def _source(self, text: str) -> Path | str:
        """The folder that a path names, inside the root, with all links followed; or a hub id."""
        outside = wrong_field("lora_path", f"lora_path {shorten(text)} is not a folder inside --adapter-root")
        try:
            folder = (self.root / text).resolve()
            inside = self.root in folder.parents
            if inside and folder.is_dir():
                return folder
        except (OSError, ValueError, RuntimeError):  # NUL, half a surrogate pair, too long, a circle of links
            raise outside from None
        if self.allow_hub and HUB_ID.fullmatch(text):
            if is_inside_folder(text):  # load_adapter would prefer that folder, which is not in the root
                raise outside
            return text
        if not inside:
            raise outside
        raise ApiError(404, f"lora_path {shorten(text)}: there is no such folder", param="lora_path", code="not_found")


# ------------------------------------------------------------------------------------------------------------- the fields

#: Each field: its type, and its value if it is left out (... : it must be there).
LOAD_FIELDS = {
    "lora_name": (str, ...),
    "lora_path": (str, ...),
    "load_inplace": (bool, False),
    "base_model_name": (str | None, None),
}
UNLOAD_FIELDS = {"lora_name": (str, ...), "lora_int_id": (type(None), None)}


async def read_fields(request: Request, known: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
    """The fields of a request's body. Raises ApiError for one that is wrong."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a web page of another site can send other types without asking first
        raise ApiError(415, f"content-type is {shorten(kind)}; send application/json")
    body = b""
    try:
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY:
                raise ApiError(413, f"the body is larger than {MAX_BODY} bytes")
        given = json.loads(body, parse_constant=refuse_constant)
    except ClientDisconnect:
        raise ApiError(400, "the client left", code="client_left") from None
    except (ValueError, RecursionError) as error:
        raise wrong_field(None, f"the body is not JSON: {printable(str(error), 200)}") from None
    if not isinstance(given, dict):
        raise wrong_field(None, "the body is not a JSON object")
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            advice = f"; did you mean {near[0]}?" if near else f"; the fields are {', '.join(known)}"
            raise wrong_field(printable(name, 100), f"no field {shorten(name)}{advice}")
    return {name: checked(name, given.get(name, default), wanted) for name, (wanted, default) in known.items()}


def checked(name: str, value: Any, wanted: Any) -> Any:
    if value is ... or value == "" and wanted is str:
        raise wrong_field(name, f"{name} is missing")
    if not isinstance(value, wanted):
        words = {str: "a text", bool: "true or false", type(None): "null"}
        raise wrong_field(name, f"{name} is {shorten(value)}; give {words.get(wanted, 'a text or null')}")
    return value


def refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")
