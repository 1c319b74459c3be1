"""The adapters of an evaluation, by name. More than fit the memory are evaluated in passes: the next pass is loaded
while one is answered."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from ..adapters.adapter import Adapter
from ..adapters.bank import AdapterBank
from ..adapters.files import load_adapter
from ..adapters.names import named_adapters
from ..adapters.preview import Preview, load_previewed, previews
from ..config import ModelConfig, listed
from ..io.messages import say
from ..io.storage.bucket import BucketPath

#: What names an adapter's folder.
PLACES = (str, Path, BucketPath)


class Adapters(NamedTuple):
    """The adapters of an evaluation."""

    sources: dict[str, str | None]
    """by name: a folder or hub id; None for an adapter that is in memory already"""
    digests: dict[str, str]
    """a hash of each, which decides about its shard"""
    previews: Mapping[str, Preview]
    """of those that are loaded in passes"""
    bank: AdapterBank | None
    """holds all of them, if none is loaded in passes"""


def find_adapters(adapters: Any, config: ModelConfig) -> Adapters:
    """The adapters that `evaluate` is given. Folders are looked at, and not loaded yet.

    Raises ValueError for what is no adapter, or one of another backbone.
    """
    if adapters is None:
        return Adapters({}, {}, {}, None)
    if isinstance(adapters, Adapter):
        adapters = {"adapter": adapters}
    if not isinstance(adapters, AdapterBank | Mapping):
        places = [adapters] if isinstance(adapters, PLACES) else listed(adapters)
        if places is None or not all(isinstance(one, PLACES) for one in places):
            kind = type(adapters).__name__
            raise ValueError(f"adapters is a {kind}; give an adapter, an AdapterBank, {{name: adapter}}, or folders")
        adapters = named_adapters(list(map(str, places)))
    if isinstance(adapters, Mapping) and any(isinstance(one, Adapter) for one in adapters.values()):
        held = {k: one if isinstance(one, Adapter) else load_adapter(one, config) for k, one in adapters.items()}
        adapters = AdapterBank.holding(held, config)
    if isinstance(adapters, AdapterBank):
        if adapters.model_config != config:
            raise ValueError("adapters: the AdapterBank is made for another backbone; make it with model.config")
        return Adapters(dict.fromkeys(adapters.names), dict(adapters.identities()), {}, adapters)
    sources = {name: str(one) for name, one in adapters.items()}
    found = dict(zip(sources, previews(sources.values(), config), strict=True))
    return Adapters(dict(sources), {name: one.digest for name, one in found.items()}, found, None)


def bank_and_passes(
    adapters: Adapters, names: Sequence[str], model, memory: int, who: str
) -> tuple[AdapterBank | None, Generator[tuple[str, ...]]]:
    """The bank, and an iterator over the passes. It gives the names of a pass once the bank holds its adapters.

    Args:
        names: those of this shard.
        memory: bytes that all adapters in memory may take.
        who: the start of the message, such as "shard 0/3: ".
    """
    if not adapters.previews:
        return adapters.bank, (tuple(names) for _ in range(1))
    found = adapters.previews
    bank = AdapterBank.fitting([one.config for one in found.values()], model.config, capacity=2 * len(found))
    # two passes are in memory: one that is answered, and one that is loaded
    most = max(1, memory // (2 * max(one.nbytes for one in found.values())))
    count = f"{len(names)} of {len(found)} adapters, {most} at once"
    say(f"{who}{count}; {bank.carried}" if bank.carried else f"{who}{count}")
    return bank, in_passes(bank, names, lambda name: load_previewed(found[name], model.config, model=model), most)


def in_passes(
    bank: AdapterBank, names: Sequence[str], load: Callable[[str], Adapter], most: int
) -> Generator[tuple[str, ...]]:
    """The names in parts of at most `most`, about equally many in each. While the caller works with a part, the bank
    holds its adapters, and the next ones are loaded.

    Args:
        bank: with room for two parts.
        load: gives the adapter of a name. It runs in another thread, and what it raises is raised here.
    """
    count = max(1, -(-len(names) // most))
    cuts = [len(names) * i // count for i in range(count + 1)]
    parts = [tuple(names[start:end]) for start, end in zip(cuts[:-1], cuts[1:], strict=True)]
    ended = threading.Event()

    def add(part: Sequence[str]) -> None:
        for name in part:
            if ended.is_set():
                return
            bank.add(name, load(name))

    with ThreadPoolExecutor(1, thread_name_prefix="adapters") as pool:
        try:
            loading = [pool.submit(add, part) for part in parts[:1]]
            for i, part in enumerate(parts):
                loading[i].result()
                loading += [pool.submit(add, later) for later in parts[i + 1 : i + 2]]
                yield part
                for name in part:
                    bank.remove(name)
        finally:
            ended.set()
