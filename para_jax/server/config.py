"""ServerConfig: how the server answers. The flags of `para-jax serve` are made from its fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..config.bounds import NonNegativeFloat, PositiveFloat, PositiveInt, check_fields


def flag(default: Any, help: str, **more: Any) -> Any:
    """A field with its default and its flag's help."""
    return field(default=default, metadata={"help": help} | more)


text, seconds = partial(flag, type=str), partial(flag, type=float, metavar="S")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The server's options."""

    served_model_name: str | None = text(None, "the base model's name (default: the backbone's)", metavar="NAME")
    """None: base, which works in any case"""
    adapter_root: str | None = text(
        None, "let clients load adapters from this folder, and unload them, while it runs", metavar="DIR"
    )
    allow_hub: bool = flag(False, "with --adapter-root: let clients load adapters from the hub too")
    host: str = text("127.0.0.1", "the address to listen at (default: this machine alone)")
    port: int = flag(8000, "0 picks a free one (default: %(default)s)")
    api_key_file: str | None = text(
        None, "one key per line, optionally followed by the tenants that it may use (default: no keys)", metavar="FILE"
    )
    timeout: PositiveFloat = seconds(600, "seconds that a request may take (default: %(default)s)")
    drain_seconds: NonNegativeFloat = seconds(
        30, "after SIGTERM or Ctrl-C, seconds that open requests may take (default: %(default)s)"
    )
    max_body: PositiveInt = flag(8 * 2**20, "the largest request (default: 8 MiB)", metavar="BYTES")
    log_prompts: bool = flag(False, "log the prompts, not only their lengths")

    def __post_init__(self):
        check_fields(self)
        if self.allow_hub and not self.adapter_root:
            raise ValueError("--allow-hub goes with --adapter-root\ngive that too")
