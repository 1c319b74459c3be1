"""Which adapters a command serves, and which of them answers each prompt."""

from __future__ import annotations

import itertools

BASE = "base"  # the tenant that is the base model


def named_adapters(given: list[str]) -> dict[str, str]:
    """{name: folder or hub id} of --adapters DIR or NAME=DIR; a folder is called by its own name, that of a run
    (RUN/adapter) by the run's, and a run of many tenants stands for all of them."""
    from ..config import expanded

    sources: dict[str, str] = {}
    for text in itertools.chain.from_iterable(tenants_of_run(one) or [one] for one in given):
        name, equals, source = text.partition("=")
        if not equals or expanded(text).is_dir():
            folder = expanded(text)
            called = folder.resolve().parent if folder.resolve().name == "adapter" else folder.resolve()
            name, source = called.name if folder.is_dir() else text, text
        if not name or not source or name in sources or name == BASE:
            raise ValueError(
                f"--adapters {text!r}: the name {name!r} is taken or missing ({BASE} is the base model); give NAME=DIR"
            )
        sources[name] = source
    return sources


def tenants_of_run(folder: str) -> list[str]:
    """NAME=DIR for each tenant of a run of many; none for another text."""
    from ..config import expanded

    if "=" in folder or not (expanded(folder) / "tenants.json").is_file():
        return []
    found = [f"{path.parent.name}={path}" for path in sorted(expanded(folder).glob("*/adapter"))]
    if not found:
        raise ValueError(f"--adapters {folder}: no tenant of this run has an adapter yet")
    return found


def tenants_of(options, sources: dict[str, str]) -> list[str | None] | None:
    """A tenant's name, or None for the base model, for each prompt; with --input one for the lines that name none."""
    from ..adapters.bank import unknown

    names, prompts = options.tenant, len(options.prompt) or 1
    if not names and (options.input or not sources):
        return None
    if options.adapter or not sources:
        raise ValueError("--tenant chooses among --adapters NAME=DIR...; --adapter DIR serves every prompt alone")
    if len(names) not in (1, prompts):
        each = "" if options.input else f", or once for each of the {prompts} prompts"
        raise ValueError(
            f"--tenant: given {len(names)} times; expected once{each}: {', '.join(sources)}, or {BASE} for no adapter"
        )
    wrong = [name for name in names if name != BASE and name not in sources]
    if wrong:
        raise ValueError(f"--tenant: {unknown(wrong[0], tuple(sources))}")
    held = [None if name == BASE else name for name in names]
    return held if len(held) == prompts else held * prompts


def adapters_of(options, sources: dict[str, str], model):
    """None, one adapter, or the bank of --adapters."""
    from .. import devices
    from ..adapters.bank import AdapterBank
    from ..adapters.files import load_adapter

    if not sources:
        return load_adapter(options.adapter, model.config, model=model) if options.adapter else None
    held = {name: load_adapter(source, model.config, model=model) for name, source in sources.items()}
    bank = AdapterBank.holding(held, model.config)
    devices.say(str(bank))
    return bank
