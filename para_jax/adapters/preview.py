"""What is known of an adapter before its weights are loaded: its config, and a hash of its files.

With it, thousands of adapters are divided among workers, and a bank is made for all of them, while each worker loads
its own only.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax

from ..config import ModelConfig
from ..io.checks import expanded
from ..io.hub import resolve_adapter
from ..io.storage.bucket import BucketPath, Place
from ..io.storage.cache import read
from ..io.untrusted import MAX_JSON_BYTES, json_mapping
from .adapter import Adapter, abstract
from .files import CONFIG, WEIGHTS, load_adapter, own_file
from .formats.own import read_own_config, require_same_backbone
from .methods import form_named
from .padding import held_bytes

#: Adapters that are looked at together.
CONCURRENCY = 16


class Preview(NamedTuple):
    place: Place
    """its folder, on this host or in a bucket"""
    config: Any
    """of the adapter in the form that a bank stacks (Adapter.normal)"""
    nbytes: int
    """of host memory that it takes in a float32 bank, at most"""
    digest: str
    """sha256 of adapter_config.json and of the weights' md5: the same for equal files, on a disk and in a bucket"""


def previews(sources: Iterable[str], model_config: ModelConfig) -> list[Preview]:
    """Previews of adapters, by folder or hub id. Those in PEFT's format are loaded for this, because their sites and
    rank follow from their weights, and hub ids are fetched.

    Raises ValueError, naming the source, for a config that is damaged or for another backbone.
    """
    sources = list(sources)
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        files = list(pool.map(identify, sources))
    known: dict[Any, tuple[Any, int]] = {}  # most adapters share their config
    found = []
    for source, (place, config, digest) in zip(sources, files, strict=True):
        try:
            found.append(Preview(place, *in_bank(place, config, model_config, known), digest))
        except ValueError as error:
            raise error if str(source) in str(error) else ValueError(f"{source}: {error}") from None
    return found


def load_previewed(found: Preview, model_config: ModelConfig, *, model=None) -> Adapter:
    """The adapter that was looked at. Raises ValueError as load_adapter does, and if another one has replaced it: what
    is known of the first one would be wrong."""
    adapter = load_adapter(found.place, model_config, model=model)
    # Compared after loading, so that no change between the two is missed.
    if identify(str(found.place))[2] != found.digest:
        raise ValueError(f"{found.place}: another adapter has replaced it since this command began; run it again")
    return adapter


def identify(source: str) -> tuple[Place, bytes, str]:
    """An adapter's folder, its adapter_config.json, and the hash of its files."""
    folder = expanded(source)
    if not isinstance(folder, BucketPath):
        folder = resolve_adapter(source)
        for name in (CONFIG, WEIGHTS):
            own_file(folder, name)
    config = read(folder / CONFIG, MAX_JSON_BYTES)
    if config is None:
        raise ValueError(f"{source} is not an adapter: it has no {CONFIG}")
    return folder, config, hashlib.sha256(md5_of(folder / WEIGHTS).encode() + config).hexdigest()


def md5_of(file: Place) -> str:
    """The md5 of a file in base64, as Cloud Storage keeps it: there it takes no reading of the file."""
    if isinstance(file, BucketPath):
        return file.stat().md5
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False))
    return b64encode(digest.digest()).decode()


def in_bank(place: Place, data: bytes, model_config: ModelConfig, known: dict[Any, tuple[Any, int]]) -> tuple[Any, int]:
    """The config that a bank stacks the adapter under, and the bytes of host memory that it takes there."""
    found = json_mapping(data)
    method = form_named(found.get("peft_type"))
    if method is None or method.in_peft:
        adapter = load_adapter(place, model_config)
        normal = adapter.normal(model_config)
        return normal.config, held_bytes(adapter, normal)
    config, backbone = read_own_config(method.config, found)
    require_same_backbone(backbone, model_config, found.get("base_model_name_or_path"))
    if config not in known:
        adapter = abstract(method.adapter, config, model_config)
        normal = jax.eval_shape(lambda one: one.normal(model_config), adapter)
        known[config] = normal.config, held_bytes(adapter, normal)
    return known[config]
