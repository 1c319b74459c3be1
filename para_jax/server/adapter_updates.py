"""Adapters that are loaded and unloaded while the server runs: POST /v1/load_lora_adapter and /v1/unload_lora_adapter,
with vLLM's fields. The adapters may be of any method that the bank takes.

Updates run in a worker thread, one at a time. A request that decodes keeps the adapter with which it began.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from ..config import BASE
from ..io.checks import printable, shorten
from ..io.hub import HUB_ID, is_inside_folder
from ..io.messages import say
from .api_keys import require_unlimited
from .body import ClientLeft, read_body
from .errors import ApiError, wrong_field
from .models import Models
from .protocol import Fields, only, read

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
#: Bytes of a request, the seconds in which it must come, and characters of a name and of a path, at most.
MAX_BODY, BODY_SECONDS, MAX_NAME, MAX_PATH = 2**16, 10, 128, 4096


class LoadBody(Fields):
    lora_name: Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
    lora_path: Annotated[str, Field(min_length=1, max_length=MAX_PATH)]
    load_inplace: bool = False
    base_model_name: Any = None
    """the gateway's LoRA syncer sends it"""
    is_3d_lora_weight: Annotated[Any, only(False, advice="leave it out")] = None


class UnloadBody(Fields):
    lora_name: Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
    lora_int_id: Annotated[Any, only(advice="leave it out; the name is enough")] = None


T = TypeVar("T", bound=Fields)


def routes(models: Models, root: str | Path, *, allow_hub: bool = False) -> list[BaseRoute]:
    """The two endpoints. A server that does not allow updates lacks them, so clients get 404, as with vLLM.

    Args:
        root: the folder with all adapters that may be loaded.
        allow_hub: whether a path may also be a hub id, user/name or user/name@revision.

    Raises OSError for a root that is not there.
    """
    updates = AdapterUpdates(models, root, allow_hub=allow_hub)
    return [Route(LOAD, updates.load, methods=["POST"]), Route(UNLOAD, updates.unload, methods=["POST"])]


class AdapterUpdates:
    def __init__(self, models: Models, root: str | Path, *, allow_hub: bool = False):
        self.models, self.root, self.allow_hub = models, Path(root).expanduser().resolve(strict=True), allow_hub
        self._alone = asyncio.Lock()

    async def load(self, request: Request) -> Response:
        """Adds a tenant, or replaces its adapter with load_inplace."""
        body = await body_of(request, LoadBody)
        base = body.base_model_name
        if base not in (None, "", BASE, self.models.base):
            raise wrong_field("base_model_name", f"base_model_name is {shorten(base)}; this is {self.models.base}")
        async with self._alone:
            return JSONResponse(await asyncio.to_thread(self._load, body.lora_name, body.lora_path, body.load_inplace))

    async def unload(self, request: Request) -> Response:
        """Removes a tenant."""
        body = await body_of(request, UnloadBody)
        async with self._alone:
            return JSONResponse(await asyncio.to_thread(self._unload, body.lora_name))

    # ------------------------------------------------------------------------------------------- in the worker thread

    def _load(self, name: str, path: str, inplace: bool) -> dict:
        bank = self.models.bank
        if bank is None:
            raise wrong_field("lora_name", "this server has the base model alone; start it with --adapters")
        self._check_name(name)
        replaced = name in bank
        if replaced and not inplace:
            message = f"{shorten(name)} is loaded already; send load_inplace: true to replace its adapter"
            raise wrong_field("lora_name", message)
        source = self._source(path)
        try:
            (bank.replace if replaced else bank.add)(name, source)
        except (ValueError, OSError) as error:
            raise wrong_field("lora_path", printable(str(error).replace(f"{self.root}/", ""), 1000)) from None
        self.models.note(name, path)
        entry = bank.entry(name)
        say(f"server: {'replaced' if replaced else 'loaded'} {shorten(name)}, {entry.method}, {entry.content[:12]}")
        message = f"Success: LoRA adapter '{name}' added successfully."
        return {
            "message": message,
            "lora_name": name,
            "method": entry.method,
            "content_sha256": entry.content,
            "replaced": replaced,
        }

    def _unload(self, name: str) -> dict:
        if self.models.bank is None or name not in self.models.bank:
            message = f"the adapter {shorten(name)} is not loaded"
            raise ApiError(404, message, param="lora_name", code="model_not_found")
        self.models.bank.remove(name)
        self.models.forget(name)
        say(f"server: unloaded {shorten(name)}")
        return {"message": f"Success: LoRA adapter '{name}' removed successfully.", "lora_name": name}

    def _check_name(self, name: str) -> None:
        try:
            self.models.require_free(name)
        except ValueError as error:
            raise wrong_field("lora_name", str(error)) from None
        if not name.isprintable() or "," in name or name != name.strip():
            message = f"lora_name is {shorten(name)}; leave out commas, control characters and spaces at the ends"
            raise wrong_field("lora_name", message)

    def _source(self, path: str) -> Path | str:
        """The folder that a path names, inside the root, with all links followed; or a hub id."""
        outside = wrong_field("lora_path", f"lora_path {shorten(path)} is not a folder inside --adapter-root")
        try:
            folder = (self.root / path).resolve()
            inside = self.root in folder.parents and not folder.is_symlink()  # from 3.13 on a circle of links stays one
            if inside and folder.is_dir():
                return folder
        except (OSError, ValueError, RuntimeError):  # NUL, too long, links in a circle
            raise outside from None
        if self.allow_hub and (named := HUB_ID.fullmatch(path)) and named["user"] and not is_inside_folder(path):
            return path  # a folder of this name in the working directory would come first, so there must be none
        if inside:
            raise ApiError(
                404,
                f"lora_path {shorten(path)}: there is no such folder in --adapter-root; a path is relative to it",
                param="lora_path",
            )
        raise outside


async def body_of(request: Request, model: type[T]) -> T:
    """The body of an update, for a client that may make it."""
    require_unlimited(request.state.access)
    try:
        return read(model, await read_body(request.scope, request.receive, most=MAX_BODY, seconds=BODY_SECONDS))
    except ClientLeft:
        raise ApiError(400, "the client left", code="client_left") from None
