"""Which adapters a command serves, and which of them answers each prompt."""

from __future__ import annotations

from itertools import islice

from ..config import BASE
from ..io.messages import say

LISTED = 20  # names in an error


def tenants_of_prompts(options, sources: dict[str, str]) -> list[str | None] | None:
    """A tenant's name for each prompt, or None for the base model. With --input, the one name for lines without."""
    from ..adapters.names import unknown

    names, prompts = options.tenant, len(options.prompt) or 1
    if not names and (options.input or not sources):
        return None
    if options.adapter or not sources:
        raise ValueError("--tenant goes with --adapters NAME=DIR, not with --adapter\nleave one of the options out")
    if len(names) not in (1, prompts):
        times = "once" if options.input or prompts == 1 else f"once, or once for each of the {prompts} prompts"
        given = f"--tenant is given {len(names)} times" if names else "--adapters needs --tenant NAME with --prompt"
        known = ", ".join([*islice(sources, LISTED), *(["..."] if len(sources) > LISTED else [])])
        raise ValueError(f"{given}\ngive it {times}: {known}, or {BASE} for no adapter")
    for name in names:
        if name != BASE and name not in sources:
            raise ValueError(f"--tenant: {unknown(name, tuple(sources))}")
    tenants = [None if name == BASE else name for name in names]
    return tenants if len(tenants) == prompts else tenants * prompts


def adapters_of(options, found: dict, model):
    """None, the adapter of --adapter, or the bank of --adapters.

    Args:
        found: the previews of --adapters by name.
    """
    from ..adapters.files import load_adapter

    if not found:
        return load_adapter(options.adapter, model.config, model=model) if options.adapter else None
    from ..adapters.preview import load_previewed

    def load(name: str):
        return load_previewed(found[name], model.config, model=model)

    return bank_within_memory(options, found, model.config, load)


def bank_within_memory(options, found: dict, model_config, load):
    """The bank of --adapters. Those that --adapter-memory has no room for are loaded when they are needed.

    Args:
        load: gives the adapter of a name in `found`.
    """
    from ..adapters.loading_bank import bank_of

    bank = bank_of(found, model_config, load, int(options.adapter_memory * 1e9))
    say(str(bank))
    return bank
